"""Filling the K/V cache: rows are transformed, rounded to asymmetric 4-bit codes and packed into the cache in one read.

The cache of one layer is three tensors for K and three for V: codes uint8 `[batch, kv_heads, capacity, head_dim / 2]`
(even index in the low nibble; `head_dim` wide: 8-bit codes), scale float32 and zero uint8
`[batch, kv_heads, capacity]`. A number is (code - zero) · scale. Per token and head that is head_dim / 2 + 5 bytes, in
place of 2 · head_dim.

Two kernels fill it: `kv_quant_tensor.cu` multiplies by the head's matrix on tensor cores and rounds the float32 sums
directly; `kv_quant_plain.cu` holds a streaming kernel for rows without a matrix (it is folded into v_proj) and one for
any size and GPU. `kv_quant_inverse.cu` reads the numbers back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.codes import pack_codes, packed_width, quantize_rows, unpack_codes
from flatq_cli.kernels.device import Argument, Device, DeviceLimits, Kernel, aligned

HALF_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16"}
"""The 16-bit types' tags in the CUDA sources."""

_WARPS = 4
"""Warps of a block."""

_RESERVED = 1024
"""Bytes of shared memory that the driver keeps for itself in each block (sm_80 up)."""


def code_bits(codes: Tensor, head_dim: int) -> int:
    """4 or 8: what the cache's rows of `codes.shape[-1]` bytes hold."""
    return 8 if codes.shape[-1] == head_dim else 4


# ---- The definition. ----


def quantize_into_cache(
    x: Tensor, matrix: Tensor | None, clip: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, start: Tensor
) -> None:
    """What `kv_quant_` does, in torch: float32 products, `quantize_rows`, and rows written where they fit."""
    y = x.float() if matrix is None else x.float() @ matrix.float()
    bits = code_bits(codes, x.shape[-1])
    numbers, steps, zeros = quantize_rows(y, clip, bits, symmetric=False)
    slots = start.long().unsqueeze(1) + torch.arange(x.shape[2], device=x.device)
    batch, token = ((slots >= 0) & (slots < codes.shape[2])).nonzero(as_tuple=True)
    slot = slots[batch, token]
    codes[batch, :, slot] = pack_codes(numbers, bits)[batch, :, token]
    scale[batch, :, slot] = steps[batch, :, token]
    zero[batch, :, slot] = zeros[batch, :, token].to(torch.uint8)


