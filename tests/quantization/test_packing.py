import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.quantization.packing import codes_per_byte, pack, pack_int4, unpack, unpack_int4
from flatq_cli.quantization.quantizers import code_range

BITS = [2, 3, 4, 5, 6, 8]


def random_codes(bits, symmetric, shape, seed):
    low, high = code_range(bits, symmetric)
    return np.random.default_rng(seed).integers(low, high, size=shape, endpoint=True)


def reference_bytes(codes, bits):
    """Bytes of one row by Python integers: fields of `bits` from the least significant end up."""
    per_byte = {2: 4, 4: 2}.get(bits, 1)
    field = 8 // per_byte
    result = []
    for start in range(0, len(codes), per_byte):
        parts = (int(code) % 2**field << field * i for i, code in enumerate(codes[start : start + per_byte]))
        result.append(sum(parts))
    return result


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
    assert packed.shape == (out, -(-width // codes_per_byte(bits)))
    assert packed.tolist() == [reference_bytes(row, bits) for row in codes]
    assert torch.equal(packed, pack(tensor.float(), bits))  # as the quantizers give them
    unpacked = unpack(packed, bits, width, symmetric)
    assert unpacked.dtype == tensor.dtype
    assert torch.equal(unpacked, tensor)


def test_an_even_index_is_the_low_nibble_in_twos_complement():
    assert pack_int4(torch.tensor([[1, -1, -8, 7, 3]], dtype=torch.int8)).tolist() == [[0xF1, 0x78, 0x03]]
    assert unpack_int4(torch.tensor([[0xF1, 0x78, 0x03]], dtype=torch.uint8), 5, True).tolist() == [[1, -1, -8, 7, 3]]
    assert unpack_int4(torch.tensor([[0xF1]], dtype=torch.uint8), 2, False).tolist() == [[1, 15]]


@pytest.mark.parametrize("bits", [2, 4])
def test_what_is_left_of_the_last_byte_is_zero(bits):
    codes = torch.full((1, codes_per_byte(bits) + 1), -1, dtype=torch.int8)
    assert pack(codes, bits).tolist() == [[255, 2**bits - 1]]


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
