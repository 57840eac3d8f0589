"""CUDA text to machine code, by NVRTC through CuPy's bindings; no GPU and no driver are needed.

What was compiled once is kept on disk, as DeepGEMM keeps it: the key is a hash of everything that decides the result
(text, options, NVRTC's version), an entry is written beside its place and renamed into it, and an entry that does not
match its own checksum is compiled again. So any number of processes may share the folder, and it may be deleted at any
time: `$FLATQ_CACHE_DIR/kernels`, by default `~/.cache/flatq/kernels`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.kernels.errors import KernelError, missing_cupy, missing_nvrtc
from flatq_cli.kernels.sources import kernel_text

if TYPE_CHECKING:
    from flatq_cli.kernels.device import Kernel

_FORMAT = 1
_ERROR_LINES = 4


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and what ptxas says of it.

    Args:
        cubin: an ELF file, for `cuModuleLoadData` and nvdisasm.
        log: the compiler's whole output.
        registers: per thread.
        spill_bytes: stores and loads of registers that found no place, per thread.
        stack_bytes: local memory of a thread: spills, and arrays that are not held in registers.
        shared_bytes: static shared memory of a block.
    """

    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def compile_options(arch: int) -> tuple[str, ...]:
    """NVRTC's options for an architecture: the same at run time, in the tests and in the report."""
    return (f"--gpu-architecture=sm_{arch}", "-std=c++17", "-lineinfo", "--ptxas-options=-v")


def compile_kernel(kernel: Kernel, arch: int, folder: Path | None = None) -> Compiled:
    """Compile `kernel` for compute capability `arch` (80 for sm_80), or take it from the cache.

    Args:
        folder: where the sources are looked for first; see `kernel_text`.
    Raises:
        KernelError: CuPy or NVRTC is missing, NVRTC does not know the architecture, or the text does not compile.
    """
    nvrtc = load_nvrtc()
    arch = code_arch(arch, supported_archs())
    text, options = kernel_text(kernel, folder), compile_options(arch)
    place = cache_dir() / f"{kernel.entry}-sm{arch}-{_key(text, options, nvrtc.getVersion())}.bin"
    found = _read_entry(place)
    if found is None:
        found = _compile(nvrtc, kernel, arch, text, options)
        _write_entry(place, *found)
    return _parse(kernel, *found)


def cache_dir() -> Path:
    """The folder of compiled kernels."""
    own = os.environ.get("FLATQ_CACHE_DIR")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatq"
    return base / "kernels"


@lru_cache(maxsize=1)
def supported_archs() -> tuple[int, ...]:
    """The architectures that this NVRTC compiles for.

    Raises:
        KernelError: CuPy or NVRTC is missing.
    """
    return tuple(sorted(int(arch) for arch in load_nvrtc().getSupportedArchs()))


@lru_cache(maxsize=1)
def load_nvrtc() -> Any:
    """CuPy's bindings of NVRTC, its library loaded.

    CuPy looks in the CUDA toolkit (newer versions also among Python packages); where it finds none, the library that
    torch's own packages bring is loaded first, so that `dlopen` by name then finds it.

    Raises:
        KernelError: CuPy is not installed, or no NVRTC is found.
    """
    try:
        return _import_nvrtc()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("cupy", "cupy_backends"):
            raise missing_cupy(_torch_cuda()) from error
        raise missing_nvrtc(_first_line(error)) from error
    except Exception:  # an ImportError, or what CuPy raises where a library is missing
        _preload_nvrtc()
    try:
        return _import_nvrtc()
    except Exception as error:
        raise missing_nvrtc(_first_line(error)) from error


def _import_nvrtc() -> Any:
    import cupy  # noqa: F401  (sets up where CUDA's libraries are found)
    from cupy_backends.cuda.libs import nvrtc

    nvrtc.getVersion()
    return nvrtc


