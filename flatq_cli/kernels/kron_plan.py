"""Which kernel of kron_quant runs a size on a device, how it is cut into warps and stages, and what it needs.

`kron_plan` is a pure function: it lists the ways in which `kron_quant.cu` can be built for a size, keeps those that fit
the device's registers and shared memory, and takes the one that is ahead by the reasons in `_preference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flatq_cli.kernels.device import DeviceLimits, Kernel

TILE = 16
WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor
REGISTERS_PER_THREAD = 255
SHARED_PER_BLOCK_RESERVED = 1024  # what CUDA takes of a multiprocessor's shared memory for each block
PLAIN_BLOCK = 512
FEW_TOKENS = 16  # up to here a block takes one token: every multiprocessor that can help does

Prologue = Literal["none", "norm", "gate"]


@dataclass(frozen=True)
class KronSize:
    """What a kernel is specialized for.

    Args:
        n1, n2: sizes of the two factors. left, right: whether there is such a factor (otherwise the identity).
        dtype: `F16` or `BF16`. bits: 4 or 8.
    """

    n1: int
    n2: int
    left: bool = True
    right: bool = True
    dtype: Literal["F16", "BF16"] = "F16"
    bits: int = 4
    symmetric: bool = True
    prologue: Prologue = "none"

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.n1 // TILE)

    @property
    def padded2(self) -> int:
        """n2 rounded up to a multiple of 16."""
        return -(-self.n2 // TILE) * TILE

    @property
    def column_tiles(self) -> int:
        """Tiles of 8 columns."""
        return -(-self.n2 // 8)


@dataclass(frozen=True)
class KronPlan:
    """How a launch is made.

    Args:
        kernel: what is compiled. block: threads. shared_bytes: of a block.
        tokens_per_block: how many tokens a block works on together.
        blocks: the most blocks worth launching; they share the tokens among them.
        fast: tensor cores; otherwise the plain kernel.
    """

    kernel: Kernel
    block: int
    shared_bytes: int
    tokens_per_block: int
    blocks: int
    fast: bool

    def grid(self, tokens: int) -> int:
        """Blocks for `tokens` tokens."""
        return max(1, min(-(-tokens // self.tokens_per_block), self.blocks))


@dataclass(frozen=True)
class _Cut:
    """One way to build `kron_quant.cu`; the fields are its macros of the same names."""

    size: KronSize
    row_tiles: int  # tiles of 16 rows that a warp owns
    warp_tokens: int  # tokens in which it owns them
    groups: int  # groups of warps in a block, each with its own tokens
    panel: int  # columns of X that arrive together
    slots: int  # of the ring of panels
    stream_right: bool  # right comes with the panels (from L2) and does not stay in shared memory
    passes: int  # over a token's rows
    norm_shared: bool  # the norm's weight stays in shared memory

    @property
    def group_warps(self) -> int:
        return -(-self.size.row_tiles // (self.row_tiles * self.passes))

    @property
    def warps(self) -> int:
        return self.group_warps * self.groups

    @property
    def tokens(self) -> int:
        return self.groups * self.warp_tokens

    @property
    def shared_bytes(self) -> int:
        """Exactly TOTAL_BYTES of kron_quant.cu (which asserts it)."""
        size = self.size
        pairs = -(-size.column_tiles // 2)
        chunks = size.column_tiles if self.panel == size.padded2 else self.panel // 8
        inputs = 2 if size.prologue == "gate" else 1
        right = (self.panel if self.stream_right else size.padded2) // TILE * pairs * 512 if size.right else 0
        x = self.tokens * inputs * size.row_tiles * TILE * chunks * 16
        slot = x + (right if self.stream_right else 0)
        aside = size.column_tiles * 2 * WARP * 4 if self.passes > 1 else 0
        stage = 0 if self.direct else 16 * ((size.column_tiles * size.bits + 15) // 32 * 32 + 16)
        weight = -(-size.n1 * size.n2 * 2 // 16) * 16 if self.norm_shared else 0
        kept = (0 if self.stream_right else right) + weight
        return self.slots * slot + kept + self.warps * (aside + stage + self.warp_tokens * 12)

    @property
    def direct(self) -> bool:
        """Codes go straight from registers to global memory in whole sectors."""
        return self.size.right and (self.size.n2 % 64 == 0 or self.size.n2 in (16, 32))

    @property
    def registers(self) -> int:
        """An estimate per thread, on the safe side: Z, left's fragments, and what the rest took in compilations."""
        z = self.row_tiles * self.warp_tokens * self.size.column_tiles * 4
        left = self.row_tiles * self.size.row_tiles * 4 if self.size.left else 0
        rest = 96 if self.warp_tokens > 1 else 76 if self.row_tiles > 1 else 48
        if not self.size.right:
            rest = max(rest, 64 if self.passes == 1 else 80)
        return z + left + rest

    def blocks_per_multiprocessor(self, limits: DeviceLimits) -> int:
        by_shared = limits.shared_per_multiprocessor // (self.shared_bytes + SHARED_PER_BLOCK_RESERVED)
        by_registers = 0
        while self._cap(by_registers + 1) >= min(self.registers, REGISTERS_PER_THREAD):
            by_registers += 1
        by_threads = (2048 if limits.arch in (70, 80, 90, 100) else 1536) // (WARP * self.warps)
        return min(by_shared, by_registers, by_threads, 32)

    def _cap(self, blocks: int) -> int:
        """The registers a thread may have when `blocks` blocks run on a multiprocessor (as ptxas rounds)."""
        warps = -(-self.warps * blocks // 4) * 4
        return min(REGISTERS // (WARP * warps) // 8 * 8, REGISTERS_PER_THREAD)

    def fits(self, limits: DeviceLimits) -> bool:
        return (
            self.shared_bytes <= limits.shared_per_block
            and self.registers <= REGISTERS_PER_THREAD
            and self.warps <= 16
            and self.groups <= 15
            and self.blocks_per_multiprocessor(limits) >= 1
        )

    def kernel(self, min_blocks: int) -> Kernel:
        size = self.size
        defines: tuple[tuple[str, int | str], ...] = (
            ("N1", size.n1),
            ("N2", size.n2),
            ("TYPE", size.dtype),
            ("BITS", size.bits),
            ("SYMMETRIC", int(size.symmetric)),
            ("PROLOGUE", ("none", "norm", "gate").index(size.prologue)),
            ("HAS_LEFT", int(size.left)),
            ("HAS_RIGHT", int(size.right)),
            ("ROW_TILES", self.row_tiles),
            ("WARP_TOKENS", self.warp_tokens),
            ("GROUPS", self.groups),
            ("PANEL", self.panel),
            ("SLOTS", self.slots),
            ("STREAM_RIGHT", int(self.stream_right)),
            ("PASSES", self.passes),
            ("NORM_SHARED", int(self.norm_shared)),
            ("MIN_BLOCKS", min_blocks),
            ("SHARED_BYTES", self.shared_bytes),
        )
        return Kernel("kron_quant.cu", "kron_quant", defines)


def kron_plan(size: KronSize, limits: DeviceLimits, tokens: int) -> KronPlan:
    """The plan for `tokens` tokens of `size` on a device; the plain kernel below sm_80 or where nothing else fits."""
    return next(iter(kron_plans(size, limits, tokens)))


def kron_plans(size: KronSize, limits: DeviceLimits, tokens: int) -> list[KronPlan]:
    """All plans that fit, the best first and the plain one last: for tests, and for whoever measures."""
    plans = []
    if limits.arch >= 80:
        few = tokens <= min(FEW_TOKENS, limits.multiprocessors)
        cuts = [cut for cut in _cuts(size, few) if cut.fits(limits)]
        plans = [
            _plan(cut, limits, few) for cut in sorted(cuts, key=lambda cut: _preference(cut, limits), reverse=True)
        ]
    return [*plans, plain_plan(size, limits)]


def plain_plan(size: KronSize, limits: DeviceLimits) -> KronPlan:
    """The plan of the plain kernel: one block a token."""
    kernel = Kernel(
        "kron_quant_plain.cu",
        "kron_quant_plain",
        (
            ("TYPE", size.dtype),
            ("BITS", size.bits),
            ("SYMMETRIC", int(size.symmetric)),
            ("PROLOGUE", ("none", "norm", "gate").index(size.prologue)),
            ("THREADS", PLAIN_BLOCK),
        ),
    )
    return KronPlan(kernel, PLAIN_BLOCK, PLAIN_BLOCK * 5 + 256, 1, 16 * limits.multiprocessors, False)


def _plan(cut: _Cut, limits: DeviceLimits, few: bool) -> KronPlan:
    # Few tokens: a multiprocessor has one block at most, which may take all the registers it likes.
    blocks = 1 if few else cut.blocks_per_multiprocessor(limits)
    grid = blocks * limits.multiprocessors
    return KronPlan(cut.kernel(blocks), cut.warps * WARP, cut.shared_bytes, cut.tokens, grid, True)


def _cuts(size: KronSize, few: bool) -> Iterator[_Cut]:
    """Every way that makes sense; which of them fit and which is best is for others to say."""
    norm = size.prologue == "norm"
    for norm_shared in (True, False) if norm else (False,):
        for row_tiles, warp_tokens in ((1, 1),) if few else ((1, 1), (2, 1), (1, 2)):
            if row_tiles > 1 and size.row_tiles % row_tiles:
                continue
            group_warps = size.row_tiles // row_tiles
            for groups in (1,) if few else range(1, max(2, 8 // group_warps + 1)):
                for slots in (2, 3, 1):
                    yield _Cut(size, row_tiles, warp_tokens, groups, size.padded2, slots, False, 1, norm_shared)
        if not size.right:  # U is Z: its columns are registers, and all of them are there at once
            for slots in (2, 1):
                yield _Cut(size, 1, 1, 1, size.padded2, slots, False, 2, norm_shared)
            continue
        for passes in (1, 2) if size.row_tiles > 1 else (1,):
            for panel in (64, 32, 16):
                if panel >= size.padded2:
                    continue
                if norm and passes > 1 and panel > 16:  # spilled 8 bytes at 208 × 256 on sm_80
                    continue
                for stream_right in (False, True):
                    for slots in (2, 3, 4, 1):
                        yield _Cut(size, 1, 1, 1, panel, slots, stream_right, passes, norm_shared)


def _preference(cut: _Cut, limits: DeviceLimits) -> tuple[float, ...]:
    """What is compared, first things first; the greater is the better."""
    blocks = cut.blocks_per_multiprocessor(limits)
    warps = blocks * cut.warps
    return (
        -cut.passes,  # a second pass reads x twice
        -int(cut.stream_right),  # and this reads right again and again
        int(cut.slots > 1),  # copies run beside the work
        min(warps, 8),  # enough to hide latencies
        -int(cut.size.prologue == "norm" and not cut.norm_shared),
        min(blocks, 2),  # while one block waits at a barrier, another works
        -int(cut.panel < cut.size.padded2),  # a panel costs a barrier,
        cut.panel == cut.size.padded2 or cut.slots * cut.panel >= 96,  # far enough ahead
        cut.panel,
        -_wavefronts(cut),
        min(warps, 12),
        -blocks,  # each loads the matrices
        -cut.shared_bytes,
    )


def _wavefronts(cut: _Cut) -> float:
    """Of shared memory, for a token's operands: each warp reads all of X, and right once for all its rows."""
    size = cut.size
    x = cut.group_warps * size.row_tiles * TILE * size.padded2 / 64
    right = cut.group_warps * size.padded2 * size.column_tiles * 8 / 64 / cut.warp_tokens if size.right else 0
    return x + right
