"""The backend `reference`: pure torch, on any device, in any float dtype. It defines what the others compute.

A site fake-quantizes; a linear dequantizes its weight to float32, casts it to the activation's dtype and multiplies,
so that a packed model gives what the fake-quant model gives, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flatq_cli.quantization.quantizers import FLOAT_BITS, fake_quantize
from flatq_cli.runtime.backends.base import Backend
from flatq_cli.transforms.kronecker import kronecker_matmul

if TYPE_CHECKING:
    from flatq_cli.runtime.linear import PackedLinear
    from flatq_cli.runtime.sites import OnlineSite


class Reference(Backend):
    """Fake-quantized floats and dequantized weights."""

    name = "reference"

    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """It runs everywhere."""
        return None

    def site(self, site: OnlineSite, x: Tensor) -> Tensor:
        """Transform in x's dtype, then fake-quantize; differentiable in x and in the site's tensors."""
        if site.left is not None or site.right is not None:
            x = kronecker_matmul(x, _cast(site.left, x), _cast(site.right, x))
        return fake_quantize(x, site.bits, site.symmetric, site.clip) if site.bits < FLOAT_BITS else x

    def linear(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """A plain linear on the dequantized weight."""
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return functional.linear(x, linear.dequantize().to(x.dtype), bias)


def _cast(matrix: Tensor | None, x: Tensor) -> Tensor | None:
    return None if matrix is None else matrix.to(x.dtype)


REFERENCE = Reference()
