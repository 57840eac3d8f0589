"""Where clips start: the factor that makes the output's error least, found on a grid, without training.

A sigmoid that starts near 1 learns slowly, and the best 4-bit clip is far from 1. But the error that a clip causes
has a closed form in what calibration holds anyway. With H the second moment of what a linear reads (transformed), a
row w of its weight, rounded to q, adds (w − q) H (w − q)ᵀ to the output's squared error; with G = Σ WᵀW of the
(folded) weights that read it, a token x, rounded to y, adds (x − y) G (x − y)ᵀ. Each row, and each site, takes the
factor that adds least.

A product with H for every factor would be most of the search's time. After a transform H is nearly a diagonal and a few
directions, so that is what errors are weighed by (`Weighing`): docs/decisions/0003-clip-start.md has what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flatq_cli.calibration.moments import Recorder, moment_by_head
from flatq_cli.calibration.precision import matmul_dtype
from flatq_cli.config.recipe import Recipe, WeightSpec
from flatq_cli.models.families import Family, Shapes
from flatq_cli.quantization.quantizers import fake_quantize_with
from flatq_cli.quantization.weights import groups_of
from flatq_cli.runtime.folding import fold, input_transform
from flatq_cli.runtime.layout import KEY, QUERY, VALUE, SiteLayout
from flatq_cli.transforms.kronecker import Transform

# Factors of the maximum, for both sides at once: a coarse grid, then steps to both sides of the best so far. A row's
# error is ragged in the factor, so what counts is how many are tried near its best: docs/decisions/0003-clip-start.md.
# The largest factor leaves a sigmoid some gradient.
COARSE = (0.56, 0.66, 0.76, 0.86, 0.96)
STEPS = (0.05, 0.02, 0.01)
LARGEST = 0.98
AT_ONCE = 1 << 21
"""So many numbers, rounded with all factors of the coarse grid, are worked on together: small enough for a cache."""
RANK = 32
"""Directions of a second moment that are kept beside its diagonal."""
SAMPLE_ROWS = 512
"""Of a site's rows so many, about, decide its clip."""


class Weighing(NamedTuple):
    """A second moment as diag(d) + U Uᵀ, [width] and [width, rank]."""

    diagonal: Tensor
    directions: Tensor

    def error(self, residual: Tensor) -> Tensor:
        """r (diag(d) + U Uᵀ) rᵀ of the rows of `residual`, [..., width] → float32 [...]; overwrites them."""
        # bf16 where that is faster, which rounds less than neighbouring factors differ.
        along = (residual.to(self.directions.dtype) @ self.directions).float().square_().sum(-1)
        return along.add_(residual.square_() @ self.diagonal)


def weighing(moment: Tensor) -> Weighing:
    """What errors are weighed by in place of `moment`, [width, width], positive semidefinite."""
    moment = moment.float()
    return _weighing(lambda columns: moment @ columns, moment.diagonal())


def weighing_of_rows(matrices: Iterable[Tensor]) -> Weighing:
    """`weighing` of Σ WᵀW over matrices [rows, width], which is never computed."""
    matrices = [matrix.float() for matrix in matrices]
    diagonal = torch.stack([matrix.square().sum(0) for matrix in matrices]).sum(0)
    return _weighing(
        lambda columns: torch.stack([matrix.T @ (matrix @ columns) for matrix in matrices]).sum(0), diagonal
    )


def _weighing(product: Callable[[Tensor], Tensor], diagonal: Tensor) -> Weighing:
    """`weighing` of a moment of which the `diagonal` is known and what it makes of [width, rank] columns.

    The directions are Nyström's, from a fixed random start and one step of subspace iteration: U Uᵀ ≤ moment, so that
    what the diagonal is left with is not negative, and all of it where the width is no more than `RANK`.
    Source: Halko, Martinsson, Tropp (arXiv 0909.4061), section 5.5.
    """
    width = len(diagonal)
    start = torch.randn(width, min(RANK, width), generator=torch.Generator().manual_seed(0)).to(diagonal.device)
    basis = torch.linalg.qr(product(start)).Q
    image = product(basis)
    values, vectors = torch.linalg.eigh(basis.T @ image)
    least = torch.finfo(torch.float32).eps * values[-1].clamp(min=torch.finfo(torch.float32).tiny)
    directions = image @ (vectors * values.clamp(min=least).rsqrt())
    diagonal = (diagonal - directions.square().sum(1)).clamp_(min=0)
    return Weighing(diagonal, directions.to(matmul_dtype(diagonal.device)))


