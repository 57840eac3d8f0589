"""How a 4-bit GEMM is laid over a GPU: which kernel, which tile, how many blocks share a sum. Pure functions of sizes.

The figures in the cost models are nominal, not measured; they decide between layouts that are all correct.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from flatq_cli.kernels.device import DeviceLimits

STEP = 128  # codes of `in` that the kernels take at once (w4_gemm.cuh)
GREATEST_FAST_IN = 65536  # int32 cannot overflow up to here (w4_gemm.cuh)
DECODE_TOKENS = 16
WARP = 32
_RESERVED = 1024  # bytes of shared memory that the system takes of each block
_WEIGHT_BYTES = STEP // 2


@dataclass(frozen=True)
class TiledPlan:
    """w4_gemm_tiled: a block computes `tile_tokens` × `tile_out` outputs with 2 × 2 warps.

    Args:
        form: FORM of w4_gemm.cuh. stages: of the ring of shared memory. blocks: resident on an SM.
        split_steps: steps of 128 codes of one of the `splits` blocks of a tile. tiles: of the whole output.
    """

    form: str
    tile_tokens: int
    tile_out: int
    stages: int
    blocks: int
    splits: int
    split_steps: int
    tiles: int
    shared_bytes: int

    @property
    def block(self) -> int:
        return 4 * WARP

    @property
    def grid(self) -> int:
        return self.tiles * self.splits

    @property
    def parts(self) -> int:
        """int32 numbers of workspace through which the splits meet."""
        return self.tiles * self.splits * self.tile_tokens * self.tile_out if self.splits > 1 else 0


@dataclass(frozen=True)
class DecodePlan:
    """w4_gemm_decode: a block goes over every `stays`-th block of 16 · `warps_out` rows of weights.

    Args:
        form: FORM of w4_gemm.cuh. token_tiles: of 8 tokens. warps_out, warps_in: side by side, sharing `in`.
        row_blocks: of all rows. stays: how many of them are under way at once.
        split_steps: steps of 128 codes of one of the `splits` blocks of a row block.
    """

    form: str
    token_tiles: int
    warps_out: int
    warps_in: int
    row_blocks: int
    stays: int
    splits: int
    split_steps: int
    shared_bytes: int

    @property
    def block(self) -> int:
        return self.warps_out * self.warps_in * WARP

    @property
    def grid(self) -> int:
        return self.stays * self.splits

    @property
    def tiles(self) -> int:
        return self.row_blocks

    @property
    def parts(self) -> int:
        """int32 numbers of workspace through which the splits meet."""
        return self.row_blocks * self.splits * 16 * self.warps_out * 8 * self.token_tiles if self.splits > 1 else 0


@dataclass(frozen=True)
class PlainPlan:
    """w4_gemm_plain: a warp computes one output of 8 tokens."""

    grid: int
    block: int


GemmPlan: TypeAlias = TiledPlan | DecodePlan | PlainPlan


def form_of(activation_bits: int, arch: int) -> str:
    """How codes reach the tensor cores: as int4 where silicon has it (sm_80 to 89), else as int8."""
    if activation_bits == 8:
        return "FORM_A8"
    return "FORM_S4" if 80 <= arch < 90 else "FORM_S8"


def gemm_plan(
    tokens: int, out: int, in_features: int, activation_bits: int, groups: int, limits: DeviceLimits
) -> GemmPlan:
    """The kernel and its layout for one size; tokens, out ≥ 1."""
    if limits.arch < 80 or groups > 1 or in_features % 32 or in_features > GREATEST_FAST_IN:
        return plain_plan(tokens, out)
    form = form_of(activation_bits, limits.arch)
    if tokens <= DECODE_TOKENS:
        return decode_plan(tokens, out, in_features, form, limits)
    return tiled_plan(tokens, out, in_features, form, limits)


def plain_plan(tokens: int, out: int) -> PlainPlan:
    """Eight warps a block, a warp for each output of 8 tokens."""
    return PlainPlan(grid=_ceil(_ceil(tokens, 8) * out, 8), block=8 * WARP)


# ---- Many tokens. ----

# Tiles and how many blocks of them an SM holds by registers.
TILES = ((128, 128, 2), (64, 128, 3), (64, 64, 4), (32, 64, 4))
_L2_RATE = 32  # bytes that an SM takes from L2 in a clock
_MEMORY_RATE = 12  # bytes in a clock that are an SM's share of the memory's bandwidth,
_UNDER_WAY = 20 * 1024  # and how many it must have asked for to get them
_LAUNCH_CLOCKS = 1500
_BLOCK_CLOCKS = 800  # filling the ring and storing the outputs
_STEP_CLOCKS = 30  # barrier and addresses of a step
_MEET_CLOCKS = 4000  # workspace cleared, counters, the last block's wait


@lru_cache(maxsize=1024)
def tiled_plan(tokens: int, out: int, in_features: int, form: str, limits: DeviceLimits) -> TiledPlan:
    """The tile and split that are done first: by the most loaded SM's mma or copies, or by reading the weights."""
    layouts = [
        tiled_layout(tokens, out, in_features, form, (tile_tokens, tile_out), splits, limits)
        for tile_tokens, tile_out, _ in TILES
        for splits in (1, 2, 3, 4, 6, 8)
    ]
    return min(layouts, key=lambda plan: _tiled_clocks(plan, tokens, out * in_features // 2, limits))


def tiled_layout(
    tokens: int, out: int, in_features: int, form: str, tile: tuple[int, int], splits: int, limits: DeviceLimits
) -> TiledPlan:
    """One of the candidates of `tiled_plan`, with at most `splits` splits; tests and benchmarks ask for each."""
    tile_tokens, tile_out = tile
    blocks = next(blocks for *known, blocks in TILES if tuple(known) == tile)
    stage = tile_tokens * code_bytes(form) + tile_out * _WEIGHT_BYTES
    room = min(limits.shared_per_block, limits.shared_per_multiprocessor // blocks - _RESERVED) - 16
    stages = max(2, min(4, room // stage))
    shared_bytes = stages * stage + 16
    split_steps = _ceil(_ceil(in_features, STEP), splits)
    return TiledPlan(
        form=form,
        tile_tokens=tile_tokens,
        tile_out=tile_out,
        stages=stages,
        blocks=min(blocks, limits.shared_per_multiprocessor // (shared_bytes + _RESERVED)),
        splits=_ceil(_ceil(in_features, STEP), split_steps),
        split_steps=split_steps,
        tiles=_ceil(tokens, tile_tokens) * _ceil(out, tile_out),
        shared_bytes=shared_bytes,
    )


def _tiled_clocks(plan: TiledPlan, tokens: int, weight_bytes: int, limits: DeviceLimits) -> float:
    macs = 4096 if plan.form == "FORM_S4" or limits.arch >= 90 else 2048  # in a clock of an SM
    area = plan.tile_tokens * plan.tile_out
    copied = min(tokens, plan.tile_tokens) * code_bytes(plan.form) + plan.tile_out * _WEIGHT_BYTES
    step = max(area * STEP / macs, copied / _L2_RATE) + _STEP_CLOCKS
    parts = 2 * 4 * area / _L2_RATE if plan.splits > 1 else 0.0
    work = _ceil(plan.grid, limits.multiprocessors) * (plan.split_steps * step + _BLOCK_CLOCKS + parts)
    resident = min(plan.blocks, plan.grid / limits.multiprocessors)
    under_way = resident * (plan.stages - 1) * copied
    reading = weight_bytes / limits.multiprocessors / _MEMORY_RATE / min(1.0, under_way / _UNDER_WAY)
    return max(work, reading) + _LAUNCH_CLOCKS + (_MEET_CLOCKS if plan.splits > 1 else 0)


# ---- 1 to 16 tokens. ----

_WARPS = 8
_DEPTH = 4  # steps that a warp loads at once (w4_gemm_decode.cu)
_DECODE_BLOCKS = 2  # resident on an SM
_GREATEST_SPLITS = 32  # then 16 tokens of 65536 codes of 8 bits take 32 KiB of shared memory
_SPLIT_BYTES = 40 * 1024  # what an SM could have read while the workspace is cleared and the parts meet


@lru_cache(maxsize=1024)
def decode_plan(tokens: int, out: int, in_features: int, form: str, limits: DeviceLimits) -> DecodePlan:
    """The layout with the least bytes through the most loaded SM.

    More rows a block read the activations less often; more blocks, by fewer rows or by splits of `in`, keep more SMs
    busy; splits write and read their parts.
    """
    layouts = [
        decode_layout(tokens, out, in_features, form, warps_out, splits, limits)
        for warps_out in (8, 4, 2, 1)  # of equals, that with the fewest merges
        for splits in range(1, min(_ceil(in_features, STEP), _GREATEST_SPLITS) + 1)
    ]
    room = min(limits.shared_per_block, limits.shared_per_multiprocessor // _DECODE_BLOCKS - _RESERVED)
    fitting = [plan for plan in layouts if plan.shared_bytes <= room]
    return min(fitting, key=lambda plan: _decode_bytes(plan, tokens, limits))


def decode_layout(
    tokens: int, out: int, in_features: int, form: str, warps_out: int, splits: int, limits: DeviceLimits
) -> DecodePlan:
    """One of the candidates of `decode_plan`, with at most `splits` splits; tests and benchmarks ask for each."""
    steps = _ceil(in_features, STEP)
    split_steps = _ceil(steps, splits)
    splits = _ceil(steps, split_steps)
    row_blocks = _ceil(out, 16 * warps_out)
    most = min(row_blocks, max(1, _DECODE_BLOCKS * limits.multiprocessors // splits))
    warps_in, token_tiles = _WARPS // warps_out, _ceil(tokens, 8)
    merge_bytes = (warps_in - 1) * warps_out * token_tiles * WARP * 16
    return DecodePlan(
        form=form,
        token_tiles=token_tiles,
        warps_out=warps_out,
        warps_in=warps_in,
        row_blocks=row_blocks,
        stays=_ceil(row_blocks, _ceil(row_blocks, most)),  # as few as do it in the same number of rounds
        splits=splits,
        split_steps=split_steps,
        shared_bytes=tokens * code_bytes(form) * split_steps + merge_bytes + 144,
    )


def _decode_bytes(plan: DecodePlan, tokens: int, limits: DeviceLimits) -> float:
    rounds = _ceil(plan.row_blocks, plan.stays)
    weights = rounds * 16 * plan.warps_out * plan.split_steps * _WEIGHT_BYTES
    codes = tokens * code_bytes(plan.form) * plan.split_steps
    parts = rounds * 16 * plan.warps_out * plan.token_tiles * 8 * 4 * 2 if plan.splits > 1 else 0
    block = weights + codes + parts
    resident = _ceil(plan.grid, limits.multiprocessors)
    # A resident block with all its warps at work has 32 KiB under way, a third more than an SM's share of the memory's
    # bandwidth asks for; an SM alone can take about 2.5 times that share.
    busy = min(1.0, plan.split_steps / (plan.warps_in * _DEPTH))
    alone = resident * block / min(4 / 3 * resident * busy, 2.5)
    return max(plan.grid * block / limits.multiprocessors, alone) + (_SPLIT_BYTES if plan.splits > 1 else 0)


def code_bytes(form: str) -> int:
    """Bytes of a token's codes in a step."""
    return STEP if form == "FORM_A8" else STEP // 2


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
