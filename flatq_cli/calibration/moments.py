"""What passes through the sites of a full-precision block: some of its rows, maxima, and second moments of those.

Everything the starting points need is read off rows [tokens, width] of each site's input. They are kept while the block
computes its full-precision outputs, which calibration needs anyway: of many tokens some, evenly spaced. GPTQ's moments,
of more tokens, are summed as the tokens pass (`SecondMoment`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from flatq_cli.calibration.precision import matmul_dtype
from flatq_cli.models.families import Family, Shapes
from flatq_cli.runtime.layout import KEY, QUERY, VALUE

LEAST_ROWS = 1024
"""Rows that are kept of a site, at least; and at least five sixths of its width, and so many that the first token of a
window, whose activations often are massive, is among them `LEAST_STARTS` times. What is made of them, factors of the
width's root and weights of errors, was not measurably better with three times as many (docs/experiments.md), and the
second moment of more rows takes as long as the forward pass.
"""
LEAST_STARTS = 4
MOST_ROWS, MOST_TIMES = 16 * LEAST_ROWS, 4
"""Of few long windows, whose first tokens are few, not more rows are kept than these, or so many times the least."""

GPTQ_EVERY, GPTQ_ROWS = 3, 3
"""Of so many tokens GPTQ's moments take one, where that leaves so many rows for each column, and `LEAST_ROWS`: more
made no difference that could be measured (docs/experiments.md).
"""

PARTS = 8
"""A moment's columns are summed in so many parts, each from its own diagonal on: 9/16 of a whole product."""
LEAST_PART = 96
"""Columns below which a product costs more by itself than it saves."""


class SecondMoment:
    """Σ xᵀx over rows, whose entries are rounded to the dtype of matmuls; the sum is float32, whatever autocast says. A
    moment of few strong directions, with its own entries rounded, is no longer positive. What lies below the diagonal
    is copied, not computed.

    `rows`: how many are in the sum.

    Args:
        width: the length of a row.
        every: of so many rows that are added one is taken.
    """

    def __init__(self, width: int, device: torch.device, every: int = 1) -> None:
        self.every, self.rows = every, 0
        self._seen = 0
        self._sum = torch.zeros(width, width, device=device)
        self._whole = True

    def add(self, rows: Tensor) -> None:
        """Add rows [tokens, width] of any float dtype."""
        seen, self._seen = self._seen, self._seen + len(rows)
        rows = _thinned(rows, self.every, seen)
        self.rows += len(rows)
        dtype = matmul_dtype(rows.device)
        # The CPU's matmul rounds float32 itself.
        rounds = dtype == torch.bfloat16 and rows.device.type == "cpu"
        with torch.autocast(rows.device.type, enabled=False), _bf16_products() if rounds else contextlib.nullcontext():
            wide = rows.detach().float() if rounds else rows.detach().to(dtype).float()
            for part in _parts(len(self._sum)):
                self._sum[part, part.start :].addmm_(wide[:, part].T, wide[:, part.start :])
        self._whole = False

    def total(self) -> Tensor:
        """The sum, float32 [width, width]: the memory that `add` adds to."""
        if not self._whole:
            _mirrored(self._sum)
        self._whole = True
        return self._sum


