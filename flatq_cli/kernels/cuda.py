"""A GPU as a `Device`: kernels are compiled at first use and launched on torch's memory and torch's current stream.

CuPy loads the machine code and launches it; torch owns the memory, the streams and the context (both libraries use the
device's primary context). A launch passes raw pointers: nothing is copied and nothing waits, so an op works under CUDA
graphs and torch.compile. One thing cannot happen while a graph is captured: loading a kernel. Run an op once at the
same sizes before capturing it, as `torch.cuda.make_graphed_callables` and vLLM's warm-up do anyway.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatq_cli.kernels.compiler import Compiled, compile_kernel, describe_kernel, load_nvrtc
from flatq_cli.kernels.device import Argument, DeviceLimits, Kernel
from flatq_cli.kernels.errors import KernelError, missing_cupy

_DEFAULT_SHARED = 48 * 1024
"""Bytes of shared memory that a block may have without asking."""

_SLOT = 8
"""Bytes that an argument takes in the packed buffer: a pointer's."""


class CudaDevice:
    """One GPU. Made by `cuda_device`, once per GPU and process.

    Raises:
        KernelError: CuPy is not installed or does not find its libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cupy = _load_cupy()
        self._limits = _limits(device)
        self._loaded: dict[Kernel, _Loaded] = {}
        self._lock = threading.Lock()
        self._planned: list[Kernel] | None = None

    @property
    def limits(self) -> DeviceLimits:
        return self._limits

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        """Run `kernel` on torch's current stream; see `Device.launch`. A grid without blocks does nothing.

        Raises:
            KernelError: the kernel does not compile or load, an argument is of a wrong kind or on another device, the
                launch is refused, or a graph is being captured and the kernel has not been loaded before.
        """
        if min(grid) == 0:
            return
        packed = pack_arguments(arguments, self._device, kernel)
        if self._planned is not None:
            self._planned.append(kernel)
            return
        with torch.cuda.device(self._device):
            loaded = self._loaded.get(kernel) or self._load(kernel)
            try:
                self._enter_context(loaded)
                self._allow_shared(loaded, shared_bytes)
                stream = torch.cuda.current_stream(self._device).cuda_stream
                self._cupy.driver.launchKernel(
                    loaded.function, *grid, block, 1, 1, shared_bytes, stream, packed.list, 0
                )
            except self._cupy.driver.CUDADriverError as error:
                raise KernelError(
                    f"{describe_kernel(kernel, self.limits.arch)}: {error} for grid {grid}, {block} threads, "
                    f"{shared_bytes} bytes of shared memory"
                ) from error

    @contextmanager
    def planning(self) -> Iterator[list[Kernel]]:
        """Launches only note their kernels while this lasts: what will have to be compiled. Outputs are not written."""
        planned: list[Kernel] = []
        self._planned = planned
        try:
            yield planned
        finally:
            self._planned = None

    def _load(self, kernel: Kernel) -> _Loaded:
        with self._lock:
            if kernel in self._loaded:
                return self._loaded[kernel]
            if torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    f"{describe_kernel(kernel, self.limits.arch)} cannot be loaded while a CUDA graph is captured: "
                    "run the op once at this size before the capture"
                )
            compiled = compile_kernel(kernel, self.limits.arch)
            try:
                module = self._cupy.Module()
                module.load(compiled.cubin)
                function = module.get_function(kernel.entry)
            except self._cupy.driver.CUDADriverError as error:
                raise KernelError(f"{describe_kernel(kernel, self.limits.arch)} cannot be loaded: {error}") from error
            context = self._cupy.driver.ctxGetCurrent()
            room = _DEFAULT_SHARED - compiled.shared_bytes
            self._loaded[kernel] = _Loaded(module, function.ptr, compiled, room, context)
            return self._loaded[kernel]

    def _enter_context(self, loaded: _Loaded) -> None:
        """A thread in which neither torch nor CuPy has called CUDA's runtime yet has no context; a launch needs one."""
        if self._cupy.driver.ctxGetCurrent() != loaded.context:
            self._cupy.driver.ctxSetCurrent(loaded.context)

    def _allow_shared(self, loaded: _Loaded, shared_bytes: int) -> None:
        """More than 48 KB of shared memory must be asked for, once for each function."""
        if shared_bytes > loaded.allowed_shared:
            attribute = self._cupy.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._cupy.driver.funcSetAttribute(loaded.function, attribute, shared_bytes)
            loaded.allowed_shared = shared_bytes