def dequantize_cache(codes: Tensor, scale: Tensor, zero: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """What `kv_dequant` does, in torch; float64 is computed in float64, everything else in float32."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = unpack_codes(codes, code_bits(codes, head_dim), head_dim, signed=False)
    return ((numbers - zero.unsqueeze(-1).int()).to(work) * scale.unsqueeze(-1).to(work)).to(dtype)


# ---- The plans. ----


@dataclass(frozen=True)
class QuantPlan:
    """A launch on `grid` blocks. `aligned`: the kernel reads rows 16 bytes at a time."""

    kernel: Kernel
    grid: int
    block: int
    shared_bytes: int
    aligned: bool
    fast: bool


def plan_kv_quant(
    rows: int, head_dim: int, bits: int, dtype: torch.dtype, transformed: bool, limits: DeviceLimits
) -> QuantPlan:
    """The kernel for `rows` rows (batch · heads · tokens)."""
    if not transformed and head_dim % 8 == 0:
        return _rows_plan(rows, head_dim, bits, dtype, limits)
    if transformed and limits.arch >= 80 and head_dim % 16 == 0 and (head_dim <= 128 or head_dim in (192, 256)):
        return _tensor_plan(rows, head_dim, bits, dtype, limits)
    return _plain_plan(rows, head_dim, bits, dtype, transformed)


def _tensor_plan(rows: int, head_dim: int, bits: int, dtype: torch.dtype, limits: DeviceLimits) -> QuantPlan:
    """Up to 128 the whole matrix stays in shared memory; above, a panel of it at a time and 8 warps to share it."""
    panel = {192: 96, 256: 64}.get(head_dim, head_dim)
    warps, blocks = (8, 1) if panel < head_dim else (4, 4 if head_dim <= 64 else 3)
    shared_bytes = panel * (2 * head_dim + 16) * (2 if panel < head_dim else 1)
    defines = (*_defines(head_dim, bits, dtype), ("WARPS", warps), ("BLOCKS", blocks), ("PANEL", panel))
    resident = min(blocks, limits.shared_per_multiprocessor // (shared_bytes + _RESERVED))
    return QuantPlan(
        kernel=Kernel("kv_quant_tensor.cu", "kv_quant_tensor", defines),
        grid=min(-(-rows // (16 * warps)), limits.multiprocessors * resident),
        block=32 * warps,
        shared_bytes=shared_bytes,
        aligned=True,
        fast=True,
    )


def _rows_plan(rows: int, head_dim: int, bits: int, dtype: torch.dtype, limits: DeviceLimits) -> QuantPlan:
    """32 rows a warp, so that their scales fill whole sectors, unless that would leave multiprocessors idle."""
    lanes = 1 << (head_dim // 8 - 1).bit_length()
    warp_rows = 32 if rows >= 32 * _WARPS * limits.multiprocessors else 32 // lanes
    return QuantPlan(
        kernel=Kernel("kv_quant_plain.cu", "kv_quant_rows", _plain_defines(head_dim, bits, dtype, lanes, warp_rows, 0)),
        grid=-(-rows // (_WARPS * warp_rows)),
        block=32 * _WARPS,
        shared_bytes=0,
        aligned=True,
        fast=True,
    )


def _plain_plan(rows: int, head_dim: int, bits: int, dtype: torch.dtype, transformed: bool) -> QuantPlan:
    """A warp a row."""
    defines = _plain_defines(head_dim, bits, dtype, 32, 1, int(transformed))
    kernel = Kernel("kv_quant_plain.cu", "kv_quant_plain", defines)
    return QuantPlan(kernel, -(-rows // _WARPS), 32 * _WARPS, 0, aligned=False, fast=False)


def _plain_defines(
    head_dim: int, bits: int, dtype: torch.dtype, lanes: int, warp_rows: int, matrix: int
) -> tuple[tuple[str, int | str], ...]:
    mine = (("WARPS", _WARPS), ("ROW_LANES", lanes), ("WARP_ROWS", warp_rows), ("MATRIX", matrix))
    return _defines(head_dim, bits, dtype) + mine


def _defines(head_dim: int, bits: int, dtype: torch.dtype) -> tuple[tuple[str, int | str], ...]:
    return (("HEAD_DIM", head_dim), ("BITS", bits), ("TYPE", HALF_NAMES[dtype]))


def dequant_kernel(head_dim: int, bits: int, dtype: torch.dtype) -> Kernel:
    """The kernel whose threads store 16 bytes each, if a row divides into that."""
    name = "F32" if dtype == torch.float32 else HALF_NAMES[dtype]
    wide = bits // 2 if dtype == torch.float32 else bits
    row = head_dim * bits // 8
    read = wide if row % wide == 0 else 1
    defines: tuple[tuple[str, int | str], ...] = (
        ("HEAD_DIM", head_dim),
        ("BITS", bits),
        ("OUT", name),
        ("BYTES", read),
    )
    return Kernel("kv_quant_inverse.cu", "kv_dequant", defines)


# ---- The launches. ----


def launch_kv_quant(
    device: Device,
    x: Tensor,
    matrix: Tensor | None,
    clip: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    start: Tensor,
) -> None:
    """`kv_quant_` on `device`, where the tensors live."""
    batch, heads, tokens, head_dim = x.shape
    rows = batch * heads * tokens
    if rows == 0:
        return
    bits = code_bits(codes, head_dim)
    plan = plan_kv_quant(rows, head_dim, bits, x.dtype, matrix is not None, device.limits)
    # Rows of the cache are stored in words that divide them, and an output cannot be copied to where those would fit.
    if codes.data_ptr() % math.gcd(codes.shape[3], 16):
        plan = _plain_plan(rows, head_dim, bits, x.dtype, matrix is not None)
    if not _readable(x, plan.aligned):
        x = x.clone(memory_format=torch.contiguous_format)  # a contiguous view may begin anywhere
    if matrix is not None:
        matrix = aligned(matrix)
    sizes: list[int] = [rows, heads, tokens, codes.shape[2], x.stride(0), x.stride(1), x.stride(2)]
    arguments: list[Argument] = [x, matrix, clip.contiguous(), codes, scale, zero, start.contiguous(), *sizes]
    device.launch(plan.kernel, (plan.grid, 1, 1), plan.block, plan.shared_bytes, arguments)


def _readable(x: Tensor, aligned: bool) -> bool:
    """Whether the kernel can read `x` through its strides: rows in one piece, at multiples of 16 bytes if `aligned`."""
    strides = x.stride()
    if strides[3] != 1 or max(strides) >= 2**31:
        return False
    return not aligned or (all(stride % 8 == 0 for stride in strides[:3]) and x.data_ptr() % 16 == 0)


def launch_kv_dequant(device: Device, codes: Tensor, scale: Tensor, zero: Tensor, head_dim: int, out: Tensor) -> None:
    """`kv_dequant` on `device` into `out` `[batch, kv_heads, capacity, head_dim]`, contiguous."""
    if out.numel() == 0:
        return
    kernel = dequant_kernel(head_dim, code_bits(codes, head_dim), out.dtype)
    word = int(dict(kernel.defines)["BYTES"])
    threads = codes.numel() // word
    arguments: list[Argument] = [aligned(codes, word), scale.contiguous(), zero.contiguous(), out, scale.numel()]
    device.launch(kernel, (-(-threads // 256), 1, 1), 256, 0, arguments)


# ---- The ops. ----


@torch.library.custom_op("flatq::kv_quant_", mutates_args=("codes", "scale", "zero"), device_types="cpu")
def _kv_quant_op(
    x: Tensor, matrix: Tensor | None, clip: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, start: Tensor
) -> None:
    quantize_into_cache(x, matrix, clip, codes, scale, zero, start)


@_kv_quant_op.register_fake
def _(
    x: Tensor, matrix: Tensor | None, clip: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, start: Tensor
) -> None:
    return None


@_kv_quant_op.register_kernel("cuda")
def _(
    x: Tensor, matrix: Tensor | None, clip: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, start: Tensor
) -> None:
    from flatq_cli.kernels.cuda import cuda_device

    launch_kv_quant(cuda_device(x.device), x, matrix, clip, codes, scale, zero, start)


@torch.library.custom_op("flatq::kv_dequant", mutates_args=(), device_types="cpu")
def _kv_dequant_op(codes: Tensor, scale: Tensor, zero: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return dequantize_cache(codes, scale, zero, head_dim, dtype)


@_kv_dequant_op.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], head_dim), dtype=dtype)


@_kv_dequant_op.register_kernel("cuda")
def _(codes: Tensor, scale: Tensor, zero: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    from flatq_cli.kernels.cuda import cuda_device

    out = codes.new_empty((*codes.shape[:-1], head_dim), dtype=dtype)
    launch_kv_dequant(cuda_device(codes.device), codes, scale, zero, head_dim, out)
    return out


def kv_quant_(
    x: Tensor, matrix: Tensor | None, clip: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, start: Tensor
) -> None:
    """Transform rows of K or V, round them to 4 (or 8) bits and write them into the cache, in place.

    Args:
        x: `[batch, kv_heads, tokens, head_dim]`, float16 or bfloat16, any strides (it is copied first unless the last
            is 1 and rows begin at multiples of 16 bytes); head_dim even, at most 256.
        matrix: `[head_dim, head_dim]` of x's dtype; rows become x · matrix, in float32. None: rows as they are.
        clip: float32 `[2]`, factors on a row's maximum and minimum.
        codes: uint8 `[batch, kv_heads, capacity, head_dim / 2]`, or `head_dim` wide for 8 bits; contiguous. Where it
            does not begin at a multiple of 16 bytes (or of what divides a row) the plain kernel writes it.
        scale, zero: float32 and uint8 `[batch, kv_heads, capacity]`, contiguous.
        start: int32 `[batch]`, on x's device: token t of sequence b goes to row start[b] + t. Rows outside the
            capacity are dropped, because nothing can be raised from values that only the device knows.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    A row with a NaN or an infinity gets scale NaN; its codes mean nothing.
    """
    _check_rows(x, matrix, clip)
    _check_cache(x.shape[0], x.shape[1], x.shape[3], codes, scale, zero, "kv_quant_")
    if start.shape != x.shape[:1] or start.dtype != torch.int32:
        raise ValueError(f"kv_quant_: start must be int32 [{x.shape[0]}], is {start.dtype} {list(start.shape)}")
    check_devices("kv_quant_", x=x, matrix=matrix, clip=clip, codes=codes, scale=scale, zero=zero, start=start)
    _kv_quant_op(x, matrix, clip, codes, scale, zero, start)


def kv_dequant(
    codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, *, head_dim: int | None = None
) -> Tensor:
    """The numbers of a cache, (code - zero) · scale, in one rounding to `dtype`.

    Args:
        codes, scale, zero: as `kv_quant_` fills them.
        dtype: float16, bfloat16 or float32.
        head_dim: by default twice the width of `codes`; the width itself: 8-bit codes.
    Returns:
        `[batch, kv_heads, capacity, head_dim]`.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    head_dim = 2 * codes.shape[-1] if head_dim is None else head_dim
    if dtype not in (*HALF_NAMES, torch.float32):
        raise ValueError(f"kv_dequant: dtype must be float16, bfloat16 or float32, is {dtype}")
    if codes.dim() != 4:
        raise ValueError(f"kv_dequant: codes must be [batch, kv_heads, capacity, bytes], is {list(codes.shape)}")
    _check_cache(codes.shape[0], codes.shape[1], head_dim, codes, scale, zero, "kv_dequant")
    check_devices("kv_dequant", codes=codes, scale=scale, zero=zero)
    out: Tensor = _kv_dequant_op(codes, scale, zero, head_dim, dtype)
    return out


def _check_rows(x: Tensor, matrix: Tensor | None, clip: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in HALF_NAMES:
        raise ValueError(
            "kv_quant_: x must be float16 or bfloat16 [batch, kv_heads, tokens, head_dim], "
            f"is {x.dtype} {list(x.shape)}"
        )
    head_dim = x.shape[3]
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"kv_quant_: head_dim must be even and at most 256, is {head_dim}")
    if matrix is not None and (matrix.shape != (head_dim, head_dim) or matrix.dtype != x.dtype):
        raise ValueError(
            f"kv_quant_: matrix must be {x.dtype} [{head_dim}, {head_dim}] like x, "
            f"is {matrix.dtype} {list(matrix.shape)}"
        )
    if clip.shape != (2,) or clip.dtype != torch.float32:
        raise ValueError(f"kv_quant_: clip must be float32 [2], is {clip.dtype} {list(clip.shape)}")


def _check_cache(batch: int, heads: int, head_dim: int, codes: Tensor, scale: Tensor, zero: Tensor, where: str) -> None:
    """That three tensors are a cache of `heads` heads for `batch` sequences."""
    if codes.dim() != 4 or codes.dtype != torch.uint8 or codes.shape[:2] != (batch, heads):
        raise ValueError(
            f"{where}: codes must be uint8 [{batch}, {heads}, capacity, bytes], is {codes.dtype} {list(codes.shape)}"
        )
    if codes.shape[3] not in (packed_width(head_dim, 4), head_dim):
        raise ValueError(
            f"{where}: codes must have {head_dim // 2} (4 bits) or {head_dim} (8 bits) bytes a row, "
            f"have {codes.shape[3]}"
        )
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero", zero, torch.uint8)):
        if tensor.shape != codes.shape[:3] or tensor.dtype != dtype:
            raise ValueError(
                f"{where}: {name} must be {dtype} {list(codes.shape[:3])} like codes, "
                f"is {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in (("codes", codes), ("scale", scale), ("zero", zero)):
        if not tensor.is_contiguous():
            raise ValueError(f"{where}: the cache's {name} must be contiguous; allocate it in one piece")


def check_cache(query: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, where: str) -> None:
    """That three tensors are a cache for the sequences of `query` `[batch, heads, q_len, head_dim]`."""
    heads = codes.shape[1] if codes.dim() == 4 else 0
    _check_cache(query.shape[0], heads, query.shape[3], codes, scale, zero, where)


def check_devices(where: str, **tensors: Tensor | None) -> None:
    """That all tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{where}: all tensors must be on one device: {places}")


# ---- For the report. ----


def report_cases(limits: DeviceLimits) -> list[Case]:
    """K with its matrix, V without, at the head sizes of the Llama and Qwen families."""
    return [_report_case(limits, head_dim, transformed) for head_dim in (64, 128) for transformed in (True, False)]


def _report_case(limits: DeviceLimits, head_dim: int, transformed: bool) -> Case:
    heads, tokens = 2, 8192
    plan = plan_kv_quant(heads * tokens, head_dim, 4, torch.float16, transformed, limits)

    def run(device: Device) -> None:
        generator = torch.Generator().manual_seed(head_dim)
        x = torch.randn(1, heads, tokens, head_dim, generator=generator).half()
        matrix = torch.randn(head_dim, head_dim, generator=generator).half() if transformed else None
        codes = torch.zeros(1, heads, tokens, head_dim // 2, dtype=torch.uint8)
        scale, zero = torch.zeros(1, heads, tokens), torch.zeros(1, heads, tokens, dtype=torch.uint8)
        launch_kv_quant(device, x, matrix, torch.ones(2), codes, scale, zero, torch.zeros(1, dtype=torch.int32))

    name = "kv_quant[int4,f16,matrix]" if transformed else "kv_quant[int4,f16]"
    rows = heads  # of one token
    least = Least(
        sectors=rows * (2 * head_dim + head_dim / 2 + 5) / 32,
        mma=rows * (head_dim / 16) * (head_dim / 8) / 16 if transformed else 0,
    )
    return Case(name, head_dim, tokens, plan.kernel, plan.block, plan.shared_bytes, plan.fast, least, tokens, run)
