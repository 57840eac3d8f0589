import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flatq_cli.quantization.quantizers import (
    code_range,
    dequantize,
    dequantize_grouped,
    fake_quantize,
    fake_quantize_grouped,
    fake_quantize_with,
    quantize,
    quantize_grouped,
    scale_symmetric,
)

BITS = [2, 3, 4, 5, 6, 8]
quick = settings(deadline=None, max_examples=60)
bits_and_symmetry = {"bits": st.sampled_from(BITS), "symmetric": st.booleans()}


def rows(dtype):
    """Rows of floats, with zeros, ties, subnormal numbers and wide ranges."""
    width = np.dtype(dtype).itemsize * 8
    return hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6),
        elements=st.one_of(st.integers(-9, 9).map(float), st.floats(-(2.0**90), 2.0**90, width=width)),
    )


def reference(x, bits, symmetric, c_max=1.0, c_min=1.0):
    """The numerics contract in numpy, in x's own dtype: codes, scale, zero, value."""
    one = x.dtype.type
    high = np.maximum(x.max(-1, keepdims=True), one(0)) * one(c_max)
    low = np.minimum(x.min(-1, keepdims=True), one(0)) * one(c_min)
    if symmetric:
        scale = np.maximum(high, np.abs(low)) / one(2 ** (bits - 1) - 1)
        least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        scale = (high - low) / one(2**bits - 1)
        least, greatest = 0, 2**bits - 1
    scale = np.where(scale == 0, one(1), scale)
    zero = np.zeros_like(scale) if symmetric else np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, least, greatest)
    return codes, scale, zero, (codes - zero) * scale


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data(), c_max=st.floats(0.0625, 1, width=32), c_min=st.floats(0.0625, 1, width=32), **bits_and_symmetry)
@quick
def test_codes_scales_and_values_follow_the_contract_to_the_bit(dtype, data, bits, symmetric, c_max, c_min):
    x = data.draw(rows(dtype))
    expected = reference(x, bits, symmetric, c_max, c_min)
    clip = torch.tensor([c_max, c_min])
    codes, scale, zero = quantize(torch.from_numpy(x), bits, symmetric, clip)
    np.testing.assert_array_equal(codes.numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])
    assert (zero is None) == symmetric
    if zero is not None:
        np.testing.assert_array_equal(zero.numpy(), expected[2])
    for value in (dequantize(codes, scale, zero), fake_quantize(torch.from_numpy(x), bits, symmetric, clip)):
        np.testing.assert_array_equal(value.numpy(), expected[3])


@given(x=rows(np.float32), **bits_and_symmetry)
@quick
def test_codes_are_integers_in_range(x, bits, symmetric):
    codes = quantize(torch.from_numpy(x), bits, symmetric).codes
    low, high = code_range(bits, symmetric)
    assert torch.equal(codes, codes.round())
    assert low <= codes.min() <= codes.max() <= high


@given(x=hnp.arrays(np.float64, (3, 7), elements=st.floats(-100, 100)), **bits_and_symmetry)
@quick
def test_without_clipping_the_error_is_at_most_half_a_step(x, bits, symmetric):
    x = torch.from_numpy(x)
    scale = quantize(x, bits, symmetric).scale
    # The rounded zero point shifts an asymmetric range by up to half a step, which may clip its end by as much.
    steps = 0.5 if symmetric else 1.0
    assert ((fake_quantize(x, bits, symmetric) - x).abs() <= steps * scale * (1 + 1e-9)).all()


@given(x=rows(np.float32), **bits_and_symmetry)
@quick
def test_the_training_path_gives_the_same_values_to_the_bit(x, bits, symmetric):
    x, clip = torch.from_numpy(x), torch.tensor([0.75, 0.9])
    trained = fake_quantize(x.clone().requires_grad_(), bits, symmetric, clip)
    assert torch.equal(trained.detach(), fake_quantize(x, bits, symmetric, clip))


@given(x=rows(np.float32), **bits_and_symmetry)
@quick
def test_several_clips_at_once_give_what_each_gives_alone(x, bits, symmetric):
    tensor = torch.tensor(x)
    factors = torch.linspace(0.5, 1.0, 3)[(...,) + (None,) * (tensor.dim() - 1)].expand(3, *tensor.shape[:-1])
    together = fake_quantize_with(tensor, factors, bits, symmetric)
    for factor, found in zip(factors, together, strict=True):
        clip = torch.stack([factor, factor], -1)
        assert torch.equal(found, fake_quantize(tensor, bits, symmetric, clip))


def test_ties_round_to_even():
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(x, 4, True).codes.tolist() == [7, 0, 2, 2, 0, -2]


def test_a_clipped_symmetric_row_uses_the_extra_negative_code():
    assert quantize(torch.tensor([-10.0, 3.5]), 4, True, torch.tensor([1.0, 0.7])).codes.tolist() == [-8, 4]


def test_the_symmetric_range_is_the_larger_of_both_clipped_sides():
    x = torch.tensor([[6.0, -8.0]])
    assert scale_symmetric(x, 4, 1.0, 0.5).item() == pytest.approx(6 / 7)
    assert scale_symmetric(x, 4, 0.5, 1.0).item() == pytest.approx(8 / 7)
    assert scale_symmetric(x, 4).item() == pytest.approx(8 / 7)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero_with_scale_one(symmetric):
    codes, scale, zero = quantize(torch.zeros(2, 5), 4, symmetric)
    assert torch.equal(scale, torch.ones(2, 1))
    assert not dequantize(codes, scale, zero).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_row_and_no_other(symmetric, bad):
    x = torch.ones(2, 4)
    x[0, 1] = bad
    result = fake_quantize(x, 4, symmetric)
    assert result[0].isnan().any()
    assert torch.equal(result[1], torch.ones(4))


