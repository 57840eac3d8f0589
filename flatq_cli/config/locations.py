"""Where flatq's own data files are: beside the package in a checkout, inside it once installed from a wheel."""

from __future__ import annotations

from pathlib import Path

# The kernels' package must find its sources without the rest of flatq, so it is the one that knows where they are.
from flatq_cli.kernels.sources import kernels_dir as kernels_dir

PACKAGE = Path(__file__).resolve().parent.parent


def configs_dir() -> Path:
    """The folder with `gates/`, `models/`, `recipes/`, `tasks/`: the packaged copy, or else the checkout's."""
    packaged = PACKAGE / "_configs"  # pyproject: force-include
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def cache_dir() -> Path:
    """flatq's folder in the user's cache: `$FLATQ_CACHE_DIR`, by default `~/.cache/flatq`."""
    from flatq_cli.kernels.compiler import cache_dir as compiled_kernels

    return compiled_kernels().parent
