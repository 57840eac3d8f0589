"""Second moments and maxima of what passes through the sites of a full-precision block.

Everything the starting points need is in sums over tokens: E[xᵀx] and max|x| of each site. They are accumulated while
the block computes its full-precision outputs, which calibration needs anyway; no token is ever looked at alone.
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

SAMPLE_ROWS = 128
"""Rows of a batch that are kept, about."""
MOST_ROWS = 1024
"""Rows of all batches that are kept."""

LEAST_TOKENS = 1024
"""Tokens that a second moment is taken over, at least; and at least five sixths of the site's width, and so many that
the first token of a window, whose activations often are massive, is among them `LEAST_STARTS` times. What is made of a
moment, factors of the width's root and weights of errors, was not measurably better with three times as many
(docs/experiments.md), and of a wide site more take as long as the forward pass.
"""
LEAST_STARTS = 4

PARTS = 8
"""A moment's columns are summed in so many parts, each from its own diagonal on: 9/16 of a whole product."""
LEAST_PART = 96
"""Columns below which a product costs more by itself than it saves."""


class SecondMoment:
    """Σ xᵀx over rows, in float32 whatever autocast says; what lies below the diagonal is copied, not computed.

    Args:
        width: the length of a row.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)
        self._whole = True

    def add(self, rows: Tensor) -> None:
        """Add rows [tokens, width] of any float dtype."""
        from_bf16 = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
        with (
            torch.autocast(rows.device.type, enabled=False),
            _bf16_products() if from_bf16 else contextlib.nullcontext(),
        ):
            wide = rows.float()
            for part in self._parts():
                self._sum[part, part.start :].addmm_(wide[:, part].T, wide[:, part.start :])
        self._whole = False

    def total(self) -> Tensor:
        """The sum, float32 [width, width]: the memory that `add` adds to."""
        for part in self._parts() if not self._whole else ():
            self._sum[part.stop :, part] = self._sum[part, part.stop :].T
        self._whole = True
        return self._sum

    def _parts(self) -> Iterator[slice]:
        width = len(self._sum)
        size = max(LEAST_PART, -(-width // PARTS))
        return (slice(first, min(first + size, width)) for first in range(0, width, size))


class Recorder(nn.Module):
    """A site that lets x through unchanged and accumulates its second moment and maxima over the last axis.

    `moment`: float32 [width, width], the mean of xᵀx over every `every`-th row. `maximum`: float32 [width], max |x|.
    `sample`: float32 [rows, width], rows of every batch, evenly spaced; at most `MOST_ROWS`.
    """

    def __init__(self, width: int, every: int = 1) -> None:
        super().__init__()
        self.width, self.every = width, every
        self.rows = self._seen = 0
        self._moment: SecondMoment | None = None
        self._maximum: Tensor | None = None
        self._sample: Tensor | None = None
        self._thinned = 1

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.width)
        if self._moment is None or self._maximum is None:
            self._moment = SecondMoment(self.width, x.device)
            self._maximum = torch.zeros(self.width, device=x.device)
        some = self._evenly(rows, self.every)
        self._moment.add(some)
        self._maximum = torch.maximum(self._maximum, torch.maximum(rows.amax(0), -rows.amin(0)).float())
        self._keep_some(rows)
        self.rows += some.shape[0]
        self._seen += rows.shape[0]
        return x

    def _evenly(self, rows: Tensor, every: int) -> Tensor:
        """Every so many of all the rows that pass, in whatever batches; not the first of each batch, which is the first
        token of a window.
        """
        return rows[(every // 2 - self._seen) % every :: every]

    def _keep_some(self, rows: Tensor) -> None:
        # An odd stride meets every position of a sequence, the first token too, whose activations often are massive.
        stride = (rows.shape[0] // SAMPLE_ROWS) | 1
        some = self._evenly(rows, stride * self._thinned).float()
        self._sample = some if self._sample is None else torch.cat([self._sample, some])
        while len(self._sample) > MOST_ROWS:
            # A third of what there is, and of what comes: an odd stride again.
            self._sample, self._thinned = self._sample[::3].clone(), self._thinned * 3

    @property
    def moment(self) -> Tensor:
        if self._moment is None:
            raise RuntimeError("no input has passed this site")
        return self._moment.total() / self.rows

    @property
    def maximum(self) -> Tensor:
        if self._maximum is None:
            raise RuntimeError("no input has passed this site")
        return self._maximum

    @property
    def sample(self) -> Tensor:
        if self._sample is None:
            raise RuntimeError("no input has passed this site")
        return self._sample


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Matmuls of float32 on the CPU multiply in bf16 and add in float32: exact for what came from bf16, and three times
    as fast (a matmul of bf16 tensors would round the sums to bf16 as well).
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts it there at run time
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def recorders(
    family: Family, shapes: Shapes, names: Iterable[str], windows: int = 0, length: int = 0
) -> dict[str, Recorder]:
    """Recorders for the sites in `names` of a block, and for post-RoPE queries where `key` is among them.

    Args:
        windows, length: how many windows of how many tokens will pass, so that of many tokens only some go into the
            moments; 0: unknown.
    """
    names, linears = set(names), shapes.linears(family)
    widths = {site.name: linears[site.readers[0]][1] for site in family.sites if site.name in names}
    heads = ({KEY, QUERY} if KEY in names else set()) | ({VALUE} if VALUE in names else set())
    widths |= dict.fromkeys(heads, shapes.head_dim)
    return {name: Recorder(width, moment_stride(windows, length, width)) for name, width in widths.items()}


def moment_stride(windows: int, length: int, width: int) -> int:
    """Of how many tokens of `windows` windows of `length` one goes into the second moment of a site of `width`."""
    every = min(windows * length // max(LEAST_TOKENS, 5 * width // 6), windows // LEAST_STARTS)
    # One that divides no window meets all positions of a window alike.
    while every > 1 and math.gcd(every, length) > 1:
        every -= 1
    return max(1, every)


def weight_moment(weights: Iterable[Tensor]) -> Tensor:
    """Σ WᵀW over linears that read one input, float32 [in, in], of weights in the matmuls' dtype."""
    moment: SecondMoment | None = None
    for weight in weights:
        rows = weight.detach()
        moment = SecondMoment(rows.shape[1], rows.device) if moment is None else moment
        moment.add(rows.to(matmul_dtype(rows.device)))
    assert moment is not None  # a site has a reader
    return moment.total()


def output_moment_by_head(weight: Tensor, head_dim: int) -> Tensor:
    """Σ over heads of W_hᵀ W_h, float64 [head_dim, head_dim], for an o_proj weight [out, heads · head_dim]."""
    rows = weight.detach().double().reshape(-1, head_dim)
    return rows.T @ rows


def partial_trace(moment: Tensor, heads: int, matrix: Tensor | None) -> Tensor:
    """[heads, heads] moment of what is left when every head has been mapped by `matrix`.

    Args:
        moment: [heads · d, heads · d].
        matrix: [d, d], applied to each head of the rows; None for the identity.
    Returns:
        Σ_i ((I ⊗ M)ᵀ moment (I ⊗ M))[h, i, k, i] as [heads, heads], in the moment's dtype.
    """
    d = moment.shape[0] // heads
    blocks = moment.view(heads, d, heads, d)
    gram = torch.eye(d, dtype=moment.dtype, device=moment.device) if matrix is None else matrix @ matrix.T
    return torch.einsum("hikj,ij->hk", blocks, gram.to(moment.dtype))
