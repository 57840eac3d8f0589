"""The backend `cuda`: flatq's own kernels (`flatq_cli.kernels`) on an NVIDIA GPU.

    site        kron_quant: transform, clip, round and pack in one launch, with what stands before it (`attach`): the
                norm, or SiLU(gate) · up
    linear      w4a4_gemm or w4a8_gemm: integers by packed integers, nothing is unpacked
    store       kv_quant_: keys and values transformed, rounded and written into the packed cache in one launch
    attend      kv_attention: a few queries read the packed cache directly

What no kernel is for (weights that are not symmetric 4-bit codes, activations left in floating point, a site without
a matrix or with one that is too large, long prompts' attention) is computed as `reference` does, on the GPU.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from flatq_cli.kernels.gemm import w4a4_gemm, w4a8_gemm
from flatq_cli.kernels.kron_quant import GREATEST_FACTOR, KronMatrices, kron_quant, prepare_kron
from flatq_cli.kernels.kv_attention import MAX_QUERY, kv_attention
from flatq_cli.kernels.kv_quant import HALF_NAMES, kv_quant_
from flatq_cli.runtime.backends.base import Backend
from flatq_cli.runtime.backends.lazy import GatedActivation, LazyTensor, QuantizedActivation, Silu
from flatq_cli.runtime.backends.reference import REFERENCE

if TYPE_CHECKING:
    from flatq_cli.runtime.kv_cache import PackedStates
    from flatq_cli.runtime.linear import PackedLinear
    from flatq_cli.runtime.sites import OnlineSite

ACTIVATION_BITS = (4, 8)
WEIGHT_BITS = 4
CACHE_BITS = (4, 8)
GREATEST_HEAD = 256
SILU = (nn.SiLU, SiLUActivation)


class Cuda(Backend):
    """int4 and int8 tensor cores."""

    name = "cuda"

    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """It needs a GPU, CuPy to compile and launch kernels, and a model on that GPU in 16 bits."""
        if device is not None and device.type != "cuda":
            return f"the model is on {device}, not on a GPU"
        if dtype is not None and dtype not in HALF_NAMES:
            return f"its kernels compute in float16 or bfloat16, not in {dtype}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if importlib.util.find_spec("cupy") is None:
            return "CuPy is not installed, which compiles and launches the kernels: pip install cupy-cuda13x"
        return None

    def site(self, site: OnlineSite, x: Tensor) -> Tensor:
        """Packed codes from one launch."""
        if isinstance(x, QuantizedActivation):
            return x  # of a fused norm
        if not _fits(site, x):
            return REFERENCE.site(site, x.values() if isinstance(x, LazyTensor) else x)
        if isinstance(x, GatedActivation):
            return _quantized(site, x.up, gate=x.gate)
        return _quantized(site, x.values() if isinstance(x, LazyTensor) else x)

    def attach(self, model: nn.Module) -> None:
        """Let norms whose output passes a site give that site's codes themselves, and gates wait for their site."""
        for norm, site in _norms_with_sites(model):
            norm.__dict__["forward"] = _FusedNorm(norm, site)
        for silu in _gates_of_sites(model):
            silu.__dict__["forward"] = Silu

    def detach(self, model: nn.Module) -> None:
        """Give norms and gates their own forward back."""
        for module in (*(norm for norm, _ in _norms_with_sites(model)), *_gates_of_sites(model)):
            module.__dict__.pop("forward", None)

    def linear(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """Integers by packed integers."""
        if not isinstance(x, QuantizedActivation) or linear.bits != WEIGHT_BITS or linear.weight_zero is not None:
            return REFERENCE.linear(linear, x)
        if x.codes.dtype != torch.uint8:
            return REFERENCE.linear(linear, x)  # of a site without a kernel
        gemm = w4a4_gemm if x.bits == 4 else w4a8_gemm
        scale = linear.weight_scale
        grouped = scale.shape[1] > 1
        return gemm(
            (x.codes, x.scale, x.zero),
            linear.weight_packed,
            scale if grouped else scale[:, 0],
            in_features=linear.in_features,
            weight_sum=linear.prepared(_row_sums) if x.zero is not None and not grouped else None,
            bias=linear.bias,
            dtype=x.dtype,
        )

    def store(self, site: OnlineSite, x: Tensor, parts: Sequence[Tensor], row: int) -> bool:
        """Rows into the cache by one launch; 4 and 8 asymmetric bits."""
        return self.store_at(site, x, parts, _each(x.shape[0], row, x.device))

    def store_at(self, site: OnlineSite, x: Tensor, parts: Sequence[Tensor], start: Tensor) -> bool:
        """The same: the kernel reads the row on the device in any case."""
        head_dim = x.shape[-1]
        fits = site.bits in CACHE_BITS and not site.symmetric and x.dtype in HALF_NAMES
        if not fits or head_dim % 2 or head_dim > GREATEST_HEAD:
            return False
        matrix = None if site.right is None else site.prepared(_heads_matrix, x.dtype)
        codes, scale, zero = parts
        kv_quant_(x, matrix, _clip(site, x.device), codes, scale, zero, start)
        return True

    def attend(
        self, query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """A few queries over the packed cache."""
        batch, _, tokens, head_dim = query.shape
        fits = keys.bits in CACHE_BITS and values.bits == keys.bits and query.dtype in HALF_NAMES
        if not fits or tokens > MAX_QUERY or head_dim % 2 or head_dim > GREATEST_HEAD:
            return None
        if keys.zero is None or values.zero is None or (keys.start, keys.end) != (values.start, values.end):
            return None
        shown = None
        if mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
                return None
            shown = _by_row(mask, keys.start).expand(batch, -1, -1)
        return kv_attention(
            query,
            *(keys.codes, keys.scale, keys.zero),
            *(values.codes, values.scale, values.zero),
            _each(batch, keys.end, query.device) if keys.lengths is None else keys.lengths,
            softmax_scale=1 / math.sqrt(head_dim) if scaling is None else scaling,
            first=_each(batch, keys.start, query.device) if keys.start else None,
            mask=shown,
        )


def _each(batch: int, number: int, device: torch.device) -> Tensor:
    """The same number for each sequence, int32 `[batch]`."""
    return torch.full((batch,), number, dtype=torch.int32, device=device)


def _by_row(mask: Tensor, start: int) -> Tensor:
    """sdpa's mask over the keys from row `start` of a cache on, as one over all rows: `[batch or 1, tokens, rows]`.

    Nobody looks into it: that would wait for the GPU, and no graph can choose by what it finds.
    """
    return functional.pad(mask[:, 0], (start, 0)) if start else mask[:, 0]


class _FusedNorm:
    """Forward of an RMS norm and of the site behind it: x · rsqrt(mean(x²) + ε) · weight, transformed and rounded, in
    one launch. The product is rounded to 16 bits once, where the stock norm rounds it twice.
    """

    def __init__(self, norm: Any, site: OnlineSite) -> None:
        self.norm, self.site = norm, site

    def __call__(self, x: Tensor) -> Tensor:
        norm, site = self.norm, self.site
        if not _fits(site, x) or norm.weight.dtype != x.dtype:
            output: Tensor = type(norm).forward(norm, x)
            return output
        return _quantized(site, x, norm_weight=norm.weight, norm_eps=norm.variance_epsilon)


def _quantized(site: OnlineSite, x: Tensor, **in_front: Any) -> QuantizedActivation:
    """`x`, or what `kron_quant` makes of it `in_front`, through `site`."""
    matrices, clip = site.prepared(_kron_matrices, x.dtype), _clip(site, x.device)
    result = kron_quant(x, matrices, clip, bits=site.bits, symmetric=site.symmetric, **in_front)
    return QuantizedActivation(*result, x.shape, x.dtype, site.bits)


def _norms_with_sites(model: nn.Module) -> list[tuple[nn.Module, OnlineSite]]:
    """The RMS norms behind which a site hangs."""
    from flatq_cli.runtime.sites import OnlineSite, site_behind

    found = [(module, site_behind(module)) for module in model.modules() if hasattr(module, "variance_epsilon")]
    return [(norm, site) for norm, site in found if isinstance(site, OnlineSite)]


def _gates_of_sites(model: nn.Module) -> list[nn.Module]:
    """The SiLU functions of MLPs whose last linear reads through a site: act(gate(x)) · up(x) waits for it, as whatever
    else a block does with act(gate(x)) computes the floats.
    """
    from flatq_cli.runtime.sites import OnlineSite, site_before

    found: list[nn.Module] = []
    for mlp in model.modules():
        parts = list(mlp.children())
        if any(isinstance(site_before(part), OnlineSite) for part in parts):
            found += [part for part in parts if isinstance(part, SILU)]
    return found


def _fits(site: OnlineSite, x: Tensor) -> bool:
    """Whether there is a kernel for `site` on `x`."""
    sizes = [len(matrix) for matrix in (site.left, site.right) if matrix is not None]
    small = bool(sizes) and max(*sizes, site.width // sizes[0]) <= GREATEST_FACTOR
    return small and site.feeds_packed and site.bits in ACTIVATION_BITS and x.dtype in HALF_NAMES


def _clip(site: OnlineSite, device: torch.device) -> Tensor:
    return torch.ones(2, device=device) if site.clip is None else site.clip


def _kron_matrices(site: OnlineSite, dtype: torch.dtype) -> KronMatrices:
    return prepare_kron(site.left, site.right, dtype, site.width)


def _heads_matrix(site: OnlineSite, dtype: torch.dtype) -> Tensor:
    assert site.right is not None
    return site.right.to(dtype).contiguous()


def _row_sums(linear: PackedLinear) -> Tensor:
    """Σ of each row's codes, int32 [out]: what an activation's zero point is multiplied by."""
    return linear.codes().sum(1, dtype=torch.int32)
