"""Quantized weights as they are stored: integer codes, scales, and zero points where the codes are asymmetric.

A quantized weight is a small dict of tensors by the names that artifacts use: `weight_codes` int8 [out, in] (uint8
for asymmetric 8-bit codes), `weight_scale` float32 [out, groups], `weight_zero` int32 [out, groups].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flatq_cli.quantization.quantizers import dequantize_grouped, quantize_grouped

CODES, SCALE, ZERO = "weight_codes", "weight_scale", "weight_zero"


def round_weight(weight: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None) -> dict[str, Tensor]:
    """Round a weight to the nearest codes.

    Args:
        weight: float32 [out, in].
        group: inputs that share a scale; 0 for one scale a row.
        clip: [out, groups, 2], factors of max and min; None for no clipping.
    """
    codes, scale, zero = quantize_grouped(weight, bits, group, symmetric, clip)
    rounded = {CODES: codes.to(code_dtype(bits, symmetric)), SCALE: scale.float()}
    return rounded if zero is None else {**rounded, ZERO: zero.to(torch.int32)}


def code_dtype(bits: int, symmetric: bool) -> torch.dtype:
    """dtype that holds a code: int8, or uint8 where asymmetric codes reach 255."""
    return torch.uint8 if bits == 8 and not symmetric else torch.int8


def dequantize_weight(quantized: Mapping[str, Tensor]) -> Tensor:
    """float32 [out, in]: scale · (codes − zero), group by group."""
    return dequantize_grouped(quantized[CODES], quantized[SCALE], quantized.get(ZERO))


def groups_of(width: int, group: int) -> int:
    """How many scales a row of `width` weights has."""
    return width // group if group else 1
