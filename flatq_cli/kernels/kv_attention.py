"""Decode attention straight over the packed K/V cache: its bytes are read once, and become numbers in registers.

`kv_attention.cu` is flash-decoding on tensor cores: the visible keys of a sequence are cut into spans, one a block,
that are merged by the block that finishes last. How many spans there may be is decided from sizes; how long they are,
and what else is hidden, on the device from `lengths` and `mask`. So nothing is read back to the host, and the op works
in CUDA graphs.
`kv_attention_plain.cu` is for other sizes, 8-bit codes and older GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flatq_cli.kernels.cases import Case, Least
from flatq_cli.kernels.device import Argument, Device, DeviceLimits, Kernel
from flatq_cli.kernels.kv_quant import HALF_NAMES, check_cache, check_devices, code_bits, dequantize_cache

MAX_QUERY = 16
"""Query rows of a head that one call takes."""

_KEYS = 32
"""Keys of a step of the fast kernel (`KEYS` in kv_attention.cu)."""

_SHORTEST_SPAN = 512
"""Keys of a full cache below which a span is not worth a block of its own, because of what merging costs; 32 a row."""

_RESERVED = 1024
"""Bytes of shared memory that the driver keeps for itself in each block."""


# ---- The definition. ----


def visible_keys(
    lengths: Tensor, first: Tensor | None, window: int, q_len: int, capacity: int, mask: Tensor | None = None
) -> Tensor:
    """Which keys each query sees, bool `[batch, q_len, capacity]`.

    Query i of sequence b stands at position lengths[b] - q_len + i and sees the keys first[b] … its own position, of
    those only the last `window` if `window` > 0. A `mask`, bool `[batch, q_len, keys]`, takes the place of the order:
    then it sees what the mask shows it of the keys first[b] … lengths[b] - 1.
    """
    key = torch.arange(capacity, device=lengths.device)
    position = lengths.long().unsqueeze(1) - q_len + torch.arange(q_len, device=lengths.device)
    last = position.unsqueeze(-1) if mask is None else lengths.view(-1, 1, 1) - 1
    seen = (key <= last).expand(-1, q_len, -1)
    if window > 0:
        seen = seen & (key > position.unsqueeze(-1) - window)
    if first is not None:
        seen = seen & (key >= first.view(-1, 1, 1))
    if mask is not None:
        seen = seen & pad(mask, (0, capacity - mask.shape[-1]))
    return seen


def attend_cache(
    query: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    softmax_scale: float,
    first: Tensor | None = None,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
) -> Tensor:
    """What `kv_attention` does, in torch, computed in `dtype`: exact attention over the dequantized cache.

    Args:
        k, v: (codes, scale, zero) as `kv_quant_` fills them.
    Returns:
        `[batch, heads, q_len, head_dim]` of `dtype`.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, capacity = k[0].shape[1:3]
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, q_len, head_dim)
    seen = visible_keys(lengths, first, window, q_len, capacity, mask).view(batch, 1, 1, q_len, capacity)
    used = seen.view(batch, 1, q_len, capacity).any(2, keepdim=True).transpose(2, 3)
    keys, values = (dequantize_cache(*part, head_dim, dtype).where(used, 0).unsqueeze(2) for part in (k, v))
    scores = (grouped @ keys.mT * softmax_scale).masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1).where(seen.any(-1, keepdim=True), 0)
    return (weights @ values).reshape(batch, heads, q_len, head_dim)


# ---- The plan. ----


@dataclass(frozen=True)
class AttentionPlan:
    """A launch on (splits, kv_heads · row_groups, batch) blocks.

    Args:
        rows: query rows of a block. row_groups: how many such groups a KV head's rows make; more than one only when
            there are more rows than a block takes, and then each group reads the cache.
    """

    kernel: Kernel
    splits: int
    row_groups: int
    rows: int
    block: int
    shared_bytes: int
    fast: bool


