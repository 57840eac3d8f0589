"""What a kernel needs of a device, as plain data: an op plans a launch from it, and a device carries the launch out.

There are two devices: a GPU through CuPy (`cuda.py`) and, in the tests, an emulator that runs the same source on the
CPU. Ops know neither; a plan is a pure function of sizes and of `DeviceLimits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

# A kernel's argument: a tensor is passed as the pointer to its first element, None as a null pointer, int as a 32-bit
# int, float as a float.
Argument: TypeAlias = Tensor | int | float | None


@dataclass(frozen=True)
class Kernel:
    """One specialization of a CUDA source: what is compiled, and under which name its entry point is found.

    Args:
        source: file in the folder of CUDA sources, `kron_quant.cu`.
        entry: name of the `extern "C" __global__` function.
        defines: macros, `(("N1", 64), ("TYPE", "F16"))`; the order is part of the identity.
    """

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...] = ()


@dataclass(frozen=True)
class DeviceLimits:
    """What plans depend on.

    Args:
        arch: compute capability as a number: 70, 75, 80, 86, 89, 90, 100, 120.
        multiprocessors: SMs of the chip.
        shared_per_block: bytes of dynamic shared memory that one block may ask for (opt-in limit).
        shared_per_multiprocessor: bytes that the blocks of one SM share.
    """

    arch: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


class Device(Protocol):
    """Something that runs kernels on the tensors that live on it."""

    @property
    def limits(self) -> DeviceLimits:
        """What a plan may use."""
        ...

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        """Run `kernel` on `grid` blocks of `block` threads, each with `shared_bytes` of dynamic shared memory.

        On a GPU: on torch's current stream, without waiting for it.
        """
        ...


def aligned(tensor: Tensor, word: int = 16) -> Tensor:
    """Contiguous, and beginning at a multiple of the `word` bytes that a kernel reads at a time (a view may begin
    anywhere; what torch allocates begins at a multiple of 16 and more).
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % word == 0 else tensor.clone()


# Limits by architecture, of the chip most people have (CUDA C++ programming guide, "Technical specifications per
# compute capability"): for plans and reports made without a GPU. Multiprocessors: V100, T4, A100, RTX 3090, RTX 4090,
# H100 SXM, B200, RTX 5090.
LIMITS: dict[int, DeviceLimits] = {
    70: DeviceLimits(70, 80, 96 * 1024, 96 * 1024),
    75: DeviceLimits(75, 40, 64 * 1024, 64 * 1024),
    80: DeviceLimits(80, 108, 163 * 1024, 164 * 1024),
    86: DeviceLimits(86, 82, 99 * 1024, 100 * 1024),
    89: DeviceLimits(89, 128, 99 * 1024, 100 * 1024),
    90: DeviceLimits(90, 132, 227 * 1024, 228 * 1024),
    100: DeviceLimits(100, 148, 227 * 1024, 228 * 1024),
    120: DeviceLimits(120, 170, 99 * 1024, 100 * 1024),
}
