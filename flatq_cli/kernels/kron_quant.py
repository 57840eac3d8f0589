"""FlatQuant's activation in one launch: a Kronecker transform, clipping, rounding to int4 or int8, packing.

`kron_quant` defines the result in torch (any device) and runs `kron_quant.cu` on CUDA tensors. `prepare_kron` lays the
two matrices out once as the kernel reads them: in the order of tensor-core fragments, padded with zeros to multiples
of 16, the right one with its columns permuted so that a lane of the kernel ends up with neighbouring codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.codes import pack_codes, packed_width, quantize_rows
from flatq_cli.kernels.device import Device, DeviceLimits, aligned
from flatq_cli.kernels.kron_plan import FEW_TOKENS, KronPlan, KronSize, Prologue, kron_plan, plain_plan

GREATEST_FACTOR = 256  # of the kernel; larger factors are refused
# Between the two products bf16 becomes fp16, a quarter as large (kron_quant_layout.cuh, Between).
BF16_SHRINK = 0.25
_TYPES: dict[torch.dtype, Any] = {torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}


class Quantized(NamedTuple):
    """Rows of codes; what they stand for is (code - zero) · scale.

    Args:
        codes: uint8 `[..., packed_width(n, bits)]`. scale: float32 `[...]`.
        zero: int32 `[...]`, None when symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class KronMatrices:
    """The two factors and their prepared forms (`prepare_kron`). None is the identity.

    Args:
        n1, n2: sizes. left: `[n1, n1]`. right: `[n2, n2]`; fp16 or bf16. prepared_left, prepared_right: the same
            numbers in the order the kernel reads them (of two bf16 factors, the left
            one times `BF16_SHRINK` and the right one in fp16).
    """

    n1: int
    n2: int
    left: Tensor | None
    right: Tensor | None
    prepared_left: Tensor | None
    prepared_right: Tensor | None


def prepare_kron(left: Tensor | None, right: Tensor | None, dtype: torch.dtype, width: int) -> KronMatrices:
    """Lay out the factors of a transform of rows that are `width` wide; done once, not per call.

    Args:
        left: `[n1, n1]`, right: `[n2, n2]`, any float dtype (rounded to `dtype`); None is the identity.
        dtype: float16 or bfloat16, that of the activations.
    Raises:
        ValueError: both are None, a factor is not square or larger than 256, or n1 · n2 is not `width`.
    """
    if dtype not in _TYPES:
        raise ValueError(f"kron_quant computes in float16 or bfloat16, not in {dtype}")
    for name, factor in (("left", left), ("right", right)):
        if factor is not None and (factor.ndim != 2 or factor.shape[0] != factor.shape[1]):
            raise ValueError(f"prepare_kron: {name} must be a square matrix, not {tuple(factor.shape)}")
    if left is not None:
        n1, n2 = left.shape[0], right.shape[0] if right is not None else width // left.shape[0]
    elif right is not None:
        n1, n2 = width // right.shape[0], right.shape[0]
    else:
        raise ValueError("prepare_kron: at least one of left and right is needed (quantize_rows rounds as is)")
    if n1 * n2 != width:
        raise ValueError(f"prepare_kron: factors of {n1} and {n2} do not make a width of {width}")
    if max(n1, n2) > GREATEST_FACTOR:
        raise ValueError(f"prepare_kron: factors of {n1} and {n2}; the kernel goes up to {GREATEST_FACTOR}")
    left = None if left is None else left.to(dtype).contiguous()
    right = None if right is None else right.to(dtype).contiguous()
    between = left is not None and right is not None and dtype == torch.bfloat16
    return KronMatrices(
        n1,
        n2,
        left,
        right,
        None if left is None else fragments_of_left(left * BF16_SHRINK if between else left),
        None if right is None else fragments_of_right(right.half() if between else right),
    )