def plan_kv_attention(
    batch: int,
    kv_heads: int,
    group_rows: int,
    head_dim: int,
    capacity: int,
    bits: int,
    dtype: torch.dtype,
    limits: DeviceLimits,
    codes_begin: int = 0,
    zeros_begin: int = 0,
    masked: bool = False,
) -> AttentionPlan:
    """The kernel for `group_rows` query rows (heads / kv_heads · q_len) a KV head.

    The splits fill the chip's multiprocessors once, with as many blocks as each holds.

    Args:
        codes_begin, zeros_begin: addresses of the cache's codes and zeros, or those of K and V or-ed: how they are
            aligned is all that counts. A cache that is a view may begin anywhere.
        masked: there is a mask.
    """
    # Each head's codes begin at a multiple of 16 bytes.
    aligned = capacity * head_dim // 2 % 16 == 0 and codes_begin % 16 == 0
    if bits != 4 or limits.arch < 80 or head_dim % 16 or not aligned:
        common = (("HEAD_DIM", head_dim), ("TYPE", HALF_NAMES[dtype]), ("MASKED", int(masked)))
        kernel = Kernel("kv_attention_plain.cu", "kv_attention_plain", (*common, ("BITS", bits), ("WARPS", 4)))
        return AttentionPlan(kernel, 1, 1, 1, 128, 4 * (head_dim * 4 + 8), False)
    most = 8 if head_dim <= 128 else 4  # row tiles whose sums find room in shared memory
    tiles = min(most, 1 << (-(-group_rows // 16) - 1).bit_length())
    teams = max(1, 4 // tiles)
    warps = tiles * teams
    stages = 3 if limits.shared_per_block > 128 * 1024 else 2
    blocks = _blocks(head_dim, tiles, warps)
    shared_bytes = _shared_bytes(head_dim, tiles, teams, stages)
    resident = max(1, min(blocks, limits.shared_per_multiprocessor // (shared_bytes + _RESERVED)))
    row_groups = -(-group_rows // (16 * tiles))
    room = limits.multiprocessors * resident // (batch * kv_heads * row_groups)
    splits = max(1, min(room, -(-capacity // max(_SHORTEST_SPAN, 32 * 16 * tiles))))
    defines = (
        ("HEAD_DIM", head_dim),
        ("TYPE", HALF_NAMES[dtype]),
        ("ROW_TILES", tiles),
        ("TEAMS", teams),
        ("STAGES", stages),
        ("BLOCKS", blocks),
        ("COPY_ZEROS", int(capacity % 4 == 0 and zeros_begin % 4 == 0)),
        ("MASKED", int(masked)),
    )
    kernel = Kernel("kv_attention.cu", "kv_attention", defines)
    return AttentionPlan(kernel, splits, row_groups, 16 * tiles, 32 * warps, shared_bytes, True)


def _blocks(head_dim: int, tiles: int, warps: int) -> int:
    """Blocks of an SM that the registers suffice for: 168 a thread up to head_dim 64, 168 or 255 to 128, 255 above."""
    if warps > 4:
        return 1
    return 3 if head_dim <= 64 or (head_dim <= 128 and tiles == 1) else 2


def _shared_bytes(head_dim: int, tiles: int, teams: int, stages: int) -> int:
    """The query and the teams' rings while the cache is read; after that the teams' sums in their place."""
    rows = 16 * tiles
    reading = rows * (2 * head_dim + 16) + teams * stages * _KEYS * (head_dim + 10)
    merging = teams * rows * (-(-head_dim // 32) * 32 * 4 + 8) + 16
    return max(reading, merging)


# ---- The launch. ----


def launch_kv_attention(
    device: Device,
    query: Tensor,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    softmax_scale: float,
    first: Tensor | None = None,
    window: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """`kv_attention` on `device`, where the tensors live. `k`, `v`: (codes, scale, zero)."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, capacity = k[0].shape[1:3]
    query = query.contiguous()
    out = torch.empty_like(query)
    if out.numel() == 0:
        return out
    if capacity == 0:
        return out.zero_()
    if query.data_ptr() % 16:
        query = query.clone()
    bits, group_rows = code_bits(k[0], head_dim), heads // kv_heads * q_len
    codes_begin, zeros_begin = (k[i].data_ptr() | v[i].data_ptr() for i in (0, 2))
    plan = plan_kv_attention(
        batch, kv_heads, group_rows, head_dim, capacity, bits, query.dtype, device.limits, codes_begin, zeros_begin,
        mask is not None,
    )  # fmt: skip
    score_scale = softmax_scale * math.log2(math.e)
    tensors = [query, *k, *v, lengths.contiguous(), None if first is None else first.contiguous(), out]
    shown = _mask_arguments(mask)
    if not plan.fast:
        sizes: list[int | float] = [kv_heads, capacity, window, score_scale]
        device.launch(plan.kernel, (q_len, heads, batch), plan.block, plan.shared_bytes, [*tensors, *sizes, *shown])
        return out
    groups = batch * kv_heads * plan.row_groups
    partial = arrivals = None
    if plan.splits > 1:
        partial = query.new_empty(groups * plan.splits * plan.rows * (head_dim + 2), dtype=torch.float32)
        arrivals = query.new_zeros(groups, dtype=torch.int32)
    sizes = [kv_heads, group_rows, q_len, capacity, window, score_scale]
    grid = (plan.splits, kv_heads * plan.row_groups, batch)
    device.launch(plan.kernel, grid, plan.block, plan.shared_bytes, [*tensors, partial, arrivals, *sizes, *shown])
    return out


def _mask_arguments(mask: Tensor | None) -> tuple[Argument, ...]:
    """The mask's bytes, its strides over sequences (0: they share a row) and queries, and its keys."""
    if mask is None:
        return None, 0, 0, 0
    if mask.stride(2) != 1:
        mask = mask.contiguous()
    return mask, mask.stride(0), mask.stride(1), mask.shape[2]


# ---- The op. ----


@torch.library.custom_op("flatq::kv_attention", mutates_args=(), device_types="cpu")
def _kv_attention_op(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    lengths: Tensor,
    softmax_scale: float,
    first: Tensor | None,
    window: int,
    mask: Tensor | None,
) -> Tensor:
    k, v = (k_codes, k_scale, k_zero), (v_codes, v_scale, v_zero)
    return attend_cache(query, k, v, lengths, softmax_scale, first, window, mask=mask).to(query.dtype)


@_kv_attention_op.register_fake
def _(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    lengths: Tensor,
    softmax_scale: float,
    first: Tensor | None,
    window: int,
    mask: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape)


@_kv_attention_op.register_kernel("cuda")
def _(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    lengths: Tensor,
    softmax_scale: float,
    first: Tensor | None,
    window: int,
    mask: Tensor | None,
) -> Tensor:
    from flatq_cli.kernels.cuda import cuda_device

    k, v = (k_codes, k_scale, k_zero), (v_codes, v_scale, v_zero)
    return launch_kv_attention(cuda_device(query.device), query, k, v, lengths, softmax_scale, first, window, mask)


def kv_attention(
    query: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    lengths: Tensor,
    *,
    softmax_scale: float,
    first: Tensor | None = None,
    window: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of the last 1 to 16 positions of each sequence over its cache.

    Args:
        query: `[batch, heads, q_len, head_dim]`, float16 or bfloat16; heads a multiple of kv_heads, head_dim even, at
            most 256.
        k_codes, k_scale, k_zero, v_codes, v_scale, v_zero: as `kv_quant_` fills them, the queries' own keys included.
            The fast kernel wants 4-bit codes that begin at a multiple of 16 bytes, head_dim a multiple of 16, and at
            head_dim 80 an even capacity; a capacity that is a multiple of 4 lets it copy all of the cache
            asynchronously.
        lengths: int32 `[batch]`, keys of each sequence, the queries' own included; 0 to capacity.
        softmax_scale: factor on the scores, usually head_dim ** -0.5.
        first: int32 `[batch]`, the first key of each sequence (left padding lies before it). None: 0.
        window: how many keys a query sees at most, its own included. 0: all.
        mask: bool `[batch, q_len, keys]`, any strides, keys at most the capacity: True where a query sees a key; keys
            behind it are hidden. One row for all sequences may be expanded. None: the keys up to a query's position.
    Returns:
        Like `query`, contiguous: query i of sequence b stands at position lengths[b] - q_len + i and sees the keys
        first[b] … its position, or those that the mask shows it. A query that sees nothing gives 0.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    Source: flash-decoding (https://pytorch.org/blog/flash-decoding/).
    """
    where = "kv_attention"
    if query.dim() != 4 or query.dtype not in HALF_NAMES:
        raise ValueError(
            f"{where}: query must be float16 or bfloat16 [batch, heads, q_len, head_dim], "
            f"is {query.dtype} {list(query.shape)}"
        )
    batch, heads, q_len, head_dim = query.shape
    if not 1 <= q_len <= MAX_QUERY:
        raise ValueError(
            f"{where}: q_len must be 1 to {MAX_QUERY}, is {q_len}; attend longer prompts before they are packed"
        )
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"{where}: head_dim must be even and at most 256, is {head_dim}")
    check_cache(query, k_codes, k_scale, k_zero, where)
    check_cache(query, v_codes, v_scale, v_zero, where)
    if k_codes.shape != v_codes.shape:
        raise ValueError(
            f"{where}: k_codes is {list(k_codes.shape)} and v_codes {list(v_codes.shape)}; they must agree"
        )
    if k_codes.shape[1] == 0 or heads % k_codes.shape[1]:
        raise ValueError(f"{where}: {heads} heads are not a multiple of the cache's {k_codes.shape[1]} KV heads")
    for name, tensor in (("lengths", lengths), ("first", first)):
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype != torch.int32):
            raise ValueError(f"{where}: {name} must be int32 [{batch}], is {tensor.dtype} {list(tensor.shape)}")
    if window < 0:
        raise ValueError(f"{where}: window must be 0 (all keys) or more, is {window}")
    if mask is not None:
        _check_mask(mask, batch, q_len, k_codes.shape[2])
    check_devices(where, query=query, k_codes=k_codes, k_scale=k_scale, k_zero=k_zero, lengths=lengths, first=first)
    check_devices(where, query=query, v_codes=v_codes, v_scale=v_scale, v_zero=v_zero, mask=mask)
    out: Tensor = _kv_attention_op(
        query, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, lengths, softmax_scale, first, window, mask
    )
    return out


def _check_mask(mask: Tensor, batch: int, q_len: int, capacity: int) -> None:
    fits = mask.dim() == 3 and mask.shape[:2] == (batch, q_len) and mask.shape[2] <= capacity
    if not fits or mask.dtype != torch.bool:
        raise ValueError(
            f"kv_attention: mask must be bool [{batch}, {q_len}, keys], at most {capacity} keys, "
            f"is {mask.dtype} {list(mask.shape)}"
        )


# ---- For the report. ----


def report_cases(limits: DeviceLimits) -> list[Case]:
    """Decode, also with a mask, and a draft of 4 tokens; 4 query heads a KV head, at the head sizes of the Llama and
    Qwen families.
    """
    kinds = ((1, False), (1, True), (4, False))
    return [_report_case(limits, head_dim, q_len, masked) for head_dim in (64, 128) for q_len, masked in kinds]


def _report_case(limits: DeviceLimits, head_dim: int, q_len: int, masked: bool) -> Case:
    """Per token here means per key: what a key costs, the query and the merging included."""
    kv_heads, group, capacity = 2, 4, 16384
    plan = plan_kv_attention(1, kv_heads, group * q_len, head_dim, capacity, 4, torch.float16, limits, masked=masked)

    def run(device: Device) -> None:
        generator = torch.Generator().manual_seed(head_dim + q_len)
        query = torch.randn(1, kv_heads * group, q_len, head_dim, generator=generator).half()
        parts = []
        for _ in range(2):
            codes = torch.randint(0, 256, (1, kv_heads, capacity, head_dim // 2), generator=generator).to(torch.uint8)
            scale = torch.rand(1, kv_heads, capacity, generator=generator)
            parts.append((codes, scale, torch.full((1, kv_heads, capacity), 7, dtype=torch.uint8)))
        lengths = torch.tensor([capacity], dtype=torch.int32)
        mask = torch.ones(1, q_len, capacity, dtype=torch.bool) if masked else None
        launch_kv_attention(device, query, parts[0], parts[1], lengths, head_dim**-0.5, mask=mask)

    least = Least(
        sectors=kv_heads * (head_dim + 10) / 32
        + q_len * masked / 32
        + 2 * kv_heads * group * q_len * head_dim * 2 / 32 / capacity,
        mma=kv_heads * -(-group * q_len // 16) * 2 * head_dim / 128,
    )
    return Case(
        f"kv_attention[int4,f16,q{q_len}{',mask' if masked else ''}]",
        head_dim,
        capacity,
        plan.kernel,
        plan.block,
        plan.shared_bytes,
        plan.fast,
        least,
        capacity,
        run,
    )
