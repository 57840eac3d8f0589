"""Packing of integer codes along `in`, for files and integer kernels.

A row of codes is one string of bits: code j takes the bits j·b to j·b + b - 1, and bit i of the row is bit i mod 8 of
its byte i // 8, the least significant first. So at 4 bits two codes share a byte, the even index in the low nibble; at
2 bits four do; at 3 bits eight codes take three bytes. Symmetric codes are two's complement in their field; what is
left of a row's last byte is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes: ceil(width · bits / 8); ValueError below 2 or above 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    return -(-width * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integral codes `[..., in]`, of any dtype that holds them, to uint8 `[..., packed_width(in, bits)]`."""
    width = codes.shape[-1]
    size = packed_width(width, bits)
    # By way of int16: a cast of negative values straight to uint8 is undefined for floating dtypes.
    fields: Tensor = codes.to(torch.int16) & (2**bits - 1)
    if bits == 8:
        return fields.to(torch.uint8)
    together, whole_bytes = _group(bits)
    fields = functional.pad(fields, (0, -width % together))
    fields = _grouped(fields.to(_word(whole_bytes)), together)
    word = fields[..., 0].clone()
    for position in range(1, together):
        word |= fields[..., position] << (bits * position)
    parts = torch.stack([(word >> (8 * byte)) & 255 for byte in range(whole_bytes)], -1)
    return parts.to(torch.uint8).flatten(-2)[..., :size].contiguous()


def unpack(packed: Tensor, bits: int, width: int, symmetric: bool) -> Tensor:
    """The codes `[..., width]` of `pack`'s result: int8, or uint8 for asymmetric 8-bit codes.

    Raises:
        ValueError: if the rows of `packed` are not as long as `width` codes need.
    """
    size = packed_width(width, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise ValueError(
            f"{width} codes of {bits} bits need uint8 rows of {size}, not {packed.dtype} rows of {packed.shape[-1]}"
        )
    if bits == 8:
        return packed.view(torch.int8) if symmetric else packed
    if bits == 4:
        return _unpack_nibbles(packed, width, symmetric)
    together, whole_bytes = _group(bits)
    parts = _grouped(functional.pad(packed, (0, -size % whole_bytes)).to(_word(whole_bytes)), whole_bytes)
    word = parts[..., 0].clone()
    for byte in range(1, whole_bytes):
        word |= parts[..., byte] << (8 * byte)
    fields = torch.stack([(word >> (bits * position)).to(torch.uint8) for position in range(together)], -1)
    codes = fields.flatten(-2)[..., :width].bitwise_and(2**bits - 1).to(torch.int8)
    return _signed(codes, bits).contiguous() if symmetric else codes.contiguous()


def _group(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and of those bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _grouped(row: Tensor, count: int) -> Tensor:
    return row.reshape(*row.shape[:-1], -1, count)


def _word(whole_bytes: int) -> torch.dtype:
    """An integer with room for so many bytes, its sign left alone."""
    return torch.int32 if whole_bytes < 4 else torch.int64


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Two's complement fields with their sign."""
    sign = 2 ** (bits - 1)
    return codes.bitwise_xor(sign).sub_(sign)


def _unpack_nibbles(packed: Tensor, width: int, symmetric: bool) -> Tensor:
    """`unpack` for 4 bits, in whole passes over words: several times the speed of the general way.

    A byte hl becomes the word 0h0l, whose two bytes in memory, on a little-endian machine as all of torch's are, are
    the codes l and h.
    """
    words = packed.to(torch.int16, memory_format=torch.contiguous_format)
    words = (words | words << 4) & 0x0F0F
    codes = words.view(torch.int8)[..., :width]
    return (_signed(codes, 4) if symmetric else codes).contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte: `[..., in]` to uint8 `[..., ceil(in / 2)]`."""
    return pack(codes, 4)


def unpack_int4(packed: Tensor, width: int, symmetric: bool) -> Tensor:
    """The int8 codes `[..., width]` of `pack_int4`'s result."""
    return unpack(packed, 4, width, symmetric)