def fragments_of_left(left: Tensor) -> Tensor:
    """leftᵀ as A operands of m16n8k16: `[row tiles, column tiles, 32 lanes, 8]`.

    Lane 4g + t holds rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9 of a 16 × 16 tile, in the order
    (g; 2t, 2t + 1), (g + 8; 2t, 2t + 1), (g; 2t + 8, 2t + 9), (g + 8; 2t + 8, 2t + 9) (PTX ISA, "Matrix Fragments").
    """
    extra = -left.shape[0] % 16
    a = pad(left.mT, (0, extra, 0, extra))
    tiles = a.shape[0] // 16
    # Axes: row tile, row half, g, column tile, column half, t, element.
    parts = a.reshape(tiles, 2, 8, tiles, 2, 4, 2)
    return parts.permute(0, 3, 2, 5, 4, 1, 6).reshape(tiles, tiles, 32, 8).contiguous()


def fragments_of_right(right: Tensor) -> Tensor:
    """right as B operands of m16n8k16: `[row tiles of 16, pairs of column tiles of 8, 32 lanes, 8]`.

    Lane 4g + t holds column g of both tiles of a pair, rows 2t, 2t + 1, 2t + 8, 2t + 9; columns in `column_order`.
    """
    n2 = right.shape[0]
    order = column_order(n2)
    b = pad(right, (0, len(order) - n2, 0, -n2 % 16))[:, list(order)]
    b = pad(b, (0, -len(order) % 16))
    steps, pairs = b.shape[0] // 16, b.shape[1] // 16
    # Axes: row tile, row half, t, element, pair, tile of the pair, g.
    parts = b.reshape(steps, 2, 4, 2, pairs, 2, 8)
    return parts.permute(0, 4, 6, 2, 5, 1, 3).reshape(steps, pairs, 32, 8).contiguous()


