"""A kernel at one size, as the static report and the tests of all kernels see it.

Each kernel's module lists its cases (`report_cases(limits)`); what compiles them, counts their accesses in the
emulator or prints them needs to know nothing else about a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flatq_cli.kernels.device import Device, Kernel


@dataclass(frozen=True)
class Least:
    """What one token costs at the very least, however a kernel is written.

    Args:
        sectors: 32-byte sectors of global memory, read and written, each input and output byte moved once; matrices and
            other data that all tokens share count 0.
        mma: tensor-core instructions of the shape that the kernel uses, with nothing padded.
    """

    sectors: float
    mma: float


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Args:
        name: kernel and variant, `kron_quant[int4,f16]`.
        n1, n2: the size. kron_quant: the factors; linears: in and out features; K/V: head_dim and tokens.
        kernel: what is compiled. block: threads. shared_bytes: dynamic shared memory of a block.
        fast: a fast path must neither spill nor use local memory; a plain version may.
        least: per token.
        tokens: how many tokens `run` handles; the report divides by it.
        run: launches the kernel once, on random data, on a device that counts.
        reason: why the plan costs more than the least, where it does; the report prints it beside the figure.
    """

    name: str
    n1: int
    n2: int
    kernel: Kernel
    block: int
    shared_bytes: int
    fast: bool
    least: Least
    tokens: int
    run: Callable[[Device], None]
    reason: str = ""
