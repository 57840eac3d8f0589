"""What `flatq doctor` looks at: versions, GPU, disk, memory, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from flatq_cli import __version__

REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "huggingface_hub",
    "tokenizers",
    "gguf",
    "datasets",
    "lm-eval",
)
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def examine() -> dict[str, Any]:
    """Versions, the machine, and `missing`: one line for each thing to install, empty where all is there."""
    versions = {name: _version(name) for name in REQUIRED}
    cupy = next((f"{name} {found}" for name in CUPY if (found := _version(name))), None)
    gpu = _gpu() if versions["torch"] else {"gpus": [], "archs": [], "torch_cuda": None}
    cache = _hub_cache()
    memory = psutil.virtual_memory()
    return {
        "flatq": __version__,
        "python": platform.python_version(),
        **versions,
        "cupy": cupy,
        **gpu,
        "kernels": _kernels(gpu),
        "backends": _backends() if versions["torch"] else {},
        "cpus": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "here": str(Path.cwd()),
        "here_free_bytes": _free(Path.cwd()),
        "hub_cache": str(cache),
        "hub_cache_free_bytes": _free(cache),
        "missing": _missing(versions, cupy, gpu),
    }


def _missing(versions: dict[str, str | None], cupy: str | None, gpu: dict[str, Any]) -> list[str]:
    lines = [f"{name}: pip install {name}" for name, version in versions.items() if version is None]
    if gpu["gpus"] and cupy is None:
        extra = "cuda13" if str(gpu["torch_cuda"]).startswith("13") else "cuda12"
        lines.append(f"CuPy, for the CUDA kernels: pip install 'flatq[{extra}]'")
    if not gpu["gpus"]:
        why = "torch is built without CUDA" if gpu["torch_cuda"] is None else "torch sees no NVIDIA GPU"
        lines.append(f"a GPU ({why}): flatq works on the CPU; for a GPU install its driver and a CUDA build of torch")
    return lines


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    gpus = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in properties]
    archs = [gpu.major * 10 + gpu.minor for gpu in properties]
    return {"gpus": gpus, "archs": archs, "torch_cuda": torch.version.cuda}


def _kernels(gpu: dict[str, Any]) -> str:
    """Whether the CUDA kernels can be compiled, and run, here."""
    from flatq_cli.kernels.compiler import code_arch, load_nvrtc, supported_archs
    from flatq_cli.kernels.errors import KernelError

    try:
        version = ".".join(map(str, load_nvrtc().getVersion()))
        if not gpu["gpus"]:
            return f"compile (NVRTC {version}), but run as torch code on the CPU: no GPU"
        for arch in gpu["archs"]:
            code_arch(arch, supported_archs())
    except KernelError as error:
        return f"no: {error}"
    return f"yes (NVRTC {version})"


def _backends() -> dict[str, str]:
    """What can run a packed model here, and why the rest cannot."""
    from flatq_cli.runtime.backends import available

    return {name: "yes" if reason is None else f"no: {reason}" for name, reason in available().items()}


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def _free(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
