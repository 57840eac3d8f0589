"""Where matmuls may be in bf16: on a device that has them in hardware; elsewhere they would be emulated, and slow."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

_BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` gains from it, else float32."""
    if device.type == "cuda" or (device.type == "cpu" and _cpu_has_bf16()):
        return torch.bfloat16
    return torch.float32


def fast_matmuls(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `matmul_dtype`; what is learned and the quantizers' scales stay in float32."""
    if matmul_dtype(device) == torch.bfloat16:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def with_fast_linears(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with the weights of its linears in `matmul_dtype`, in place: under `fast_matmuls` a forward pass gives
    the same bits, and casts no weight again.
    """
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = linear.weight.data.to(matmul_dtype(device))
    return module


def _cpu_has_bf16() -> bool:
    # A dict of CPU features by name, in torch versions that have it.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(feature) for feature in _BF16_FEATURES)