@lru_cache(maxsize=64)
def column_order(n2: int) -> tuple[int, ...]:
    """Which column of `right` stands at each column of the kernel's tiles of 8; columns from n2 on are zero.

    In a tile a lane holds columns 2t and 2t + 1. Tiles form runs (8 tiles where n2 % 64 = 0, otherwise 4, then 2 and 1
    for what is left over), and in a run of r tiles the lane's 2r columns are made neighbours: 2rt … 2rt + 2r - 1.
    """
    tiles = -(-n2 // 8)
    order: list[int] = []
    longest = 8 if n2 % 64 == 0 else 4
    while len(order) < 8 * tiles:
        first = len(order)
        left_over = tiles - first // 8
        run = longest if left_over >= longest else 2 if left_over >= 2 else 1
        order += [first + 2 * run * (c // 2) + 2 * tile + c % 2 for tile in range(run) for c in range(8)]
    return tuple(order)


# ---- The definition. ----


def kron_quant_reference(
    x: Tensor,
    matrices: KronMatrices,
    clip: Tensor,
    *,
    bits: int = 4,
    symmetric: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Quantized:
    """What `kron_quant` means, in torch and on any device: the prologue rounded once to x's dtype, then float32.

    x may also be float32 or float64: then nothing is rounded before the codes, and float64 stays float64.
    """
    working = x.double() if x.dtype == torch.float64 else x.float()
    if norm_weight is not None:
        factor = torch.rsqrt(working.square().mean(-1, keepdim=True) + norm_eps)
        working = (working * factor * norm_weight.to(working.dtype)).to(x.dtype).to(working.dtype)
    if gate is not None:
        working = (silu(gate.to(working.dtype)) * working).to(x.dtype).to(working.dtype)
    rows = working.reshape(-1, matrices.n1, matrices.n2)
    if matrices.left is not None:
        rows = matrices.left.to(working.dtype).mT @ rows
    if matrices.right is not None:
        rows = rows @ matrices.right.to(working.dtype)
    codes, scale, zero = quantize_rows(rows.reshape(x.shape), clip, bits, symmetric)
    return Quantized(pack_codes(codes, bits), scale, None if symmetric else zero)


# ---- Launching. ----


def launch_kron_quant(
    device: Device,
    x: Tensor,
    matrices: KronMatrices,
    clip: Tensor,
    *,
    bits: int = 4,
    symmetric: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
    plan: KronPlan | None = None,
) -> Quantized:
    """Run the kernel on `device`; arguments as in `kron_quant`, not checked. `plan` replaces the chosen one."""
    n = matrices.n1 * matrices.n2
    rows = x.reshape(-1, n)
    tokens = rows.shape[0]
    codes = torch.empty((tokens, packed_width(n, bits)), dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zero = torch.empty(0 if symmetric else tokens, dtype=torch.int32, device=x.device)
    if tokens:
        prologue: Prologue = "norm" if norm_weight is not None else "gate" if gate is not None else "none"
        plan = plan or _cached_plan(
            _size(matrices, _TYPES[x.dtype], bits, symmetric, prologue), device.limits, min(tokens, FEW_TOKENS + 1)
        )
        left = matrices.prepared_left if plan.fast else matrices.left
        right = matrices.prepared_right if plan.fast else matrices.right
        gate = None if gate is None else gate.reshape(-1, n)
        gate, norm_weight, left, right = (None if t is None else aligned(t) for t in (gate, norm_weight, left, right))
        arguments = [
            aligned(rows), gate, norm_weight, float(norm_eps), left, right, clip.contiguous(),
            codes, scale, None if symmetric else zero, tokens,
        ]  # fmt: skip
        if not plan.fast:
            arguments += [matrices.n1, matrices.n2]
        device.launch(plan.kernel, (plan.grid(tokens), 1, 1), plan.block, plan.shared_bytes, arguments)
    leading = x.shape[:-1]
    return Quantized(
        codes.reshape(*leading, codes.shape[-1]), scale.reshape(leading), None if symmetric else zero.reshape(leading)
    )


def _size(matrices: KronMatrices, dtype: Any, bits: int, symmetric: bool, prologue: Prologue) -> KronSize:
    left, right = matrices.left is not None, matrices.right is not None
    return KronSize(matrices.n1, matrices.n2, left, right, dtype, bits, symmetric, prologue)


@lru_cache(maxsize=1024)
def _cached_plan(size: KronSize, limits: DeviceLimits, tokens: int) -> KronPlan:
    return kron_plan(size, limits, tokens)


# ---- The operator. ----


@torch.library.custom_op("flatq::kron_quant", mutates_args=())
def _kron_quant(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    prepared_left: Tensor | None,
    prepared_right: Tensor | None,
    clip: Tensor,
    sizes: Sequence[int],
    bits: int,
    symmetric: bool,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    matrices = KronMatrices(sizes[0], sizes[1], left, right, prepared_left, prepared_right)
    result = kron_quant_reference(
        x, matrices, clip, bits=bits, symmetric=symmetric, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate
    )
    return _three(result)


@_kron_quant.register_kernel("cuda")
def _(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    prepared_left: Tensor | None,
    prepared_right: Tensor | None,
    clip: Tensor,
    sizes: Sequence[int],
    bits: int,
    symmetric: bool,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flatq_cli.kernels.cuda import cuda_device

    matrices = KronMatrices(sizes[0], sizes[1], left, right, prepared_left, prepared_right)
    result = launch_kron_quant(
        cuda_device(x.device), x, matrices, clip,
        bits=bits, symmetric=symmetric, norm_weight=norm_weight, norm_eps=norm_eps, gate=gate,
    )  # fmt: skip
    return _three(result)


@_kron_quant.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, _, _, _, sizes, bits, symmetric, _, _, _ = arguments
    leading = x.shape[:-1]
    codes = x.new_empty((*leading, packed_width(sizes[0] * sizes[1], bits)), dtype=torch.uint8)
    zero = x.new_empty((0,) if symmetric else leading, dtype=torch.int32)
    return codes, x.new_empty(leading, dtype=torch.float32), zero


def _three(result: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors only: no zero point is an empty one."""
    zero = result.scale.new_empty(0, dtype=torch.int32) if result.zero is None else result.zero
    return result.codes, result.scale, zero


def kron_quant(
    x: Tensor,
    matrices: KronMatrices,
    clip: Tensor,
    *,
    bits: int = 4,
    symmetric: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate: Tensor | None = None,
) -> Quantized:
    """Transform each row by `left ⊗ right`, clip, round, pack: one launch on a GPU.

    Args:
        x: `[..., n]`, fp16 or bf16. matrices: of `prepare_kron`, in x's dtype.
        clip: float32 `[2]`, on x's device: factors on a row's maximum and minimum.
        bits: 4 (two codes a byte, even index low) or 8. symmetric: signed codes, no zero point.
        norm_weight: `[n]` in x's dtype: x · rsqrt(mean(x²) + norm_eps) · norm_weight is taken for x, rounded once.
        gate: like x: silu(gate) · x is taken for x, rounded once. Excludes norm_weight.
    Returns:
        `Quantized`. A row with a NaN or an infinity (of x, or of leftᵀ·x, which tensor cores take in 16 bits: beyond
        65504, or 2^18 where x is bf16) has scale NaN, its codes mean nothing, other rows are unharmed. On tensor cores
        leftᵀ·x is rounded to fp16: measured on random data, 0.03 % of int4 codes and 0.6 % of int8 codes differ by one
        from the CPU's, and scales by up to 2.5e-4 of themselves.
    Raises:
        ValueError: wrong shapes, dtypes, devices or bits.
    Source: FlatQuant (arXiv 2410.09426), eq. 3, and docs/method.md, "Quantizers".
    """
    _check(x, matrices, clip, bits, norm_weight, gate)
    codes, scale, zero = _kron_quant(
        x, matrices.left, matrices.right, matrices.prepared_left, matrices.prepared_right, clip,
        [matrices.n1, matrices.n2], bits, symmetric, norm_weight, norm_eps, gate,
    )  # fmt: skip
    return Quantized(codes, scale, None if symmetric else zero)


def _check(
    x: Tensor, matrices: KronMatrices, clip: Tensor, bits: int, norm_weight: Tensor | None, gate: Tensor | None
) -> None:
    n = matrices.n1 * matrices.n2
    if x.dtype not in _TYPES:
        raise ValueError(f"kron_quant: x must be float16 or bfloat16, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(f"kron_quant: rows of {matrices.n1} · {matrices.n2} = {n} are needed, x is {tuple(x.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"kron_quant: bits must be 4 or 8, not {bits}")
    if clip.shape != (2,) or clip.dtype != torch.float32:
        raise ValueError(f"kron_quant: clip must be float32 [2], not {clip.dtype} {tuple(clip.shape)}")
    if norm_weight is not None and gate is not None:
        raise ValueError("kron_quant: norm_weight and gate exclude each other")
    if norm_weight is not None and (norm_weight.shape != (n,) or norm_weight.dtype != x.dtype):
        raise ValueError(
            f"kron_quant: norm_weight must be {x.dtype} [{n}], not {norm_weight.dtype} {tuple(norm_weight.shape)}"
        )
    if gate is not None and (gate.shape != x.shape or gate.dtype != x.dtype):
        raise ValueError(
            f"kron_quant: gate must be like x, {x.dtype} {tuple(x.shape)}, not {gate.dtype} {tuple(gate.shape)}"
        )
    others = {"left": matrices.left, "right": matrices.right, "clip": clip, "norm_weight": norm_weight, "gate": gate}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"kron_quant: {name} is on {tensor.device}, x on {x.device}; move it there first")
        if name in ("left", "right") and tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"kron_quant: the matrices were prepared for {tensor.dtype}, x is {x.dtype}")


# ---- Cases of the static report. ----

REPORT_SIZES = (
    (24, 24), (32, 48), (32, 64), (64, 64), (64, 80), (64, 128), (80, 112), (86, 128), (112, 128), (128, 148),
    (128, 224), (256, 256),
)  # fmt: skip
TURNS = 64  # of a block in a case's run; what it loads once (the matrices) is shared by all


def report_cases(limits: DeviceLimits) -> list[Case]:
    """The sizes and variants that the report shows.

    `run` is one persistent block that takes TURNS times its tokens, about what a block takes of a prefill of 16,384
    tokens: the matrices, which it loads once, weigh as little as they do there. The plain kernel keeps nothing.
    """
    cases = [_case(KronSize(n1, n2), limits) for n1, n2 in REPORT_SIZES]
    cases += [
        _case(KronSize(64, 64, dtype="BF16", bits=8, symmetric=False), limits),
        _case(KronSize(64, 64, prologue="norm"), limits),
        _case(KronSize(112, 128, prologue="gate"), limits),
        _case(KronSize(32, 128, right=False), limits),
        _case(KronSize(37, 53), limits),
    ]
    return [*cases, _case(KronSize(64, 64), limits, plain=True)] if limits.arch >= 80 else cases


def _case(size: KronSize, limits: DeviceLimits, plain: bool = False) -> Case:
    tokens = 4096
    plan = plain_plan(size, limits) if plain else kron_plan(size, limits, tokens)
    n = size.n1 * size.n2
    read = n * 2 * (2 if size.prologue == "gate" else 1)
    written = packed_width(n, size.bits) + (4 if size.symmetric else 8)
    parts = [f"int{size.bits}", size.dtype.lower()]
    parts += [] if size.symmetric else ["asymmetric"]
    parts += [] if size.prologue == "none" else [size.prologue]
    parts += [] if size.right else ["left only"]
    mma = n * ((size.n1 if size.left else 0) + (size.n2 if size.right else 0)) / 2048
    run_tokens = plan.tokens_per_block * TURNS if plan.fast else 1
    return Case(
        name=f"kron_quant{'' if plan.fast else '_plain'}[{','.join(parts)}]",
        n1=size.n1,
        n2=size.n2,
        kernel=plan.kernel,
        block=plan.block,
        shared_bytes=plan.shared_bytes,
        fast=plan.fast,
        least=Least(sectors=(read + written) / 32, mma=mma if plan.fast else 0.0),
        tokens=run_tokens,
        run=partial(_run_case, size, plan, run_tokens),
        reason=_reason(size, plan),
    )


def _reason(size: KronSize, plan: KronPlan) -> str:
    """Why a plan costs more than the least."""
    built = dict(plan.kernel.defines)
    reasons = []
    if size.n1 % 16 or size.n2 % 16:
        reasons.append("factors are padded to multiples of 16 (8 for columns of the result)")
    if size.n2 % 2:
        reasons.append("rows of odd length are laid out word by word")
    if built.get("PASSES") == 2:
        reasons.append("registers hold half of a token's rows, so x is read twice, the second time from L2")
    if built.get("STREAM_RIGHT"):
        reasons.append("the right matrix does not fit into shared memory beside x and streams from L2")
    return "; ".join(reasons)


def _run_case(size: KronSize, plan: KronPlan, tokens: int, device: Device) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = _DTYPES[size.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    left = normal(size.n1, size.n1) / size.n1**0.5 if size.left else None
    right = normal(size.n2, size.n2) / size.n2**0.5 if size.right else None
    n = size.n1 * size.n2
    launch_kron_quant(
        device,
        normal(tokens, n),
        prepare_kron(left, right, dtype, n),
        torch.ones(2),
        bits=size.bits,
        symmetric=size.symmetric,
        norm_weight=normal(n) if size.prologue == "norm" else None,
        gate=normal(tokens, n) if size.prologue == "gate" else None,
        plan=KronPlan(plan.kernel, plan.block, plan.shared_bytes, plan.tokens_per_block, 1, plan.fast),
    )
