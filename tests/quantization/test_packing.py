import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.quantization.packing import pack, pack_int4, packed_width, unpack, unpack_int4
from flatq_cli.quantization.quantizers import code_range

BITS = [2, 3, 4, 5, 6, 8]


def random_codes(bits, symmetric, shape, seed):
    low, high = code_range(bits, symmetric)
    return np.random.default_rng(seed).integers(low, high, size=shape, endpoint=True)


def reference_bytes(codes, bits):
    """Bytes of one row by a Python integer: fields of `bits` from the least significant end up."""
    row = sum((int(code) % 2**bits) << (bits * index) for index, code in enumerate(codes))
    return list(row.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    out=st.integers(1, 4),
    width=st.integers(1, 19),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_packing_is_the_documented_bytes_and_loses_nothing(bits, symmetric, out, width, seed):
    codes = random_codes(bits, symmetric, (out, width), seed)
    wide = bits == 8 and not symmetric
    tensor = torch.from_numpy(codes).to(torch.uint8 if wide else torch.int8)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (out, packed_width(width, bits))
    assert packed.tolist() == [reference_bytes(row, bits) for row in codes]
    assert torch.equal(packed, pack(tensor.float(), bits))  # as the quantizers give them
    unpacked = unpack(packed, bits, width, symmetric)
    assert unpacked.dtype == tensor.dtype
    assert torch.equal(unpacked, tensor)


def test_an_even_index_is_the_low_nibble_in_twos_complement():
    assert pack_int4(torch.tensor([[1, -1, -8, 7, 3]], dtype=torch.int8)).tolist() == [[0xF1, 0x78, 0x03]]
    assert unpack_int4(torch.tensor([[0xF1, 0x78, 0x03]], dtype=torch.uint8), 5, True).tolist() == [[1, -1, -8, 7, 3]]
    assert unpack_int4(torch.tensor([[0xF1]], dtype=torch.uint8), 2, False).tolist() == [[1, 15]]


def test_eight_codes_of_three_bits_take_three_bytes():
    codes = torch.tensor([[0, 1, 2, 3, -4, -3, -2, -1]], dtype=torch.int8)
    packed = pack(codes, 3)
    assert packed.tolist() == [list(0b111_110_101_100_011_010_001_000.to_bytes(3, "little"))]
    assert torch.equal(unpack(packed, 3, 8, True), codes)
    assert unpack(packed, 3, 8, False).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize(("bits", "width", "last"), [(2, 5, 3), (4, 3, 15), (3, 3, 1), (5, 2, 3), (6, 3, 3)])
def test_what_is_left_of_the_last_byte_is_zero(bits, width, last):
    codes = torch.full((1, width), -1, dtype=torch.int8)
    assert pack(codes, bits)[0, -1] == last


@pytest.mark.parametrize(
    "packed", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(2, 4)]
)
def test_rows_of_another_length_or_type_are_refused(packed):
    with pytest.raises(ValueError, match="7 codes of 4 bits need uint8 rows of 4"):
        unpack_int4(packed, 7, True)


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        pack(torch.zeros(1, 2, dtype=torch.int8), bits)
