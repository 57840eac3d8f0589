"""Which versions made an artifact: recorded in every run, compared (and only noted) when it is opened again."""

from __future__ import annotations

import importlib.metadata
import platform

import flatq_cli

PACKAGES = ("torch", "transformers", "safetensors")


def package_versions() -> dict[str, str]:
    """Versions of flatq, Python and the packages that results depend on; those not installed are left out."""
    versions = {"flatq": flatq_cli.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
