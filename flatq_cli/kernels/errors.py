"""The error of this package: one line that names the kernel or the missing piece, and what to do."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched, or what that needs is not installed."""


def missing_cupy(cuda: str | None) -> KernelError:
    """The error where CuPy is not installed.

    Args:
        cuda: the CUDA version that torch is built for (`torch.version.cuda`), None where it is built without.
    """
    major = "12" if str(cuda).startswith("12") else "13"
    return KernelError(
        f"CUDA kernels need CuPy, which is not installed: pip install cupy-cuda{major}x (or 'flatq[cuda{major}]')"
    )


def missing_nvrtc(reason: str) -> KernelError:
    """The error where CuPy is installed but finds no NVRTC, the run-time compiler of the CUDA toolkit."""
    return KernelError(
        f"CUDA kernels need NVRTC, which CuPy does not find ({reason}): pip install nvidia-cuda-nvrtc (CUDA 12: "
        "nvidia-cuda-nvrtc-cu12), or set CUDA_PATH to a CUDA toolkit"
    )
