"""The backend `cpu`: quantized models through torch's own integer kernels.

    site                      the codes of an activation, made once and shared by the linears that read it
    store                     keys and values into the packed cache
    linear, codes             y = (codes · weight codesᵀ) · scale · weight scale + bias; oneDNN (AMX, VNNI) with bytes,
                              the sum exact in int32
    linear, a few bfloat16    y = (x · weight codesᵀ) · weight scale + bias; the kernel for int4 weights: decoding is
    rows, 4-bit weights       reading weights, and here a weight is half a byte
    else                      as in `reference`, but the weight is unpacked once and not in every forward

Codes are centred (code - zero), so that there are no zero points to correct for; asymmetric ones of 8 bits then exceed
int8, and are multiplied as floats in float32, and dequantized in 16 bits. In float32 all this gives what `reference`
gives, bit for bit; in 16 bits attention of one token over a packed cache is of its own, and adds in another order.

Weights are laid out for a kernel at the first forward that needs it and kept while the machine has room (`ROOM`): a
byte a weight for int8, half a byte for int4, an element where it is unpacked. Beyond that, in every forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from flatq_cli.quantization.quantizers import FLOAT_BITS, Codes, code_range
from flatq_cli.runtime.backends.base import Backend
from flatq_cli.runtime.backends.lazy import QuantizedActivation
from flatq_cli.runtime.backends.reference import REFERENCE, centred_codes, code_linear, has_whole_rows, scaled
from flatq_cli.transforms.kronecker import kronecker_matmul

if TYPE_CHECKING:
    from flatq_cli.runtime.kv_cache import PackedStates
    from flatq_cli.runtime.linear import PackedLinear
    from flatq_cli.runtime.sites import OnlineSite

FEW_ROWS = 4  # up to so many, the int4 kernel is faster than the int8 one: measured with AMX, 2 rows 1.6 times, 8 0.7
SMALL = 8192  # elements of an activation that is transformed in float32
ROOM = 0.1  # of the machine's memory stays free when weights are kept
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPS: Any = torch.ops


class Cpu(Backend):
    """Integers on the CPU."""

    name = "cpu"

    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """It needs torch's kernels, and a model on the CPU in a dtype whose quantizers compute in float32."""
        if device is not None and device.type != "cpu":
            return f"the model is on {device}, not on the CPU"
        if dtype is not None and dtype not in _DTYPES:
            return f"it computes in float32, bfloat16 or float16, not in {dtype}"
        return _kernels_fail()

    def site(self, site: OnlineSite, x: Tensor) -> Tensor:
        """Codes for linears, floats for attention."""
        if x.dtype not in _DTYPES or (x.requires_grad and torch.is_grad_enabled()):
            return REFERENCE.site(site, x)
        constants = site.prepared(SiteConstants)
        if site.bits == FLOAT_BITS:
            return constants.transform(x).to(x.dtype)
        y = constants.transform(x)
        if site.symmetric and x.numel() == x.shape[-1]:
            codes, scale, zero = round_row(y, site.bits, constants.clip)
        else:
            codes, scale, zero = round_rows(y, site.bits, site.symmetric, constants.clip)
        if zero is not None:
            codes = codes.sub_(zero)
        if not site.feeds_packed:
            return codes.mul_(scale).to(x.dtype)
        # The kernel for few rows takes floats.
        few = x.dtype == torch.bfloat16 and x.numel() <= FEW_ROWS * x.shape[-1]
        values = (codes * scale).to(x.dtype) if few else None
        codes, scale = codes.reshape(-1, x.shape[-1]), scale.reshape(-1, 1)
        if fits_int8(site.bits, site.symmetric) and not (few and site.bits < 8):
            codes = codes.to(torch.int8)
        return QuantizedActivation(codes, scale, None, x.shape, x.dtype, site.bits, values, site.symmetric)

    def linear(self, linear: PackedLinear, x: Tensor) -> Tensor:
        """In integers where x and the weight have codes that fit; else as `reference`, but unpacked only once."""
        if x.dtype not in _DTYPES:
            return REFERENCE.linear(linear, x)
        weights = linear.prepared(Weights)
        if weights.int4_fits and x.dtype == torch.bfloat16 and x.numel() <= FEW_ROWS * linear.in_features:
            return _int4_linear(weights, x.values() if isinstance(x, QuantizedActivation) else x)
        if isinstance(x, QuantizedActivation):
            if weights.int8_fits and (x.codes.dtype == torch.int8 or x.bits < 8):
                return _int8_linear(weights, x)
            if weights.whole_rows and x.dtype == torch.float32:
                return code_linear(x, weights.floats(), linear)
            x = x.values()
        return functional.linear(x, *weights.dense(x.dtype))

    def store(self, site: OnlineSite, x: Tensor, parts: Sequence[Tensor], row: int) -> bool:
        """4-bit codes, paired while they are floats."""
        if site.bits != 4 or x.shape[-1] % 2 or x.dtype not in _DTYPES:
            return False
        constants = site.prepared(SiteConstants)
        codes, scale, zero = round_rows(constants.transform(x), 4, site.symmetric, constants.clip)
        if zero is None:
            codes = codes.remainder_(16)  # two's complement
        pairs = torch.add(codes[..., ::2], codes[..., 1::2], alpha=16).nan_to_num_(0)
        rows = slice(row, row + x.shape[2])
        parts[0][:, :, rows] = pairs
        parts[1][:, :, rows] = scale.squeeze(-1)
        if zero is not None:
            parts[2][:, :, rows] = zero.squeeze(-1).nan_to_num_(0)
        return True

    def attend(
        self, query: Tensor, keys: PackedStates, values: PackedStates, mask: Tensor | None, scaling: float | None
    ) -> Tensor | None:
        """One token over a cache of asymmetric 4-bit codes, with codes as operands: scales and zero points apply to
        scores and weights, of which there is one a key, and not to every number of the cache.
        """
        batch, heads, tokens, width = query.shape
        # In float32, where models are measured, as in `reference`: a sum in another order is another text in the end.
        if query.dtype == torch.float32 or tokens != 1 or mask is not None:
            return None
        if not _attends(keys) or not _attends(values):
            return None
        grouped = query.float().view(batch, keys.codes.shape[1], -1, width)
        # A byte holds an even and an odd channel: all even ones first, then all odd ones.
        grouped = torch.cat([grouped[..., ::2], grouped[..., 1::2]], -1)
        codes, scale, zero = _numbers(keys)
        scores = (grouped @ codes.mT).sub_(grouped.sum(-1, keepdim=True) * zero)
        scores = scores.mul_(scale * (width**-0.5 if scaling is None else scaling)).softmax(-1)
        codes, scale, zero = _numbers(values)
        weights = scores.mul_(scale)
        sums = (weights @ codes).sub_((weights * zero).sum(-1, keepdim=True))
        in_pairs = sums.view(*sums.shape[:-1], 2, width // 2).mT
        return in_pairs.reshape(batch, heads, tokens, width).to(query.dtype)


def _attends(states: PackedStates) -> bool:
    return states.bits == 4 and states.zero is not None and states.width % 2 == 0


def _numbers(states: PackedStates) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[batch, kv_heads, keys, width]`, even channels first; scales and zeros `[batch, kv_heads, 1, keys]`."""
    assert states.zero is not None
    rows = slice(states.start, states.end)
    packed = states.codes[:, :, rows]
    codes = torch.cat([packed & 15, packed >> 4], -1).float()
    return codes, states.scale[:, :, None, rows], states.zero[:, :, None, rows].float()


def fits_int8(bits: int, symmetric: bool) -> bool:
    """Whether code - zero fits int8."""
    return symmetric or bits < 8


@cache
def _kernels_fail() -> str | None:
    """Why torch's integer kernels do not multiply here; None: they do. They are no public API: so they are tried."""
    a = torch.arange(-64, 64, dtype=torch.int8).reshape(4, 32)
    w = torch.arange(-256, 256).remainder(16).sub(8).to(torch.int8).reshape(16, 32)
    try:
        by_int4 = _int4_product(a.bfloat16(), Int4Weight(w, None))
        exact = torch.equal(by_int4, (a.float() @ w.float().T).bfloat16()) and int8_is_exact(8)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return f"this torch ({torch.__version__}) does not multiply integers on this CPU: {str(error).splitlines()[0]}"
    return None if exact else f"this torch ({torch.__version__}) multiplies integers wrongly on this CPU"


@cache
def int8_is_exact(largest: int) -> bool:
    """Whether products of bytes with weights up to ±`largest` are summed exactly. A CPU without VNNI adds two of them
    in 16 bits, where those of 8-bit weights do not fit.
    """
    a = torch.tensor([-128, 127], dtype=torch.int8)[:, None].expand(2, 32).contiguous()
    w = torch.tensor([-largest, min(largest, 127)]).to(torch.int8).repeat(8)[:, None].expand(16, 32).contiguous()
    product = _int8_product(a, _OPS.onednn.qlinear_prepack(w, None), torch.ones(16))
    return torch.equal(product, a.float() @ w.float().T)


# ---- Activations. ----


class SiteConstants:
    """A site's matrices in the dtypes they were needed in, and its clip factors (max, min) as numbers."""

    def __init__(self, site: OnlineSite) -> None:
        self._own = site.left, site.right
        self._identity = site.left is None and site.right is None
        self._cast: dict[torch.dtype, tuple[Tensor | None, Tensor | None]] = {}
        most, least = (1.0, 1.0) if site.clip is None else site.clip.tolist()
        self.clip = float(most), float(least)

    def transform(self, x: Tensor) -> Tensor:
        """`x` `[..., width]` times L ⊗ R, in x's dtype; in float32 if x is small: products in 16 bits start slowly."""
        if self._identity:
            return x
        as_reference = x.dtype == torch.float32  # to the last bit
        x = x.float() if x.numel() <= SMALL else x
        if x.dtype not in self._cast:
            left, right = (None if matrix is None else matrix.to(x.dtype) for matrix in self._own)
            self._cast[x.dtype] = left, right
        left, right = self._cast[x.dtype]
        if as_reference or left is None or x.numel() > x.shape[-1]:
            return kronecker_matmul(x, left, right)
        # One row is one matrix: half the time of a batch of one.
        one = x.reshape(left.shape[0], -1)
        return left.mT.mm(one if right is None else one.mm(right)).view(x.shape)


def round_rows(y: Tensor, bits: int, symmetric: bool, clip: tuple[float, float]) -> Codes:
    """`quantizers.quantize`, bit for bit and in fewer operations, for clip factors above 0 that are plain numbers."""
    y = y.float()
    low, high = code_range(bits, symmetric)
    most, least = y.amax(-1, keepdim=True), y.amin(-1, keepdim=True)
    if symmetric:
        # The quantizer clamps both at 0 first; where that changes one of them, the other is greater.
        scale = torch.maximum(most.mul_(clip[0]), least.mul_(-clip[1])).div_(high)
        scale.masked_fill_(scale == 0, 1.0)
        return Codes((y / scale).round_().clamp_(low, high), scale, None)
    most, least = most.clamp_(min=0).mul_(clip[0]), least.clamp_(max=0).mul_(clip[1])
    scale = (most - least).div_(high)
    scale.masked_fill_(scale == 0, 1.0)
    zero = least.neg_().div_(scale).round_()
    return Codes((y / scale).round_().add_(zero).clamp_(low, high), scale, zero)


def round_row(y: Tensor, bits: int, clip: tuple[float, float]) -> Codes:
    """`round_rows` for one row and symmetric codes: what is a number to a row is a number here, too."""
    y = y.float()
    low, high = code_range(bits, symmetric=True)
    most, least = np.float32(y.amax().item()), np.float32(y.amin().item())
    scale = max(most * np.float32(clip[0]), least * np.float32(-clip[1])) / np.float32(high)
    # Python's max may pass over a NaN.
    step = math.nan if math.isnan(most) or math.isnan(least) else float(scale) or 1.0
    return Codes((y / step).round_().clamp_(low, high), torch.full((*y.shape[:-1], 1), step), None)


# ---- Weights. ----


class Int4Weight:
    """Codes in the order of torch's int4 kernel, half a byte each.

    Args:
        codes: integers `[out, in]` with `in` divided by 32 and `out` by 16; -8 to 7, or 0 to 15 with `zero`.
        zero: integers `[out]` or None: 0.
    """

    def __init__(self, codes: Tensor, zero: Tensor | None) -> None:
        out, width = codes.shape
        unsigned = codes.int() + 8 if zero is None else codes.int()
        self.codes: Tensor = torch._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
        self.group = math.gcd(width, 256)
        # The kernel computes (unsigned - 8) · 1 + shift for each group: exact in bfloat16.
        shift = torch.zeros(out) if zero is None else 8.0 - zero
        pairs = torch.stack([torch.ones(out), shift], -1).bfloat16()
        self.scale_and_shift = pairs.repeat(width // self.group, 1, 1)


class Dense(NamedTuple):
    """A dequantized weight `[out, in]` and its bias, in the activation's dtype."""

    weight: Tensor
    bias: Tensor | None


class Weights:
    """A packed linear's weight in the forms that kernels take; each is made when it is first needed."""

    def __init__(self, linear: PackedLinear) -> None:
        self._linear = linear
        self._kept: dict[Any, Any] = {}
        self.whole_rows = has_whole_rows(linear)
        self.scale, self.bias = linear.weight_scale.flatten(), linear.bias
        largest = 2 ** (linear.bits - 1) if linear.symmetric else 2**linear.bits - 1
        self.int8_fits = self.whole_rows and fits_int8(linear.bits, linear.symmetric) and int8_is_exact(largest)
        odd = linear.in_features % 32 or linear.out_features % 16
        self.int4_fits = self.whole_rows and linear.bits <= 4 and not odd

    def int8(self) -> Tensor:
        """Centred codes as oneDNN lays them out."""
        kept = self._kept.get("int8")
        if kept is None:
            codes = centred_codes(self._linear).to(torch.int8)
            kept = self._keep("int8", 1.0, _OPS.onednn.qlinear_prepack(codes, None))
        return kept  # type: ignore[no-any-return]

    def floats(self) -> Tensor:
        """Centred codes that do not fit int8, as `code_linear` multiplies them."""
        kept = self._kept.get("floats")
        if kept is None:
            kept = self._keep("floats", 4.0, centred_codes(self._linear).float())
        return kept  # type: ignore[no-any-return]

    def int4(self) -> Int4Weight:
        """Codes for the kernel of few rows."""
        kept = self._kept.get("int4")
        if kept is None:
            zero = self._linear.weight_zero
            made = Int4Weight(self._linear.codes(), None if zero is None else zero.flatten())
            kept = self._keep("int4", 0.5, made)
        return kept  # type: ignore[no-any-return]

    def dense(self, dtype: torch.dtype) -> Dense:
        """Weight and bias as `reference` computes with them."""
        kept = self._kept.get(dtype)
        if kept is None:
            bias = None if self.bias is None else self.bias.to(dtype)
            kept = self._keep(dtype, dtype.itemsize, Dense(self._linear.dequantize().to(dtype), bias))
        return kept  # type: ignore[no-any-return]

    def _keep(self, form: Any, bytes_a_weight: float, made: Any) -> Any:
        if has_room(bytes_a_weight * self._linear.in_features * self._linear.out_features):
            self._kept[form] = made
        return made


def has_room(size: float) -> bool:
    """Whether `ROOM` of the machine's memory stays free with `size` more bytes in use."""
    memory = psutil.virtual_memory()
    return bool(memory.available - size >= ROOM * memory.total)


def _int8_linear(weights: Weights, x: QuantizedActivation) -> Tensor:
    codes = x.codes if x.codes.dtype == torch.int8 else x.codes.to(torch.int8)
    sums = _int8_product(codes, weights.int8(), weights.scale)
    return scaled(sums, x.scale, weights.bias, x.dtype).view(*x.shape[:-1], sums.shape[-1])


def _int8_product(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(codes · weightᵀ) · scale: int8 `[rows, in]`, oneDNN's weight, float32 `[out]` → float32 `[rows, out]`."""
    rows = codes.shape[0]
    if rows == 1:
        # oneDNN takes a hundred times as long for one row by some widths (192) as for two.
        codes = codes.repeat(2, 1)
    # As code + 128, unsigned: VNNI multiplies those, and without AMX signed ones go a thousand times slower way.
    unsigned, offset = codes.view(torch.uint8).bitwise_xor(128), 128
    no_zeros, no_bias = _zeros(scale.shape[0]), None
    after: tuple[Any, ...] = ("none", [], "")
    product: Tensor = _OPS.onednn.qlinear_pointwise(
        unsigned, 1.0, offset, weight, scale, no_zeros, no_bias, 1.0, 0, torch.float32, *after
    )
    return product[:rows]


@cache
def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32)


def _int4_linear(weights: Weights, x: Tensor) -> Tensor:
    y = _int4_product(x.reshape(-1, x.shape[-1]), weights.int4())
    y = y.mul_(weights.scale) if weights.bias is None else torch.addcmul(weights.bias, y, weights.scale).to(x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def _int4_product(x: Tensor, weight: Int4Weight) -> Tensor:
    """x · weightᵀ: bfloat16 `[rows, in]` → `[rows, out]`."""
    kernel = _OPS.aten._weight_int4pack_mm_for_cpu
    return kernel(x, weight.codes, weight.group, weight.scale_and_shift)  # type: ignore[no-any-return]
