"""Quantizers: the numerics contract in one file (docs/method.md, "Quantizers").

A group is the last axis of a tensor: a token's channels, a weight's row, a head's vector. Each group has one scale
(and one zero point when asymmetric), from its own maximum and minimum times clip factors in (0, 1]. `quantize` gives
codes, `fake_quantize` gives `dequantize(quantize(x))` bit for bit and carries gradients: rounding passes them on
unchanged (straight-through), clamping stops them, and the scale is differentiated exactly, down to the clip factors
and to the maximum it came from.

A NaN or an infinity in a group makes the group NaN (codes as well, which are floating-point here): it stays visible.
Maths is in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

FLOAT_BITS = 16  # "16 bits" means: not quantized


class Codes(NamedTuple):
    """Integral values in a floating dtype (the caller casts), their scales, their zero points (None when symmetric)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the greatest code; ValueError below 2 or above 8 bits."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_symmetric(x: Tensor, bits: int, clip_max: Tensor | float = 1.0, clip_min: Tensor | float = 1.0) -> Tensor:
    """The scale of the last axis, `[..., 1]`: max(c_max·max(x, 0), -c_min·min(x, 0)) / (2^(b-1) - 1), 1 for 0."""
    x = _working(x)
    return _scale_symmetric(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), clip_max, clip_min, bits)


def quantize(x: Tensor, bits: int, symmetric: bool, clip: Tensor | None = None) -> Codes:
    """Round to the nearest code, ties to even.

    Args:
        x: `[..., group]`, any float dtype.
        bits: 2 to 8.
        clip: `[..., 2]`, broadcastable to x's leading axes: factors on the maximum and on the minimum; None is 1.
    Returns:
        codes like x, scale and zero `[..., 1]`; float32 (float64 for float64).
    """
    low, high = code_range(bits, symmetric)
    x = _working(x)
    scale, zero = _scale_and_zero(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), clip, bits, symmetric)
    codes = (x / scale).round_()
    if zero is not None:
        codes = codes.add_(zero)
    return Codes(codes.clamp_(low, high), scale, zero)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(codes - zero) · scale in scale's dtype; codes `[..., group]` of any dtype, scale and zero `[..., 1]`."""
    codes = codes.to(scale.dtype)
    return (codes if zero is None else codes - zero.to(scale.dtype)) * scale


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: Tensor | None = None) -> Tensor:
    """`dequantize(*quantize(x, ...))` in x's dtype, differentiable in x and clip; 16 bits returns x itself.

    Where several entries share a group's maximum or minimum, the first of them takes the scale's gradient.
    """
    if bits == FLOAT_BITS:
        return x
    if torch.is_grad_enabled() and (x.requires_grad or (clip is not None and clip.requires_grad)):
        result: Tensor = _FakeQuantize.apply(x, clip, bits, symmetric)  # type: ignore[no-untyped-call]
        return result
    codes, scale, zero = quantize(x, bits, symmetric, clip)
    if zero is not None:
        codes = codes.sub_(zero)
    return codes.mul_(scale).to(x.dtype)


def fake_quantize_with(x: Tensor, factors: Tensor, bits: int, symmetric: bool) -> Tensor:
    """`fake_quantize` with each of several clips at once, without gradients.

    Args:
        x: `[..., group]`. factors: `[k, ...]`, x's leading axes after the first: on maximum and minimum alike.
    Returns:
        `[k, ..., group]`, float32 (float64 for float64).
    """
    low, high = code_range(bits, symmetric)
    x = _working(x)
    clip = factors.unsqueeze(-1).expand(*factors.shape, 2)
    scale, zero = _scale_and_zero(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), clip, bits, symmetric)
    codes = (x / scale).round_()
    if zero is None:
        return codes.clamp_(low, high).mul_(scale)
    return codes.add_(zero).clamp_(low, high).sub_(zero).mul_(scale)


def quantize_grouped(w: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None = None) -> Codes:
    """Quantize a weight `[out, in]` in groups of `group` along `in` (0: the whole row).

    Args:
        clip: `[out, groups, 2]` or None.
    Returns:
        codes `[out, in]`, scale and zero `[out, groups]`.
    Raises:
        ValueError: if `group` does not divide `in`.
    """
    codes, scale, zero = quantize(_grouped(w, group), bits, symmetric, clip)
    return Codes(codes.reshape(w.shape), scale.squeeze(-1), None if zero is None else zero.squeeze(-1))


def dequantize_grouped(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The weight `[out, in]` of codes `[out, in]`, scale and zero `[out, groups]`; in scale's dtype."""
    grouped = codes.reshape(*scale.shape, -1)
    return dequantize(grouped, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)).reshape(codes.shape)


