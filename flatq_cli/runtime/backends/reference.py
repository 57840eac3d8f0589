"""The backend `reference`: pure torch, on any device, in any float dtype. It defines what the others compute.

A linear that reads codes, with one scale a row, multiplies codes by codes and applies the scales to the sum:

    y = cast(((codes of x) · (codes of W)ᵀ · weight scale) · scale of x + bias)

The codes are floats without a fraction, the sums are exact, so that their order means nothing: a matmul of another
size, another library or integer arithmetic gives the same sum, bit for bit, where sums of dequantized numbers differ
in their last digit, some code of the next layer falls to the other side of a tie, and a perplexity at 4 bits moves by
half a per cent (docs/decisions/0011-exact-sums.md). Else (floating-point activations, scales by group) a linear
dequantizes its weight to float32, casts it to the activation's dtype and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flatq_cli.quantization.quantizers import FLOAT_BITS, fake_quantize, quantize
from flatq_cli.runtime.backends.base import Backend, ordinary_tensors
from flatq_cli.runtime.backends.lazy import QuantizedActivation
from flatq_cli.transforms.kronecker import kronecker_matmul

if TYPE_CHECKING:
    from flatq_cli.runtime.linear import PackedLinear
    from flatq_cli.runtime.sites import OnlineSite


EXACT = 2**24
"""Up to here float32 holds every integer."""


class Reference(Backend):
    """Codes as floats, or fake-quantized floats and dequantized weights."""

    name = "reference"

    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """It runs everywhere."""
        return None

    def site(self, site: OnlineSite, x: Tensor) -> Tensor:
        """Transform in x's dtype, then quantize; where packed linears read the result, it is their codes, else it is
        fake-quantized. Differentiable in x and in the site's tensors: with gradients, it is fake-quantized too.
        """
        if site.left is not None or site.right is not None:
            x = kronecker_matmul(x, _cast(site.left, x), _cast(site.right, x))
        if site.bits == FLOAT_BITS:
            return x
        trained = x.requires_grad or (site.clip is not None and site.clip.requires_grad)
        if not site.feeds_packed or (trained and torch.is_grad_enabled()):
            return fake_quantize(x, site.bits, site.symmetric, site.clip)
        codes, scale, zero = quantize(x, site.bits, site.symmetric, site.clip)
        centred = codes if zero is None else codes.sub_(zero)
        return QuantizedActivation(centred, scale, None, x.shape, x.dtype, site.bits, symmetric=site.symmetric)

    def linear(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """Codes by codes, or a plain linear on the dequantized weight."""
        if isinstance(x, QuantizedActivation) and has_whole_rows(linear):
            return code_linear(x, _unpacked(linear, _codes_in, _multiplied_in(x)), linear)
        x = x.values() if isinstance(x, QuantizedActivation) else x
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return functional.linear(x, _unpacked(linear, _weight_in, x.dtype), bias)


def _unpacked(linear: PackedLinear, make: Callable[[PackedLinear, torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """What `make` makes of the weight, kept where the layer says so."""
    if not linear.stays_unpacked:
        return make(linear, dtype)
    with ordinary_tensors():
        return linear.prepared(make, dtype)


def _codes_in(linear: PackedLinear, dtype: torch.dtype) -> Tensor:
    return centred_codes(linear).to(dtype)


def _weight_in(linear: PackedLinear, dtype: torch.dtype) -> Tensor:
    return linear.dequantize().to(dtype)


def _multiplied_in(x: QuantizedActivation) -> torch.dtype:
    """What codes are multiplied in. Sums are float32 at least; of 16 bits, every integer to 256 is a bfloat16."""
    if x.scale.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.device.type == "cuda" and x.dtype.itemsize == 2 else torch.float32


def has_whole_rows(linear: PackedLinear) -> bool:
    """Whether each row of the weight has one scale."""
    return linear.weight_scale.shape[1] == 1


def centred_codes(linear: PackedLinear) -> Tensor:
    """The weight's codes `[out, in]`, less their zero points: integers, or floats without a fraction."""
    codes, zero = linear.codes(), linear.weight_zero
    return codes if zero is None else codes - zero


def code_linear(x: QuantizedActivation, codes: Tensor, linear: PackedLinear) -> Tensor:
    """x Wᵀ + b from the codes of both, `[..., in]` → `[..., out]` in x's dtype.

    Args:
        codes: `centred_codes(linear)` in the dtype to multiply in.
    """
    largest = x.largest * 2 ** (linear.bits - (1 if linear.symmetric else 0))
    sums = exact_product(x.centred().to(codes.dtype), codes, largest)
    y = scaled(sums.mul_(linear.weight_scale.flatten()), x.scale.reshape(-1, 1), linear.bias, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def exact_product(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """a bᵀ of matrices of integers, `[rows, in]` and `[out, in]`; the sum exact, rounded once to the result's dtype.

    Args:
        a, b: float64, and so is the result; or float32, or bfloat16 on a GPU, and the result is float32.
        largest: bound of |a| · |b|.
    """
    if a.dtype == torch.float64:
        return a @ b.mT
    width, whole = a.shape[-1], EXACT // largest
    parts = [slice(start, start + whole) for start in range(0, width, whole)]
    first, *others = (_product(a[:, part], b[:, part]) for part in parts)
    return reduce(torch.add, others, first.double()).float() if others else first


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.mT, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b.mT


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums · scale + bias, rounded to `dtype`: `[rows, out]` by `[rows, 1]`, float32 or float64; may be in place."""
    out = sums if sums.dtype == dtype else torch.empty(sums.shape, dtype=dtype, device=sums.device)
    if bias is None:
        return torch.mul(sums, scale, out=out)
    return torch.addcmul(bias.to(sums.dtype), sums, scale, out=out)


def _cast(matrix: Tensor | None, x: Tensor) -> Tensor | None:
    return None if matrix is None else matrix.to(x.dtype)


REFERENCE = Reference()
