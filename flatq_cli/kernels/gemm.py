"""Linear layers on packed int4 weights: quantized activations (4 or 8 bits) in, fp16 or bf16 out.

    y[token, o] = a_scale[token] · w_scale[o] · (Σ a·w - a_zero[token] · w_sum[o]) + bias[o]

The sum is over integers, so it is exact and does not depend on the order: the kernels and the torch definition below
agree to the rounding of the last float32 operations. On a GPU one of three kernels runs (`gemm_plan`): tiles of
tensor-core work for many tokens, a form that streams the weights once for 1 to 16 tokens, and a plain one for any GPU
and size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.codes import packed_width, unpack_codes
from flatq_cli.kernels.device import Device, DeviceLimits, Kernel, aligned
from flatq_cli.kernels.gemm_plan import DecodePlan, GemmPlan, PlainPlan, TiledPlan, gemm_plan

# codes, scale, zero point or None: what kron_quant returns.
Activations: TypeAlias = tuple[Tensor, Tensor, Tensor | None]

GREATEST_IN = 2**20  # beyond, an int32 sum could overflow even in the plain kernel
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


# ---- The definition. ----


def w4_gemm_reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    activation_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `w4a4_gemm` (4 activation bits) and `w4a8_gemm` (8) mean, in torch, on any device.

    Integers are multiplied as floats that hold every sum exactly; from there on the maths is in float32, rounded once.
    """
    a = unpack_codes(codes, activation_bits, in_features, signed=zero is None)
    w = unpack_codes(weight, 4, in_features, signed=True)
    groups = weight_scale.shape[1] if weight_scale.ndim == 2 else 1
    # |a| < 2^bits and |w| ≤ 8, and a float holds all integers up to 2^24.
    exact = torch.float32 if in_features * 2**activation_bits * 8 <= 2**24 else torch.float64
    if groups > 1:
        centred = a if zero is None else a - zero.unsqueeze(-1)
        grouped_a = centred.to(exact).reshape(-1, groups, in_features // groups)
        grouped_w = w.to(exact).reshape(-1, groups, in_features // groups)
        sums = torch.einsum("tgk,ogk->tgo", grouped_a, grouped_w).float()
        total = torch.einsum("tgo,og->to", sums, weight_scale).reshape(*scale.shape, -1)
        y = scale.unsqueeze(-1) * total
    else:
        total = (a.to(exact) @ w.to(exact).T).to(torch.int64)
        if zero is not None:
            assert weight_sum is not None
            total = total - zero.unsqueeze(-1).to(torch.int64) * weight_sum
        y = scale.unsqueeze(-1) * weight_scale.reshape(-1) * total.float()
    return (y if bias is None else y + bias).to(dtype)


# ---- Launching. ----


def launch_w4_gemm(
    device: Device,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    activation_bits: int,
    dtype: torch.dtype,
    plan: GemmPlan | None = None,
) -> Tensor:
    """Run one of the kernels; arguments as in `w4_gemm_reference`. `plan`: instead of `gemm_plan`'s."""
    out, tokens = weight.shape[0], scale.numel()
    y = torch.empty((*scale.shape, out), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    groups = weight_scale.shape[1] if weight_scale.ndim == 2 else 1
    plan = plan or gemm_plan(tokens, out, in_features, activation_bits, groups, device.limits)
    kernel = gemm_kernel(plan, activation_bits, zero is not None, groups > 1, dtype)
    codes, scale, weight, weight_scale = (aligned(t) for t in (codes, scale, weight, weight_scale))
    zero, weight_sum, bias = (None if t is None else aligned(t) for t in (zero, weight_sum, bias))
    if isinstance(plan, PlainPlan):
        arguments = [codes, scale, zero, weight, weight_scale, bias, y, tokens, out, in_features, groups]
        device.launch(kernel, (plan.grid, 1, 1), plan.block, 0, arguments)
        return y
    # The counters of each call are its own and start at 0, so a captured graph may be replayed, on any stream.
    parts = torch.empty(plan.parts, dtype=torch.int32, device=codes.device) if plan.splits > 1 else None
    counters = torch.zeros(plan.tiles, dtype=torch.int32, device=codes.device) if plan.splits > 1 else None
    tensors = [codes, scale, zero, weight, weight_scale, weight_sum, bias, y, parts, counters]
    sizes = [tokens, out, in_features, plan.split_steps, plan.splits]
    device.launch(kernel, (plan.grid, 1, 1), plan.block, plan.shared_bytes, [*tensors, *sizes])
    return y


def gemm_kernel(plan: GemmPlan, activation_bits: int, has_zero: bool, grouped: bool, dtype: torch.dtype) -> Kernel:
    """The specialization that a plan asks for."""
    common = (("UNSIGNED", int(has_zero)), ("TYPE", _TYPES[dtype]))
    if isinstance(plan, PlainPlan):
        plain = (("BITS", activation_bits), *common, ("GROUPED", int(grouped)))
        return Kernel("w4_gemm_plain.cu", "w4_gemm_plain", plain)
    if isinstance(plan, DecodePlan):
        decode = (
            ("TOKEN_TILES", plan.token_tiles),
            ("WARPS_OUT", plan.warps_out),
            ("WARPS_IN", plan.warps_in),
            ("BLOCKS", 2),
        )
        return Kernel("w4_gemm_decode.cu", "w4_gemm_decode", (("FORM", plan.form), *common, *decode))
    tile = (("TILE_TOKENS", plan.tile_tokens), ("TILE_OUT", plan.tile_out), ("WARPS_TOKENS", 2), ("WARPS_OUT", 2))
    ring = (("STAGES", plan.stages), ("BLOCKS", plan.blocks))
    return Kernel("w4_gemm_tiled.cu", "w4_gemm_tiled", (("FORM", plan.form), *common, *tile, *ring))


# ---- The ops. ----


def _define_op(activation_bits: int) -> Any:
    """`flatq::w4a4_gemm` or `flatq::w4a8_gemm`: the definition, the kernels on a GPU, and shapes for torch.compile."""

    def op(
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        weight_sum: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        dtype: torch.dtype,
    ) -> Tensor:
        tensors = (codes, scale, zero, weight, weight_scale, weight_sum, bias)
        return w4_gemm_reference(*tensors, in_features, activation_bits, dtype)

    def on_cuda(codes: Tensor, *others: Any) -> Tensor:
        from flatq_cli.kernels.cuda import cuda_device

        scale, zero, weight, weight_scale, weight_sum, bias, in_features, dtype = others
        tensors = (codes, scale, zero, weight, weight_scale, weight_sum, bias)
        return launch_w4_gemm(cuda_device(codes.device), *tensors, in_features, activation_bits, dtype)

    def shapes(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, *others: Any) -> Tensor:
        return codes.new_empty((*scale.shape, weight.shape[0]), dtype=others[-1])

    defined = torch.library.custom_op(f"flatq::w4a{activation_bits}_gemm", op, mutates_args=())
    defined.register_kernel("cuda")(on_cuda)
    defined.register_fake(shapes)
    return defined


_w4a4_op = _define_op(4)
_w4a8_op = _define_op(8)


def w4a4_gemm(
    a: Activations,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    in_features: int,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply rows of int4 codes by packed int4 weights.

    Args:
        a: codes uint8 `[..., ceil(in / 2)]`, scale float32 `[...]`, zero point int32 `[...]` or None: codes are signed
            without a zero point and unsigned with one.
        weight: uint8 `[out, ceil(in / 2)]`, signed codes packed as design §5 has it.
        weight_scale: float32 `[out]`, or `[out, groups]` with groups that divide `in_features` (plain kernel).
        weight_sum: int32 `[out]`, the sum of each row's codes; needed with a zero point and scales by row.
        bias: float32 `[out]`. dtype: float16 or bfloat16.
    Returns:
        `[..., out]`: a_scale · w_scale · (Σ a·w - a_zero · w_sum) + bias, exact integers, float32, rounded once.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(a, weight, weight_scale, in_features, weight_sum, bias, dtype, 4)
    y: Tensor = _w4a4_op(*a, weight, weight_scale, weight_sum, bias, in_features, dtype)
    return y


def w4a8_gemm(
    a: Activations,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    in_features: int,
    weight_sum: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`w4a4_gemm` for activations of 8 bits: codes uint8 `[..., in]`, two's complement without a zero point."""
    _check(a, weight, weight_scale, in_features, weight_sum, bias, dtype, 8)
    y: Tensor = _w4a8_op(*a, weight, weight_scale, weight_sum, bias, in_features, dtype)
    return y


def _check(
    a: Activations,
    weight: Tensor,
    weight_scale: Tensor,
    in_features: int,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation_bits: int,
) -> None:
    codes, scale, zero = a
    name = f"w4a{activation_bits}_gemm"
    if dtype not in _TYPES:
        raise ValueError(f"{name}: dtype must be torch.float16 or torch.bfloat16, not {dtype}")
    if not 1 <= in_features <= GREATEST_IN:
        raise ValueError(f"{name}: in_features must be 1 to {GREATEST_IN}, not {in_features}")
    out = weight.shape[0]
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("codes", codes, torch.uint8, (*scale.shape, packed_width(in_features, activation_bits))),
        ("scale", scale, torch.float32, tuple(scale.shape)),
        ("zero", zero, torch.int32, tuple(scale.shape)),
        ("weight", weight, torch.uint8, (out, packed_width(in_features, 4))),
        ("weight_scale", weight_scale, torch.float32, (out, *weight_scale.shape[1:2])),
        ("weight_sum", weight_sum, torch.int32, (out,)),
        ("bias", bias, torch.float32, (out,)),
    ]
    for what, tensor, kind, shape in expected:
        if tensor is None:
            continue
        if tensor.dtype != kind or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name}: {what} must be {kind} {list(shape)}, not {found} (in_features = {in_features})")
        if tensor.device != codes.device:
            raise ValueError(f"{name}: {what} is on {tensor.device} but codes on {codes.device}: move it there")
    if weight_scale.ndim == 2 and (weight_scale.shape[1] < 1 or in_features % weight_scale.shape[1]):
        raise ValueError(
            f"{name}: {weight_scale.shape[1]} groups of weight_scale do not divide in_features = {in_features}"
        )
    if zero is not None and weight_sum is None and (weight_scale.ndim == 1 or weight_scale.shape[1] == 1):
        raise ValueError(f"{name}: codes with a zero point need weight_sum, the sum of each weight row's codes")


# ---- The report. ----

# (in, out): Llama-3-8B's o_proj, Qwen2.5-7B's o_proj, SmolLM2-135M's qkv and down_proj.
_SIZES = ((4096, 4096), (3584, 3584), (576, 960), (1536, 576))


def report_cases(limits: DeviceLimits) -> list[Case]:
    """Decode of 1 and 16 tokens and a prefill of 128, at sizes of real models.

    The weights are an input that a launch reads once, so the least of a token is the launch's bytes (weights, scales
    and outputs included) divided by its tokens, unlike a transform's matrices, which count 0. Where several tokens meet
    few rows of weights on each SM, the codes that every block reads for itself (from L2) show in the sectors.
    """
    cases = []
    for bits in (4, 8):
        for in_features, out in _SIZES:
            for tokens in (1, 16, 128):
                cases.append(_case(tokens, out, in_features, bits, limits))
    return cases


def _case(tokens: int, out: int, in_features: int, bits: int, limits: DeviceLimits) -> Case:
    plan = gemm_plan(tokens, out, in_features, bits, 1, limits)
    moved = out * packed_width(in_features, 4) + tokens * packed_width(in_features, bits) + 4 * (tokens + out)
    depth = 64 if not isinstance(plan, PlainPlan) and plan.form == "FORM_S4" else 32
    # The mma is 16 × 8; weight rows are its 16 rows in decode, tokens in tiles.
    rows, columns = (out, tokens) if isinstance(plan, DecodePlan) else (tokens, out)
    mma = -(-rows // 16) * -(-columns // 8) * -(-in_features // depth)
    return Case(
        name=f"w4a{bits}_gemm[{type(plan).__name__.removesuffix('Plan').lower()},{tokens} tokens]",
        n1=in_features,
        n2=out,
        kernel=gemm_kernel(plan, bits, False, False, torch.float16),
        block=plan.block,
        shared_bytes=0 if isinstance(plan, PlainPlan) else plan.shared_bytes,
        fast=not isinstance(plan, PlainPlan),
        least=Least(
            sectors=(moved + 2 * tokens * out) / 32 / tokens, mma=0 if isinstance(plan, PlainPlan) else mma / tokens
        ),
        tokens=tokens,
        run=partial(_run, tokens, out, in_features, bits),
        reason=_WHY_TILED if isinstance(plan, TiledPlan) else _WHY_DECODE,
    )


_WHY_DECODE = (
    "weights are read once; each block stages the tokens' codes for itself, from L2; the last step of `in` is padded"
)
_WHY_TILED = "each tile reads its rows of both operands; tiles that run side by side find them in L2; edges are padded"


def _run(tokens: int, out: int, in_features: int, bits: int, device: Device) -> None:
    codes = torch.randint(0, 256, (tokens, packed_width(in_features, bits)), dtype=torch.uint8)
    weight = torch.randint(0, 256, (out, packed_width(in_features, 4)), dtype=torch.uint8)
    scale, weight_scale = torch.rand(tokens), torch.rand(out)
    launch_w4_gemm(device, codes, scale, None, weight, weight_scale, None, None, in_features, bits, torch.float16)


__all__ = [
    "Activations",
    "DecodePlan",
    "PlainPlan",
    "TiledPlan",
    "gemm_kernel",
    "launch_w4_gemm",
    "report_cases",
    "w4_gemm_reference",
    "w4a4_gemm",
    "w4a8_gemm",
]
