"""A device that runs kernels' own `.cu` text on the CPU: each thread a fiber, each PTX instruction what the ISA says.

A kernel is compiled with g++ against the host half of `ptx.cuh` (`cuda_emulator_ptx.h`) and a small runtime into a
shared object, and called through ctypes on the memory of CPU tensors. README.md says what is checked, counted and not
known.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from flatq_cli.kernels.device import LIMITS, Argument, DeviceLimits, Kernel

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "kernels_cuda"
RUNTIME = tuple(f"cuda_emulator{part}.cpp" for part in ("", "_warp", "_memory", "_cost", "_races"))
PROGRAM = "cuda_emulator_main.cpp"
HEADERS = ("cuda_emulator.h", "cuda_emulator_ptx.h", "cuda_emulator_runtime.h")
# No contraction of a*b+c, no reordering by type (kernels see one memory as many types), each library on its own.
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-ffp-contract=off",
    "-w",
)  # fmt: skip
# Shifting a negative number or into the sign bit is defined on a GPU (and in C++20).
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=shift-base", "-fno-omit-frame-pointer",
    "-g1",
)  # fmt: skip
SANITIZER_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
MAX_THREADS = 1024
KEPT_DAYS = 14  # of the cache, since it was compiled


class EmulatorUnavailableError(unittest.SkipTest):
    """There is no g++ to compile kernels for the CPU: a test that meets this is skipped with its reason."""


class EmulatorError(RuntimeError):
    """A kernel does not compile for the CPU, is launched wrongly or did something that a GPU forbids."""


COUNTED = ("sectors_read", "sectors_written", "wavefronts", "wavefronts_min", "mma", "warp_barriers", "warps", "blocks")


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in COUNTED]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32), ("shared_bytes", ctypes.c_uint32),
        ("order", ctypes.c_int32), ("seed", ctypes.c_uint64),
        ("count", ctypes.c_int32), ("check_memory", ctypes.c_int32), ("check_races", ctypes.c_int32),
        ("region_count", ctypes.c_int32), ("regions", ctypes.c_void_p), ("region_sectors", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p), ("counters", ctypes.POINTER(_Counters)),
        ("error", ctypes.c_void_p), ("error_size", ctypes.c_uint32),
    ]  # fmt: skip


@dataclass
class Counters:
    """What the launches since `reset` cost, summed over blocks.

    Args:
        sectors_read, sectors_written: 32-byte sectors of global memory, distinct ones per access of a warp.
        wavefronts: passes through shared memory, bank conflicts included. wavefronts_min: without conflicts.
        mma: tensor-core instructions of all kinds, one per warp.
        warp_barriers: block_sync and named_sync, one per warp that meets there. warps, blocks: run.
        argument_sectors: sectors (read, written) of each tensor argument of the last launch, in their order.
    """

    sectors_read: int = 0
    sectors_written: int = 0
    wavefronts: int = 0
    wavefronts_min: int = 0
    mma: int = 0
    warp_barriers: int = 0
    warps: int = 0
    blocks: int = 0
    argument_sectors: list[tuple[int, int]] = field(default_factory=list)

    @property
    def barriers(self) -> float:
        """Barriers that a warp meets in a block, on average."""
        return self.warp_barriers / max(1, self.warps)

    def reset(self) -> None:
        for entry in dataclasses.fields(self):
            setattr(self, entry.name, [] if entry.name == "argument_sectors" else 0)


class EmulatedDevice:
    """A `flatq_cli.kernels.device.Device` on the CPU.

    Args:
        arch: which GPU is played, a key of `LIMITS`; `__CUDA_ARCH__` is ten times that.
        multiprocessors: how many it has: persistent kernels launch as many blocks.
        lanes: the order in which threads, warps and blocks run where a GPU leaves it open; an int is a seed.
        sanitize: run each launch in a program of its own built with AddressSanitizer and UndefinedBehaviorSanitizer.
        folder: where kernels' sources are, if not `kernels_cuda` (its headers are found in either case).
        count: fill `counters`. races: find conflicts in shared memory.
    Raises:
        EmulatorUnavailableError: if there is no g++.
    """

    def __init__(
        self,
        arch: int = 80,
        multiprocessors: int = 2,
        lanes: Literal["ascending", "descending"] | int = "ascending",
        sanitize: bool = False,
        folder: Path | None = None,
        count: bool = True,
        races: bool = True,
    ) -> None:
        self.limits: DeviceLimits = dataclasses.replace(LIMITS[arch], multiprocessors=multiprocessors)
        self.counters = Counters()
        self.lanes = lanes
        self.sanitize = sanitize
        self.folder = SOURCES if folder is None else folder
        self.count = count
        self.races = races
        compiler()

    def reset(self) -> None:
        """Set the counters to 0."""
        self.counters.reset()

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, arguments: Sequence[Argument]
    ) -> None:
        """Run `kernel` to its end. See `Device.launch`.

        Raises:
            EmulatorError: compiling failed, the launch or its arguments do not fit, or the kernel did something that a
                GPU forbids or that has no defined result: the message names the source line, block and thread.
        """
        _check_launch(kernel, grid, block, shared_bytes, self.limits)
        library = _load(build(kernel, self.limits.arch, self.folder))
        _check_arguments(kernel, library.flatq_signature().decode(), arguments)
        if self.sanitize:
            program = build(kernel, self.limits.arch, self.folder, sanitize=True)
            _run_program(program, kernel, (*grid, block, shared_bytes, *_order(self.lanes)), arguments)
            return
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        regions = (ctypes.c_uint64 * max(1, 2 * len(tensors)))(*(n for t in tensors for n in (t.data_ptr(), _span(t))))
        sectors = (ctypes.c_uint64 * max(1, 2 * len(tensors)))()
        counters, error = _Counters(), ctypes.create_string_buffer(8192)
        order, seed = _order(self.lanes)
        request = _Launch(
            grid=grid, block=block, shared_bytes=shared_bytes, order=order, seed=seed,
            count=self.count, check_memory=True, check_races=self.races,
            region_count=len(tensors), regions=ctypes.addressof(regions), region_sectors=ctypes.addressof(sectors),
            arguments=ctypes.addressof(pointers), counters=ctypes.pointer(counters),
            error=ctypes.addressof(error), error_size=len(error),
        )  # fmt: skip
        with _ONE_AT_A_TIME:
            failed = library.flatq_launch(ctypes.byref(request))
        if failed:
            raise EmulatorError(f"{kernel.entry}: {error.value.decode(errors='replace')}")
        for name in COUNTED:
            setattr(self.counters, name, getattr(self.counters, name) + getattr(counters, name))
        self.counters.argument_sectors = [(sectors[2 * i], sectors[2 * i + 1]) for i in range(len(tensors))]


_ONE_AT_A_TIME = threading.Lock()


def _order(lanes: str | int) -> tuple[int, int]:
    """The order and the seed, as the runtime knows them."""
    return (2, lanes) if isinstance(lanes, int) else ({"ascending": 0, "descending": 1}[lanes], 0)


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _value(argument: Argument) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _check_launch(
    kernel: Kernel, grid: tuple[int, int, int], block: int, shared_bytes: int, limits: DeviceLimits
) -> None:
    if not (0 < block <= MAX_THREADS and block % 32 == 0):
        raise EmulatorError(f"{kernel.entry}: a block of {block} threads: must be a multiple of 32 up to {MAX_THREADS}")
    if len(grid) != 3 or min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise EmulatorError(f"{kernel.entry}: a grid of {grid} blocks: a GPU takes 1 to (2^31 - 1, 65535, 65535)")
    if not 0 <= shared_bytes <= limits.shared_per_block:
        most = limits.shared_per_block
        raise EmulatorError(
            f"{kernel.entry}: {shared_bytes} bytes of shared memory: sm_{limits.arch} has {most} a block"
        )


def _check_arguments(kernel: Kernel, signature: str, arguments: Sequence[Argument]) -> None:
    if len(arguments) != len(signature):
        raise EmulatorError(f"{kernel.entry} has {len(signature)} parameters, {len(arguments)} arguments were passed")
    expected = {"p": "a pointer", "i": "an int", "f": "a float"}
    for index, (letter, argument) in enumerate(zip(signature, arguments, strict=True)):
        if argument is None or isinstance(argument, Tensor):
            given = "p"
        elif isinstance(argument, bool) or not isinstance(argument, int | float):
            given = "?"
        else:
            given = "i" if isinstance(argument, int) else "f"
        if given != letter:
            raise EmulatorError(
                f"{kernel.entry}: parameter {index} is {expected[letter]}, the argument a {type(argument).__name__}"
            )
        if isinstance(argument, Tensor) and argument.device.type != "cpu":
            raise EmulatorError(f"{kernel.entry}: argument {index} is on {argument.device}, not on the CPU")
        if isinstance(argument, int) and not -(2**31) <= argument < 2**31:
            raise EmulatorError(f"{kernel.entry}: argument {index}, {argument}, does not fit 32 bits")


# ---- Compiling. ----


@cache
def compiler() -> tuple[str, str]:
    """The path of g++ and its version."""
    path = shutil.which("g++")
    if path is None:
        raise EmulatorUnavailableError("the CUDA emulator needs g++, which is not installed")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "flatq" / "cuda_emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"flatq-cuda-emulator-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def build(kernel: Kernel, arch: int, folder: Path = SOURCES, sanitize: bool = False) -> Path:
    """The shared object of `kernel` (with the sanitizers: a program), compiled unless the cache has it."""
    source = folder / kernel.source
    if not source.is_file():
        raise EmulatorError(f"no such kernel source: {source}")
    unit = f'#include "{source}"\nFLATQ_EMULATOR_ENTRY({kernel.entry})\n'
    includes = [f"-I{path}" for path in dict.fromkeys((str(folder), str(SOURCES), str(HERE)))]
    macros = ["-DFLATQ_EMULATOR", f"-D__CUDA_ARCH__={arch}0", *(f"-D{name}={value}" for name, value in kernel.defines)]
    headers = sorted({*folder.glob("*.cuh"), *source.parent.glob("*.cuh"), *SOURCES.glob("*.cuh")})
    flags = [*FLAGS, *(SANITIZERS if sanitize else ())]
    objects = [_object(name, flags) for name in (*RUNTIME, *([PROGRAM] if sanitize else []))]
    texts = [path.read_text() for path in (source, *headers)]
    key = _hash(unit, *flags, *macros, *includes, *(path.name for path in objects), *texts)
    target = cache_folder() / f"{source.stem}-{key}{'' if sanitize else '.so'}"
    if not target.exists():
        kind = [] if sanitize else ["-shared", "-s"]
        options = [*flags, *macros, *includes, *kind, "-x", "c++", "-", "-x", "none", *map(str, objects)]
        _compile(options, target, unit, f"{kernel.source}, {kernel.entry}, {dict(kernel.defines)}")
    return target


def _object(name: str, flags: Sequence[str]) -> Path:
    """One file of the runtime, compiled: the same for every kernel."""
    texts = [(HERE / file).read_text() for file in (name, *HEADERS)]
    target = cache_folder() / f"{Path(name).stem}-{_hash(*flags, *texts)}.o"
    if not target.exists():
        _compile([*flags, "-c", str(HERE / name)], target, "", name)
    return target


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join((*compiler(), *parts)).encode()).hexdigest()[:24]


def _compile(options: Sequence[str], target: Path, text: str, what: str) -> None:
    """Compile to a name of this process's own, then rename: several processes may build the same target."""
    for old in target.parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 86400:
                old.unlink()
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(handle)
    command = [compiler()[0], *options, "-o", name]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(name)
        raise EmulatorError(f"g++ does not compile {what}:\n{done.stderr[:4000]}")
    os.chmod(name, 0o755)
    os.replace(name, target)