def test_sixteen_bits_leaves_a_tensor_as_it_is():
    x = torch.randn(3, 4)
    assert fake_quantize(x, 16, True) is x
    assert fake_quantize_grouped(x, 16, 0, True) is x


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_codes_of_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        quantize(torch.ones(2), bits, True)


@pytest.mark.parametrize("grad", [True, False])
def test_half_precision_is_quantized_in_float32_and_returned_in_its_own_dtype(grad):
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = fake_quantize(x.clone().requires_grad_(grad), 4, True)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, fake_quantize(x.float(), 4, True).bfloat16())
    if grad:
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, 4, True).sum().backward()
        assert leaf.grad.dtype == torch.bfloat16


class Straight(torch.autograd.Function):
    """Rounding whose gradient is the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def composed(x, bits, symmetric, clip):
    """The contract once more, from differentiable operations alone."""
    high, low = x.max(-1, keepdim=True).values.clamp(min=0), x.min(-1, keepdim=True).values.clamp(max=0)
    high, low = clip[..., 0:1] * high, clip[..., 1:2] * low
    if symmetric:
        scale = torch.max(high, low.abs()) / (2 ** (bits - 1) - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        return Straight.apply(x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = Straight.apply(-low / scale)
    return ((Straight.apply(x / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


CLIP_SHAPES = [(2,), (5, 2), (3, 1, 2), (3, 5, 2)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip_shape", CLIP_SHAPES)
@pytest.mark.parametrize("shift", [0.0, 1.5, -9.0])  # rows of both signs, mostly positive, all negative
def test_gradients_equal_those_of_the_composed_definition(symmetric, bits, clip_shape, shift):
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 5, 17, generator=g).double() + shift
    x[1, 2] = 0
    clip = 0.5 + 0.5 * torch.rand(clip_shape, generator=g).double()
    upstream = torch.randn(3, 5, 17, generator=g).double()
    gradients = []
    for function in (fake_quantize, composed):
        leaves = x.clone().requires_grad_(), clip.clone().requires_grad_()
        result = function(leaves[0], bits, symmetric, leaves[1])
        gradients.append((result.detach(), *torch.autograd.grad(result, leaves, upstream)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_clip_is_the_slope_of_a_clamped_value():
    x = torch.tensor([[8.0, -4.0, 3.1, 0.9, 7.9]]).double()
    clip = torch.tensor([0.62, 0.93]).double().requires_grad_()

    def end_of_range(clip):
        return fake_quantize(x, 4, True, clip)[0, 0]

    (gradient,) = torch.autograd.grad(end_of_range(clip), clip)
    step = torch.tensor([1e-6, 0.0]).double()
    slope = (end_of_range(clip.detach() + step) - end_of_range(clip.detach() - step)) / 2e-6
    assert gradient[0].item() == pytest.approx(slope.item())
    assert gradient[1] == 0  # the negative side does not set this row's range


def test_only_what_needs_a_gradient_gets_one():
    x, clip = torch.randn(4, 6), torch.full((2,), 0.9)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, 4, False, clip).sum().backward()
    assert leaf.grad is not None
    assert clip.grad is None
    factors = clip.clone().requires_grad_()
    fake_quantize(x, 4, True, factors).square().sum().backward()
    assert factors.grad.abs().sum() > 0
    with torch.no_grad():
        assert not fake_quantize(leaf, 4, True, factors).requires_grad


def test_gradients_flow_through_functional_call():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, 8))
            self.clip = torch.nn.Parameter(torch.ones(3, 1, 2))

        def forward(self, x):
            return x @ fake_quantize_grouped(self.weight, 4, 0, True, self.clip).T

    free = {"weight": torch.randn(3, 8).requires_grad_(), "clip": torch.full((3, 1, 2), 3.0).requires_grad_()}
    inputs = {"weight": free["weight"] * 2, "clip": torch.sigmoid(free["clip"])}
    torch.func.functional_call(Layer(), inputs, (torch.randn(5, 8),)).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in free.values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 1, 4, 12])
def test_a_grouped_weight_is_quantized_group_by_group(symmetric, group):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(5, 12, generator=g)
    size = group or 12
    clip = 0.6 + 0.4 * torch.rand(5, 12 // size, 2, generator=g)
    codes, scale, zero = quantize_grouped(w, 4, group, symmetric, clip)
    assert codes.shape == w.shape
    assert scale.shape == (5, 12 // size)
    assert zero is None if symmetric else zero.shape == scale.shape
    for row in range(5):
        for index in range(12 // size):
            part = slice(index * size, (index + 1) * size)
            expected = reference(w[row, part].numpy(), 4, symmetric, *clip[row, index].numpy())
            np.testing.assert_array_equal(codes[row, part].numpy(), expected[0])
            assert scale[row, index] == expected[1].item()
    values = dequantize_grouped(codes, scale, zero)
    assert torch.equal(values, fake_quantize_grouped(w, 4, group, symmetric, clip))
    # The dtypes that files hold give the same values.
    stored = dequantize_grouped(codes.to(torch.int8), scale, None if zero is None else zero.int())
    assert torch.equal(values, stored)


def test_a_group_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="group of 5 weights does not divide a row of 12"):
        quantize_grouped(torch.ones(2, 12), 4, 5, True)