def fake_quantize_grouped(w: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None = None) -> Tensor:
    """`fake_quantize` of a weight `[out, in]` in groups along `in`; clip `[out, groups, 2]` or None."""
    if bits == FLOAT_BITS:
        return w
    return fake_quantize(_grouped(w, group), bits, symmetric, clip).reshape(w.shape)


def _grouped(w: Tensor, group: int) -> Tensor:
    """`[out, in]` as `[out, groups, group]`."""
    width = w.shape[-1]
    if group and width % group:
        raise ValueError(f"a group of {group} weights does not divide a row of {width}")
    return w.reshape(*w.shape[:-1], -1, group or width)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale_symmetric(
    high: Tensor, low: Tensor, clip_max: Tensor | float, clip_min: Tensor | float, bits: int
) -> Tensor:
    reach = torch.maximum(high.clamp(min=0) * clip_max, -(low.clamp(max=0) * clip_min))
    return _nonzero(reach / (2 ** (bits - 1) - 1))


def _scale_and_zero(
    high: Tensor, low: Tensor, clip: Tensor | None, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the greatest and least entry of each group, `[..., 1]`; differentiable."""
    if clip is not None:
        clip = clip.to(high.dtype)
        clip_max, clip_min = clip[..., :1], clip[..., 1:]
        high, low = high.clamp(min=0) * clip_max, low.clamp(max=0) * clip_min
    if symmetric:
        return _scale_symmetric(high, low, 1.0, 1.0, bits), None
    high, low = high.clamp(min=0), low.clamp(max=0)
    scale = _nonzero((high - low) / (2**bits - 1))
    return scale, _round_straight_through(-low / scale)


def _nonzero(scale: Tensor) -> Tensor:
    """1 where a group is 0, or so small that its scale is."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _round_straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its gradient written out: a third of the time of the composed operations in training.

    With u = x/s, q = clamp(round(u) + z), y = (q - z)·s and m = [round(u) + z is in range]:
    ∂y/∂x = m, ∂y/∂s = q - z - m·u, ∂y/∂z = (m - 1)·s. The small tensors (s, z from maximum, minimum and clip) go
    through autograd.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, clip: Tensor | None, bits: int, symmetric: bool) -> Tensor:
        low, high = code_range(bits, symmetric)
        working = _working(x)
        top, at_top = working.max(-1, keepdim=True)
        bottom, at_bottom = working.min(-1, keepdim=True)
        scale, zero = _scale_and_zero(top, bottom, clip, bits, symmetric)
        ctx.save_for_backward(x, clip, top, at_top, bottom, at_bottom)  # type: ignore[arg-type]
        ctx.bits, ctx.symmetric = bits, symmetric  # type: ignore[attr-defined]
        y = (working / scale).round_()
        y = y.clamp_(low, high) if zero is None else y.add_(zero).clamp_(low, high).sub_(zero)
        return y.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, clip, top, at_top, bottom, at_bottom = ctx.saved_tensors  # type: ignore[attr-defined]
        bits, symmetric = ctx.bits, ctx.symmetric  # type: ignore[attr-defined]
        low, high = code_range(bits, symmetric)
        top, bottom = top.detach().requires_grad_(), bottom.detach().requires_grad_()
        clip = None if clip is None else clip.detach().requires_grad_()
        with torch.enable_grad():
            scale, zero = _scale_and_zero(top, bottom, clip, bits, symmetric)
        outputs = [scale] if zero is None else [scale, zero]
        s, z = scale.detach(), None if zero is None else zero.detach()

        grad = _working(grad)
        u = _working(x) / s
        q = u.round()
        if z is not None:
            q.add_(z)
        # Zero outside (low - ½, high + ½), in one pass; q is integral here, so this is [low, high].
        grad_x = torch.ops.aten.hardtanh_backward(grad, q, low - 0.5, high + 0.5)
        q.clamp_(low, high)
        if z is not None:
            q.sub_(z)
        grad_s = q.mul_(grad).addcmul_(grad_x, u, value=-1).sum(-1, keepdim=True)
        grad_outputs = [grad_s]
        if z is not None:
            grad_outputs.append((grad_x - grad).sum(-1, keepdim=True).mul_(s))
        leaves = [top, bottom] if clip is None else [top, bottom, clip]
        small = torch.autograd.grad(outputs, leaves, grad_outputs)
        grad_x.scatter_add_(-1, at_top, small[0]).scatter_add_(-1, at_bottom, small[1])
        return grad_x.to(x.dtype), small[2] if clip is not None else None, None, None