@cache
def _load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    loaded.flatq_signature.restype = ctypes.c_char_p
    return loaded


# ---- The sanitizers' program: the launch goes into a file, the changed tensors come back in another. ----


def _run_program(program: Path, kernel: Kernel, numbers: Sequence[int], arguments: Sequence[Argument]) -> None:
    """Run one launch in `program`. The file's layout is that of cuda_emulator_main.cpp."""
    job = struct.pack("<8Q", *numbers, len(arguments))
    befores: list[np.ndarray] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            data = ctypes.string_at(argument.data_ptr(), _span(argument))
            befores.append(np.frombuffer(data, np.uint8))
            job += struct.pack("<cQQ", b"p", argument.data_ptr(), len(data)) + data
        elif argument is None:
            job += struct.pack("<cQQ", b"p", 0, 0)
        else:
            letter = "i" if isinstance(argument, int) else "f"
            job += struct.pack(f"<c{letter}", letter.encode(), argument)
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request", Path(folder) / "answer"
        request.write_bytes(job)
        done = subprocess.run(
            [str(program), str(request), str(answer)],
            capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **SANITIZER_ENVIRONMENT},
        )  # fmt: skip
        if done.returncode:
            raise EmulatorError(f"{kernel.entry}: {_first_lines(done.stderr) or f'exit code {done.returncode}'}")
        answered = np.frombuffer(answer.read_bytes(), np.uint8)
    # Where tensors overlap, what one of them did not change must not undo what another did: byte for byte.
    for argument in arguments:
        if isinstance(argument, Tensor):
            size = _span(argument)
            before, after, answered = befores.pop(0), answered[:size], answered[size:]
            changed = before != after
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(argument.data_ptr()))[changed] = after[changed]


def _first_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not set(line) <= {"="}]
    return "\n".join(lines[:14])
