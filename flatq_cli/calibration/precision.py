"""Where matmuls may be in bf16: on a device that has them in hardware; elsewhere they would be emulated, and slow."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def fast_matmuls(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where `device` gains from it; what is learned and the quantizers' scales stay in float32."""
    if device.type == "cuda" or (device.type == "cpu" and _cpu_has_bf16()):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _cpu_has_bf16() -> bool:
    # A dict of CPU features by name, in torch versions that have it.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(feature) for feature in _BF16_FEATURES)
