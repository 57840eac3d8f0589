"""The numerics contract of the kernels in torch: quantizing rows, and how codes lie in bytes.

This is the same contract as `flatq_cli.quantization` (a test compares the two bit for bit), written out once more in a
few lines because this package stands alone: it runs from a checkout on a bare GPU machine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes of 4 bits (two a byte) or 8 bits."""
    return (width + 1) // 2 if bits == 4 else width


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integer codes `[..., width]` (any integer dtype) to bytes, uint8 `[..., packed_width]`.

    4 bits: even index in the low nibble, the nibble left over in an odd row is 0; signed codes are two's complement.
    """
    if bits == 8:
        return (codes.to(torch.int16) & 0xFF).to(torch.uint8)
    nibbles = (codes.to(torch.int16) & 0xF).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_codes(packed: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """The int32 codes `[..., width]` of `pack_codes`'s bytes."""
    if bits == 8:
        codes = packed.to(torch.int32)
    else:
        codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :width].to(torch.int32)
    half = 2 ** (bits - 1)
    return (codes ^ half) - half if signed else codes


def quantize_rows(y: Tensor, clip: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row to `bits`-bit codes.

    Args:
        y: `[..., width]`, any float dtype; the maths is in float32 (float64 for float64).
        clip: `[2]`, factors on a row's maximum and minimum.
        bits: 4 or 8.
    Returns:
        codes int32 `[..., width]`; scale `[...]`; zero int32 `[...]` (0 when symmetric). A row with a NaN or an
        infinity has scale NaN; its codes mean nothing.
    Source: docs/method.md, "Quantizers".
    """
    y = y if y.dtype == torch.float64 else y.float()
    clip = clip.to(y.dtype)
    high, low = y.amax(-1).clamp(min=0) * clip[0], y.amin(-1).clamp(max=0) * clip[1]
    reach = torch.maximum(high, -low) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    scale = torch.where(reach == 0, torch.ones_like(reach), reach)
    scale = torch.where(scale.isfinite(), scale, torch.full_like(scale, torch.nan))
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round()
    smallest, greatest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes = ((y / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(smallest, greatest)
    return codes.nan_to_num(0).to(torch.int32), scale, zero.nan_to_num(0).to(torch.int32)