@cache
def _device_of(index: int) -> CudaDevice:
    return CudaDevice(torch.device("cuda", index))


def cuda_device(device: torch.device) -> CudaDevice:
    """The `CudaDevice` of a torch device; without an index the current one.

    Raises:
        KernelError: it is not a CUDA device, torch sees no GPU, or CuPy is not installed.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise KernelError(f"CUDA kernels run on a CUDA device that torch sees, not on '{device}'")
    return _device_of(torch.cuda.current_device() if device.index is None else device.index)


@dataclass
class _Loaded:
    """A function on a GPU. The module is held because the function ends with it."""

    module: Any
    function: int
    compiled: Compiled
    allowed_shared: int
    context: int


class Packed(NamedTuple):
    """A launch's arguments in memory, as `cuLaunchKernel` reads them: `list` is the address of their addresses."""

    list: int
    values: Any
    addresses: Any


def pack_arguments(arguments: Sequence[Argument], device: torch.device, kernel: Kernel) -> Packed:
    """Lay arguments out for a launch: each in a slot of its own, and a list of the slots' addresses.

    Raises:
        KernelError: a tensor is on another device, an int does not fit 32 bits, or an argument is of another type.
    """
    values = bytearray()
    for position, argument in enumerate(arguments):
        try:
            values += _slot(argument, device)
        except (ValueError, TypeError, struct.error) as error:
            raise KernelError(f"kernel {kernel.entry} ({kernel.source}), argument {position}: {error}") from error
    buffer = (ctypes.c_char * max(len(values), 1)).from_buffer_copy(bytes(values) or b"\0")
    start = ctypes.addressof(buffer)
    addresses = (ctypes.c_void_p * max(len(arguments), 1))(*(start + _SLOT * index for index in range(len(arguments))))
    return Packed(ctypes.addressof(addresses), buffer, addresses)


def _slot(argument: Argument, device: torch.device) -> bytes:
    if argument is None:
        return struct.pack("<Q", 0)
    if isinstance(argument, Tensor):
        if argument.device != device:
            raise ValueError(f"a tensor on {argument.device}, the kernel runs on {device}")
        return struct.pack("<Q", argument.data_ptr())
    if isinstance(argument, int):
        return struct.pack("<ixxxx", argument)
    if isinstance(argument, float):
        return struct.pack("<fxxxx", argument)
    raise TypeError(f"{type(argument).__name__} is not a tensor, None, int or float")


class _Cupy(NamedTuple):
    """What is used of CuPy."""

    driver: Any
    Module: Any


def _load_cupy() -> _Cupy:
    try:
        load_nvrtc()  # where CUDA's libraries are found is settled there
        from cupy.cuda import driver
        from cupy.cuda.function import Module
    except ModuleNotFoundError as error:
        raise missing_cupy(torch.version.cuda) from error
    except ImportError as error:
        raise KernelError(f"CUDA kernels need CuPy, which cannot be imported: {error}") from error
    return _Cupy(driver, Module)


def _limits(device: torch.device) -> DeviceLimits:
    found: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        arch=found.major * 10 + found.minor,
        multiprocessors=found.multi_processor_count,
        shared_per_block=found.shared_memory_per_block_optin,
        shared_per_multiprocessor=found.shared_memory_per_multiprocessor,
    )