def search_weight_clips(weight: Tensor, weigher: Weighing, spec: WeightSpec) -> Tensor:
    """The best factor of every row of a folded weight, or of every group.

    Args:
        weight: float32 [out, in].
        weigher: the second moment of the transformed input, in as many channels. Groups of a row are chosen apart from
            each other, by its diagonal alone.
    Returns:
        float32 [out, groups, 2].
    """
    out, width = weight.shape
    groups = groups_of(width, spec.group)
    whole_diagonal = weigher.diagonal + weigher.directions.float().square().sum(1)

    def best_of(rows: Tensor) -> Tensor:
        grouped = rows.view(-1, groups, width // groups)

        def error(factors: Tensor) -> Tensor:
            residual = fake_quantize_with(grouped, factors, spec.bits, spec.symmetric).sub_(grouped)
            if groups == 1:
                return weigher.error(residual)
            return residual.square_().mul_(whole_diagonal.view(groups, -1)).sum(-1)

        return _least(error, weight.new_empty(len(rows), groups))

    found = torch.cat([best_of(rows) for rows in torch.split(weight, _rows_at_once(width))])
    return found[..., None].expand(out, groups, 2).contiguous()


def search_activation_clip(rows: Tensor, weigher: Weighing, layout: SiteLayout) -> Tensor:
    """The best factor for a site, as clip [2].

    Args:
        rows: float32 [rows, width], a sample of transformed activations.
        weigher: what weighs an error of a row: Σ WᵀW of its readers in the transformed basis.
    """

    def error(factors: Tensor) -> Tensor:
        total = torch.zeros_like(factors)
        for piece in torch.split(rows, _rows_at_once(rows.shape[-1])):
            rounded = fake_quantize_with(piece, factors.expand(-1, len(piece)), layout.bits, layout.symmetric)
            total += weigher.error(rounded.sub_(piece)).sum(1, keepdim=True)
        return total

    return _least(error, rows.new_empty(1)).expand(2).contiguous()


def _rows_at_once(width: int) -> int:
    return max(1, AT_ONCE // (len(COARSE) * width))


def _least(error: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The factors, of the shape of `like`, of least `error`, which maps [k, *shape] factors to as many errors."""

    def best_of(factors: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        least, where = errors.min(0, keepdim=True)
        return factors.gather(0, where), least

    coarse = torch.tensor(COARSE, dtype=like.dtype, device=like.device)
    factors = coarse.view(-1, *(1 for _ in like.shape)).expand(-1, *like.shape)
    best, least = best_of(factors, error(factors))
    for step in STEPS:
        sides = torch.cat([best - step, (best + step).clamp(max=LARGEST)])
        best, least = best_of(torch.cat([best, sides]), torch.cat([least, error(sides)]))
    return best[0]


class ClipStart(NamedTuple):
    """Clip factors in (0, 1): [2] by site, [out, groups, 2] by linear."""

    sites: dict[str, Tensor]
    linears: dict[str, Tensor]


def fixed_clips(
    factor: float,
    layouts: Mapping[str, SiteLayout],
    linears: Mapping[str, tuple[int, int]],
    spec: WeightSpec,
) -> ClipStart:
    """The same factor everywhere."""
    return ClipStart(
        {name: torch.full((2,), factor) for name, layout in layouts.items() if layout.clip},
        {name: torch.full((out, groups_of(width, spec.group), 2), factor) for name, (out, width) in linears.items()},
    )


@torch.no_grad()
def searched_clips(
    recipe: Recipe,
    layouts: Mapping[str, SiteLayout],
    transforms: Mapping[str, Transform],
    weights: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
    family: Family,
    shapes: Shapes,
) -> ClipStart:
    """The best factor of every site and of every row of every linear, for `transforms` as they are.

    Args:
        weights: the float block's parameters.
        recorded: what passed every site in `layouts`, the linears' sites, and `query`, before any transform.
    """
    folded = fold(weights, transforms, family, shapes)
    clipped = recipe.weights.bits < 16 and recipe.weights.clip == "learned"
    readers = {site.name: site.readers for site in family.sites} if clipped else {}
    sites: dict[str, Tensor] = {}
    linears: dict[str, Tensor] = {}
    for name in dict.fromkeys((*(name for name, layout in layouts.items() if layout.clip), *readers)):
        transform, rows = input_transform(name, transforms, shapes), recorded[name].rows.float()
        rows = rows if transform is None else transform.apply(rows)
        if name in layouts and layouts[name].clip:
            weigher = _readers_weighing(name, transforms, weights, folded, recorded, family, shapes)
            sites[name] = search_activation_clip(_thinned(rows), weigher, layouts[name])
        if name in readers:
            weigher = weighing_of_rows([rows])
            for reader in readers[name]:
                linears[reader] = search_weight_clips(folded[f"{reader}.weight"], weigher, recipe.weights)
    return ClipStart(sites, linears)


def _thinned(rows: Tensor) -> Tensor:
    """`SAMPLE_ROWS` of many rows, up to twice as many; an odd stride meets every position of a window of 2^k tokens."""
    return rows[:: (len(rows) // SAMPLE_ROWS) | 1].contiguous()


def _readers_weighing(
    site: str,
    transforms: Mapping[str, Transform],
    weights: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
    family: Family,
    shapes: Shapes,
) -> Weighing:
    """What weighs an error of a transformed activation of `site`."""
    if site == KEY:
        queries = moment_by_head(recorded[QUERY].rows, shapes.head_dim)
        return weighing(_inverse_transformed(queries.float(), transforms.get(KEY)))
    if site == VALUE:
        output = moment_by_head(weights[f"{family.output_proj}.weight"], shapes.head_dim)
        return weighing(_inverse_transformed(output.float(), transforms.get(VALUE)))
    return weighing_of_rows(folded[f"{reader}.weight"] for reader in family.site(site).readers)


def _inverse_transformed(moment: Tensor, transform: Transform | None) -> Tensor:
    """T⁻¹ M T⁻ᵀ."""
    if transform is None:
        return moment
    return transform.apply_inverse_transpose(transform.apply_inverse_transpose(moment).T)
