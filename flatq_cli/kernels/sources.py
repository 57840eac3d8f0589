"""Where the CUDA sources are, and one text of a kernel: what NVRTC compiles and the tests' emulator runs.

A kernel's text is complete: its macros first, then its source with the project's own headers put in place of their
`#include` lines. So the text alone identifies what is compiled (the key of the compiler's cache), and nobody needs an
include path. `#line` directives keep the names and line numbers of the files in the compiler's messages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from flatq_cli.kernels.errors import KernelError

if TYPE_CHECKING:
    from flatq_cli.kernels.device import Kernel

PACKAGE = Path(__file__).resolve().parent.parent

_OWN_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"\s*(//.*)?$')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def kernels_dir() -> Path:
    """The folder with the CUDA sources: inside the package once installed from a wheel, else the checkout's."""
    packaged = PACKAGE / "_kernels_cuda"
    return packaged if packaged.is_dir() else PACKAGE.parent / "kernels_cuda"


def kernel_text(kernel: Kernel, folder: Path | None = None) -> str:
    """The translation unit of `kernel`.

    Args:
        kernel: source, and macros, which come first.
        folder: where the sources are looked for before `kernels_dir()` (the tests plant faults in copies).
    Raises:
        KernelError: a source or an included header is not there.

    `#include "x.cuh"` is replaced by the file, the first time it is met (each header counts as `#pragma once`); so an
    own include must not stand inside `#if`. `#include <...>` stays as it is.
    """
    folders = [kernels_dir()] if folder is None else [folder, kernels_dir()]
    defines = [f"#define {name} {value}" for name, value in kernel.defines]
    return "\n".join([*defines, *_expand(kernel.source, folders, set(), "")]) + "\n"


def _expand(name: str, folders: list[Path], seen: set[str], asked_by: str) -> list[str]:
    """The lines of a file, its own includes expanded, after a `#line` directive that says where they come from."""
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(_read(name, folders, asked_by).splitlines(), start=1):
        include = _OWN_INCLUDE.match(line)
        if include is not None:
            if include[1] not in seen:
                lines += _expand(include[1], folders, seen, f"{name}:{number}: ")
            lines.append(f'#line {number + 1} "{name}"')
        else:
            lines.append("" if _PRAGMA_ONCE.match(line) else line)
    return lines


def _read(name: str, folders: list[Path], asked_by: str) -> str:
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise KernelError(f"{asked_by}no CUDA source '{name}' in {folders[0]}: is the installation complete?")