def _parts(width: int) -> Iterator[slice]:
    size = max(LEAST_PART, -(-width // PARTS))
    return (slice(first, min(first + size, width)) for first in range(0, width, size))


def _mirrored(moment: Tensor) -> Tensor:
    """`moment` with what is below the diagonal of its parts copied from above, in place."""
    for part in _parts(len(moment)):
        moment[part.stop :, part] = moment[part, part.stop :].T
    return moment


class Recorder(nn.Module):
    """A site that lets x through unchanged and keeps every `every`-th of its rows, and on request maxima of all.

    `rows`: [kept, width], in the dtype they had. `maximum`: float32 [width], max |x|.
    """

    def __init__(self, width: int, every: int = 1, maxima: bool = True) -> None:
        super().__init__()
        self.width, self.every, self.maxima = width, every, maxima
        self._seen = 0
        self._kept: list[Tensor] = []
        self._maximum: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.width)
        self._kept.append(_thinned(rows, self.every, self._seen).clone())
        self._seen += rows.shape[0]
        if self.maxima:
            largest = torch.maximum(rows.amax(0), -rows.amin(0)).float()
            self._maximum = largest if self._maximum is None else torch.maximum(self._maximum, largest)
        return x

    @property
    def rows(self) -> Tensor:
        if not self._kept:
            raise RuntimeError("no input has passed this site")
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    @property
    def maximum(self) -> Tensor:
        if self._maximum is None:
            raise RuntimeError("no input has passed this site, or its maxima were not asked for")
        return self._maximum


def _thinned(rows: Tensor, every: int, seen: int) -> Tensor:
    """Of `rows` [tokens, width], behind `seen` others, those that are the `every`-th of all, in whatever batches they
    pass. The first of all, which is the first token of a window, is among them only where that is every one.
    """
    return rows[(every // 2 - seen) % every :: every]


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Matmuls of float32 on the CPU multiply in bf16 and add in float32, three times as fast (a matmul of bf16 tensors
    would round the sums to bf16 as well).
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts it there at run time
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def recorders(
    family: Family, shapes: Shapes, names: Iterable[str], windows: int = 0, length: int = 0, maxima: bool = True
) -> dict[str, Recorder]:
    """Recorders for the sites in `names` of a block, and for post-RoPE queries where `key` is among them.

    Args:
        windows, length: how many windows of how many tokens will pass, so that of many tokens only some are kept;
            0: unknown.
        maxima: whether they also take maxima.
    """
    names, linears = set(names), shapes.linears(family)
    widths = {site.name: linears[site.readers[0]][1] for site in family.sites if site.name in names}
    heads = ({KEY, QUERY} if KEY in names else set()) | ({VALUE} if VALUE in names else set())
    widths |= dict.fromkeys(heads, shapes.head_dim)
    return {name: Recorder(width, row_stride(windows, length, width), maxima) for name, width in widths.items()}


def row_stride(windows: int, length: int, width: int) -> int:
    """Of how many tokens of `windows` windows of `length` one is kept of a site of `width`."""
    tokens, least = windows * length, max(LEAST_ROWS, 5 * width // 6)
    every = _coprime(min(tokens // least, windows // LEAST_STARTS), length)
    larger = tokens // max(MOST_ROWS, MOST_TIMES * least)
    while larger > 1 and math.gcd(larger, length) > 1:
        larger += 1
    return max(1, every, larger if larger <= tokens // least else 1)


def gptq_stride(windows: int, length: int, width: int) -> int:
    """Of how many tokens of `windows` windows of `length` one goes into GPTQ's moment of a site of `width`."""
    least = max(LEAST_ROWS, GPTQ_ROWS * width)
    every = min(GPTQ_EVERY, windows * length // least, windows // LEAST_STARTS)
    return _coprime(max(1, every), length)


def _coprime(every: int, length: int) -> int:
    """`every`, or the next smaller stride without a factor of `length`: it meets all positions of windows alike."""
    while every > 1 and math.gcd(every, length) > 1:
        every -= 1
    return every


def second_moment(matrices: Iterable[Tensor]) -> Tensor:
    """Σ MᵀM over matrices [rows, width], float32 [width, width]."""
    first, *others = matrices
    moment = SecondMoment(first.shape[1], first.device)
    for matrix in (first, *others):
        moment.add(matrix)
    return moment.total()


def moment_by_head(rows: Tensor, head_dim: int) -> Tensor:
    """Σ over rows and heads of hᵀh, float64 [head_dim, head_dim], of rows [rows, heads · head_dim]."""
    heads = rows.detach().float().reshape(-1, head_dim)
    return (heads.T @ heads).double()


def moment_over_heads(rows: Tensor, heads: int, matrix: Tensor | None) -> Tensor:
    """Σ over rows of X Xᵀ, float32 [heads, heads], where X [heads, d] is a row of `rows` with every head mapped.

    Args:
        rows: [rows, heads · d].
        matrix: [d, d], which maps each head x to x M; None for the identity.
    """
    values = rows.detach().float().view(len(rows), heads, -1)
    if matrix is not None:
        values = values @ matrix.to(values.dtype)
    by_head = values.transpose(0, 1).reshape(heads, -1)
    return by_head @ by_head.T
