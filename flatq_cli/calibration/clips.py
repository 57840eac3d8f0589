"""Where clips start: the factor that makes the output's error least, found on a grid, without training.

A sigmoid that starts near 1 learns slowly, and the best 4-bit clip is far from 1. But the error that a clip causes
has a closed form in what calibration holds anyway. With H the second moment of what a linear reads (transformed), a
row w of its weight, rounded to q, adds (w − q) H (w − q)ᵀ to the output's squared error; with G = Σ WᵀW of the
(folded) weights that read it, a token x, rounded to y, adds (x − y) G (x − y)ᵀ. Each row, and each site, takes the
factor that adds least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flatq_cli.calibration.moments import Recorder, output_moment_by_head, weight_moment
from flatq_cli.config.recipe import Recipe, WeightSpec
from flatq_cli.models.families import Family, Shapes
from flatq_cli.quantization.quantizers import fake_quantize, fake_quantize_grouped
from flatq_cli.quantization.weights import groups_of
from flatq_cli.runtime.folding import fold, input_transform
from flatq_cli.runtime.layout import KEY, QUERY, VALUE, SiteLayout
from flatq_cli.transforms.kronecker import Transform

# Factors of the maximum that are tried, for both sides at once; the largest leaves a sigmoid some gradient.
FACTORS = tuple(0.4 + 0.02 * step for step in range(30))


def search_weight_clips(weight: Tensor, moment: Tensor, spec: WeightSpec) -> Tensor:
    """The best factor of every row of a folded weight, or of every group.

    Args:
        weight: float32 [out, in].
        moment: [in, in], second moment of the transformed input.
    Returns:
        float32 [out, groups, 2].
    """
    out, width = weight.shape
    groups = groups_of(width, spec.group)
    moment = moment.to(weight)
    best_error = torch.full((out, groups), torch.inf, device=weight.device)
    best = torch.full((out, groups), FACTORS[-1], device=weight.device)
    for factor in FACTORS:
        clip = weight.new_full((out, groups, 2), factor)
        residual = weight - fake_quantize_grouped(weight, spec.bits, spec.group, spec.symmetric, clip)
        # Groups of a row are chosen apart from each other, so what is between them is left out.
        weighted = residual @ moment if groups == 1 else residual * moment.diagonal()
        error = (weighted * residual).view(out, groups, -1).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, factor, best)
    return best[..., None].expand(out, groups, 2).contiguous()


def search_activation_clip(rows: Tensor, gram: Tensor, layout: SiteLayout) -> float:
    """The best factor for a site.

    Args:
        rows: float32 [rows, width], a sample of transformed activations.
        gram: [width, width], what weighs an error of a row: Σ WᵀW of its readers in the transformed basis.
    """
    gram = gram.to(rows)
    errors = []
    for factor in FACTORS:
        residual = rows - fake_quantize(rows, layout.bits, layout.symmetric, rows.new_full((2,), factor))
        errors.append(float(((residual @ gram) * residual).sum()))
    return FACTORS[min(range(len(FACTORS)), key=errors.__getitem__)]


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
        recorded: of every site in `layouts` and of `query`, before any transform.
    """
    folded = fold(weights, transforms, family, shapes)
    sites: dict[str, Tensor] = {}
    for name, layout in layouts.items():
        if layout.clip:
            transform = input_transform(name, transforms, shapes)
            rows = recorded[name].sample
            gram = _gram(name, transforms, weights, folded, recorded, family, shapes)
            factor = search_activation_clip(rows if transform is None else transform.apply(rows), gram, layout)
            sites[name] = rows.new_full((2,), factor)
    linears: dict[str, Tensor] = {}
    clipped = recipe.weights.bits < 16 and recipe.weights.clip == "learned"
    for site in family.sites if clipped else ():
        moment = _transformed(recorded[site.name].moment.float(), input_transform(site.name, transforms, shapes))
        for reader in site.readers:
            linears[reader] = search_weight_clips(folded[f"{reader}.weight"], moment, recipe.weights)
    return ClipStart(sites, linears)


def _gram(
    site: str,
    transforms: Mapping[str, Transform],
    weights: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
    family: Family,
    shapes: Shapes,
) -> Tensor:
    """What weighs an error of a transformed activation of `site`: [width, width]."""
    if site == KEY:
        return _inverse_transformed(recorded[QUERY].moment.float(), transforms.get(KEY))
    if site == VALUE:
        output = output_moment_by_head(weights[f"{family.output_proj}.weight"], shapes.head_dim)
        return _inverse_transformed(output.float(), transforms.get(VALUE))
    return weight_moment(folded[f"{reader}.weight"] for reader in family.site(site).readers)


def _transformed(moment: Tensor, transform: Transform | None) -> Tensor:
    """Tᵀ M T."""
    return moment if transform is None else transform.apply(transform.apply(moment).T)


def _inverse_transformed(moment: Tensor, transform: Transform | None) -> Tensor:
    """T⁻¹ M T⁻ᵀ."""
    if transform is None:
        return moment
    return transform.apply_inverse_transpose(transform.apply_inverse_transpose(moment).T)