def _preload_nvrtc() -> None:
    for entry in sys.path:
        for library in sorted(Path(entry or ".").glob("nvidia/*/lib/libnvrtc.so.*[0-9]"), reverse=True):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch_cuda() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def code_arch(arch: int, known: tuple[int, ...]) -> int:
    """The architecture to compile for: `arch`, or the newest of its major version whose code it runs.

    Args:
        known: what NVRTC compiles for (`supported_archs()`).
    Raises:
        KernelError: there is none.
    """
    fitting = [other for other in known if other <= arch and other // 10 == arch // 10]
    if not fitting:
        names = ", ".join(f"sm_{other}" for other in known)
        raise KernelError(
            f"this NVRTC does not compile for sm_{arch} (only {names}): install a CuPy of another CUDA version"
        )
    return max(fitting)


def _compile(nvrtc: Any, kernel: Kernel, arch: int, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    program = nvrtc.createProgram(text, kernel.source, [], [])
    try:
        try:
            nvrtc.compileProgram(program, list(options))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).rstrip("\0\n")
            raise KernelError(
                f"{describe_kernel(kernel, arch)} does not compile: {_first_errors(log) or error}"
            ) from error
        return _whole(nvrtc.getCUBIN(program)), _lasting(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """The ELF file with its last byte: CuPy (13 and 14) cuts one, taking it for the end of a string."""
    program_headers, sections = struct.unpack_from("<QQ", cubin, 32)
    _, program_size, programs, section_size, section_count = struct.unpack_from("<HHHHH", cubin, 52)
    size = max(program_headers + program_size * programs, sections + section_size * section_count)
    return cubin + b"\0" if len(cubin) == size - 1 else cubin


def _lasting(log: str) -> str:
    """A log without what differs from one compilation to the next."""
    return "\n".join(line for line in log.rstrip("\0\n").splitlines() if "Compile time" not in line)


def _first_errors(log: str) -> str:
    """The first errors of the compiler, on one line."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
    return "; ".join(errors[:_ERROR_LINES])


def describe_kernel(kernel: Kernel, arch: int) -> str:
    """A kernel's name in an error: entry, source, macros, architecture."""
    defines = ", ".join(f"{name}={value}" for name, value in kernel.defines)
    return f"kernel {kernel.entry} ({kernel.source}{', ' if defines else ''}{defines}) for sm_{arch}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---- What ptxas says. ----


def _parse(kernel: Kernel, cubin: bytes, log: str) -> Compiled:
    """The entry point's figures; a source may hold other functions, each with lines of its own."""
    about = _section(log, kernel.entry)
    if about is None:
        raise KernelError(f"{kernel.source} has no kernel named {kernel.entry}")
    return Compiled(
        cubin=cubin,
        log=log,
        registers=_figure(about, r"Used (\d+) registers"),
        spill_bytes=_figure(about, r"(\d+) bytes spill stores") + _figure(about, r"(\d+) bytes spill loads"),
        stack_bytes=_figure(about, r"(\d+) bytes stack frame"),
        shared_bytes=_figure(about, r"(\d+) bytes smem"),
    )


def _section(log: str, entry: str) -> str | None:
    parts = re.split(r"Compiling entry function '(\w+)'", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(entry)


def _figure(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


# ---- The cache: one file an entry, a line of JSON (log, checksum) and the machine code. ----


def _key(text: str, options: tuple[str, ...], version: tuple[int, int]) -> str:
    identity = json.dumps([_FORMAT, list(version), list(options), text])
    return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:32]


def _read_entry(place: Path) -> tuple[bytes, str] | None:
    try:
        head, _, cubin = place.read_bytes().partition(b"\n")
        about = json.loads(head)
        whole = about["sha256"] == hashlib.sha256(cubin).hexdigest()
        return (cubin, str(about["log"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_entry(place: Path, cubin: bytes, log: str) -> None:
    """Write an entry; a folder that cannot be written costs a compilation in every process, not the run."""
    head = json.dumps({"sha256": hashlib.sha256(cubin).hexdigest(), "log": log}).encode("utf-8")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(prefix=".partial-", dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(head + b"\n" + cubin)
            os.replace(staged, place)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(staged)
