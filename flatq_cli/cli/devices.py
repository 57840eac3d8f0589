"""`--device` to a torch device name."""

from __future__ import annotations

from enum import Enum

from flatq_cli.errors import UsageError


class Device(str, Enum):
    """What `--device` takes; auto is the GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def resolve_device(device: Device) -> str:
    """`cpu` or `cuda`.

    Raises:
        UsageError: cuda was asked for and torch sees none, with what to install.
    """
    if device is Device.cpu:
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device is Device.auto:
        return "cpu"
    if torch.version.cuda is None:
        raise UsageError(
            f"--device cuda: the installed torch {torch.__version__} is built without CUDA; install a CUDA build of "
            "torch (pytorch.org, Get Started, names it for your driver), or use --device cpu"
        )
    raise UsageError(
        f"--device cuda: torch {torch.__version__} sees no GPU; install or update the NVIDIA driver (`nvidia-smi` must "
        "list the GPU) and check CUDA_VISIBLE_DEVICES, or use --device cpu"
    )
