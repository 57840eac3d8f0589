from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight, round_weight
from flatq_cli.runtime.linear import PackedLinear

LAYOUTS = [(bits, group, symmetric) for bits in (2, 3, 4, 5, 6, 8) for group in (0, 8) for symmetric in (True, False)]


def rounded_linear(
    bits: int, group: int, symmetric: bool, bias: bool = True, width: int = 24
) -> tuple[PackedLinear, nn.Linear]:
    """A packed linear and the plain one with its dequantized weight."""
    generator = torch.Generator().manual_seed(bits)
    rounded = round_weight(torch.randn(10, width, generator=generator), bits, group, symmetric, None)
    plain = nn.Linear(width, 10, bias=bias)
    with torch.no_grad():
        plain.weight.copy_(dequantize_weight(rounded))
    packed = PackedLinear.from_codes(
        rounded[CODES], rounded[SCALE], rounded.get(ZERO), plain.bias if bias else None, bits, symmetric
    )
    return packed, plain


@pytest.mark.parametrize(("bits", "group", "symmetric"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_that_of_the_fake_quant_linear_bit_for_bit(bits, group, symmetric, dtype):
    packed, plain = rounded_linear(bits, group, symmetric)
    x = torch.randn(3, 5, 24).to(dtype)
    assert torch.equal(packed.to(dtype)(x), plain.to(dtype)(x))


@pytest.mark.parametrize(("bits", "bytes_a_row"), [(2, 6), (3, 9), (4, 12), (5, 15), (6, 18), (8, 23)])
def test_weights_stay_packed_in_memory_also_for_odd_widths(bits, bytes_a_row):
    packed, plain = rounded_linear(bits, 0, True, width=23)
    x = torch.randn(2, 23)
    assert torch.equal(packed(x), plain(x))
    assert packed.weight_packed.shape == (10, bytes_a_row)
    assert packed.weight_packed.dtype == torch.uint8
    assert not list(packed.parameters())


def test_codes_come_back():
    rounded = round_weight(torch.randn(6, 16), 4, 8, False, None)
    packed = PackedLinear.from_codes(rounded[CODES], rounded[SCALE], rounded[ZERO], None, 4, False)
    assert torch.equal(packed.codes(), rounded[CODES])
    assert torch.equal(packed.weight_zero, rounded[ZERO])


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_a_cast_changes_no_tensor(cast):
    packed, _ = rounded_linear(4, 8, False)
    before = copy.deepcopy(packed.state_dict())
    after = cast(packed).state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_it_follows_to_another_device():
    packed, _ = rounded_linear(4, 0, True)
    moved = packed.to("meta", torch.bfloat16)
    assert {tensor.device.type for tensor in moved.buffers()} == {"meta"}
    assert moved.weight_scale.dtype == torch.float32


def test_a_state_dict_of_codes_loads_into_an_empty_one():
    packed, _ = rounded_linear(4, 8, False)
    empty = PackedLinear(24, 10, bits=4, group=8, symmetric=False, bias=True, device="meta")
    empty.load_state_dict(packed.state_dict(), assign=True, strict=True)
    x = torch.randn(2, 24)
    assert torch.equal(empty(x), packed(x))


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide a row of 24"):
        PackedLinear(24, 10, bits=4, group=7, symmetric=True, bias=False)


def test_a_zero_point_belongs_to_asymmetric_codes_only():
    codes, scale = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="zero point"):
        PackedLinear.from_codes(codes, scale, None, None, 4, symmetric=False)
