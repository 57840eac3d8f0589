"""Packing of integer codes into bytes along `in`, for files and integer kernels.

4 bits: two codes a byte, the even index in the low nibble. 2 bits: four codes a byte, index 4k in the lowest two
bits. Every other width (3, 5, 6, 8): one code a byte. Symmetric codes are two's complement in their field; what is
left of a row's last byte is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def codes_per_byte(bits: int) -> int:
    """4 for 2 bits, 2 for 4 bits, else 1; ValueError below 2 or above 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    return {2: 4, 4: 2}.get(bits, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integral codes `[..., in]`, of any dtype that holds them, to uint8 `[..., ceil(in / codes_per_byte)]`."""
    per_byte = codes_per_byte(bits)
    # By way of int16: a cast of negative values straight to uint8 is undefined for floating dtypes.
    fields = (codes.to(torch.int16) & (2**bits - 1 if per_byte > 1 else 255)).to(torch.uint8)
    if per_byte == 1:
        return fields
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % per_byte))
    fields = fields.reshape(*fields.shape[:-1], -1, per_byte)
    packed = fields[..., 0].clone()
    for position in range(1, per_byte):
        packed |= fields[..., position] << (bits * position)
    return packed


def unpack(packed: Tensor, bits: int, width: int, symmetric: bool) -> Tensor:
    """The codes `[..., width]` of `pack`'s result: int8, or uint8 for asymmetric 8-bit codes.

    Raises:
        ValueError: if the rows of `packed` are not as long as `width` codes need.
    """
    per_byte = codes_per_byte(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-width // per_byte):
        need = -(-width // per_byte)
        raise ValueError(
            f"{width} codes of {bits} bits need uint8 rows of {need}, not {packed.dtype} rows of {packed.shape[-1]}"
        )
    if per_byte == 1:
        return packed.view(torch.int8) if symmetric or bits < 8 else packed
    if bits == 4:
        return _unpack_nibbles(packed, width, symmetric)
    shifts = torch.arange(per_byte, device=packed.device, dtype=torch.uint8) * bits
    fields: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes = fields.flatten(-2)[..., :width].to(torch.int8)
    if symmetric:
        sign = 2 ** (bits - 1)
        codes = (codes ^ sign) - sign  # sign extension
    return codes.contiguous()


def _unpack_nibbles(packed: Tensor, width: int, symmetric: bool) -> Tensor:
    """`unpack` for 4 bits, in whole passes over words: several times the speed of the general way.

    A byte hl becomes the word 0h0l, whose two bytes in memory, on a little-endian machine as all of torch's are, are
    the codes l and h.
    """
    words = packed.to(torch.int16, memory_format=torch.contiguous_format)
    words = (words | words << 4) & 0x0F0F
    codes = words.view(torch.int8)[..., :width]
    return ((codes ^ 8) - 8 if symmetric else codes).contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte: `[..., in]` to uint8 `[..., ceil(in / 2)]`."""
    return pack(codes, 4)


def unpack_int4(packed: Tensor, width: int, symmetric: bool) -> Tensor:
    """The int8 codes `[..., width]` of `pack_int4`'s result."""
    return unpack(packed, 4, width, symmetric)
