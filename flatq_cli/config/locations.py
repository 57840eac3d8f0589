"""Where flatq's own data files are: beside the package in a checkout, inside it once installed from a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def configs_dir() -> Path:
    """The folder with `models/`, `recipes/` and `tasks/`."""
    return _data_dir("configs")


def kernels_dir() -> Path:
    """The folder with the CUDA sources."""
    return _data_dir("kernels_cuda")


def _data_dir(name: str) -> Path:
    """The packaged copy (pyproject: force-include) where there is one, else the checkout's folder."""
    packaged = PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name
