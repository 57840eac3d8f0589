"""Where the transforms of a block start: identity, random orthogonal, Hadamard, or balanced from second moments.

For a site with input second moment Σx and weight second moment Σw the quantization noise of both sides grows with
tr(Tᵀ Σx T) · tr(T⁻¹ Σw T⁻ᵀ). The balanced start minimizes that in Kronecker form (`transforms/balanced.py`); the others
ignore the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flatq_cli.calibration.moments import Recorder, moment_by_head, moment_over_heads, second_moment
from flatq_cli.config.recipe import TransformSpec
from flatq_cli.models.families import Family, Shapes
from flatq_cli.runtime.layout import ATTN_OUT, KEY, QUERY, VALUE, SiteLayout
from flatq_cli.transforms.balanced import balanced_diag, balanced_factors, balanced_matrix
from flatq_cli.transforms.hadamard import random_orthogonal, spreading_matrix
from flatq_cli.transforms.kronecker import Transform, transform_from_matrices
from flatq_cli.transforms.parametrize import SvdMatrix


class Start(NamedTuple):
    """Plain float64 tensors of a site's transform; None where its layout has no such part."""

    left: Tensor | None
    right: Tensor | None
    diag: Tensor | None


def starting_transforms(
    spec: TransformSpec,
    layouts: Mapping[str, SiteLayout],
    family: Family,
    shapes: Shapes,
    weights: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
    generator: torch.Generator,
) -> dict[str, Start]:
    """The start of every site in `layouts`.

    Args:
        weights: the float block's parameters by name.
        recorded: what passed the sites, and `query`.
    """
    starts: dict[str, Start] = {}
    # `value` first: the heads matrix of `attn_out` is balanced for values that P_v has already mapped.
    for name in sorted(layouts, key=lambda site: site != VALUE):
        layout = layouts[name]
        if spec.init == "balanced":
            starts[name] = _balanced(spec, layout, family, shapes, weights, recorded, starts, generator)
        else:
            diag = _diag(spec, layout, family, weights, recorded) if layout.diag else None
            starts[name] = Start(
                left=_matrix(spec, layout.n1, generator) if layout.left else None,
                right=_matrix(spec, layout.n2, generator) if layout.right else None,
                diag=diag,
            )
    return starts


def _matrix(spec: TransformSpec, size: int, generator: torch.Generator) -> Tensor:
    if spec.init == "orthogonal" and spec.parametrization == "svd":
        return SvdMatrix.published_start(size, generator).invertible().matrix.detach().double()
    if spec.init == "orthogonal":
        return random_orthogonal(size, generator)
    if spec.init == "hadamard":
        return spreading_matrix(size, generator)
    return torch.eye(size, dtype=torch.float64)


def _readers(family: Family, site: str, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Weights of the linears that read `site`."""
    return [weights[f"{reader}.weight"] for reader in family.site(site).readers]


def _diag(
    spec: TransformSpec,
    layout: SiteLayout,
    family: Family,
    weights: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
) -> Tensor:
    """Per-channel scale: SmoothQuant's (max|W|)^(1-α) / (max|x|)^α, or the balanced one."""
    readers = _readers(family, layout.name, weights)
    if spec.diagonal == "smooth":
        weight_max = torch.stack([w.detach().abs().amax(0) for w in readers]).amax(0).double()
        input_max = recorded[layout.name].maximum.double()
        # Channels that never fire would get an unbounded scale.
        diag = weight_max.clamp(min=1e-5) ** (1 - spec.smooth_alpha) / input_max.clamp(min=1e-5) ** spec.smooth_alpha
        return diag.clamp(min=1e-5)
    return balanced_diag(_square_sums([recorded[layout.name].rows]), _square_sums(readers))


def _square_sums(matrices: Iterable[Tensor]) -> Tensor:
    """Σ over rows of their squares, float32 [width]."""
    return torch.stack([matrix.detach().float().square().sum(0) for matrix in matrices]).sum(0)


def _balanced(
    spec: TransformSpec,
    layout: SiteLayout,
    family: Family,
    shapes: Shapes,
    weights: Mapping[str, Tensor],
    recorded: Mapping[str, Recorder],
    starts: Mapping[str, Start],
    generator: torch.Generator,
) -> Start:
    if not (layout.left or layout.right or layout.diag):
        return Start(None, None, None)
    rows = recorded[layout.name].rows
    if layout.name == KEY:
        query = moment_by_head(recorded[QUERY].rows, shapes.head_dim)
        return Start(None, _spread(balanced_matrix(moment_by_head(rows, shapes.head_dim), query), generator), None)
    if layout.name == VALUE:
        output = moment_by_head(weights[f"{family.output_proj}.weight"], shapes.head_dim)
        return Start(None, _spread(balanced_matrix(moment_by_head(rows, shapes.head_dim), output), generator), None)
    readers = _readers(family, layout.name, weights)
    if layout.name == ATTN_OUT:
        value = starts[VALUE].right if VALUE in starts else None
        inverse_transpose = None if value is None else torch.linalg.inv(value).T
        heads_x = moment_over_heads(rows, shapes.heads, value)
        heads_w = moment_over_heads(readers[0], shapes.heads, inverse_transpose)
        return Start(_spread(balanced_matrix(heads_x, heads_w), generator), None, None)
    diag = _diag(spec, layout, family, weights, recorded) if layout.diag else None
    if not layout.left:
        return Start(None, None, diag)
    if diag is not None:
        by_channel = diag.float()
        rows, readers = rows * by_channel, [reader / by_channel for reader in readers]
    left, right = balanced_factors(
        second_moment([rows]), second_moment(readers), layout.n1, layout.n2, generator=generator
    )
    return Start(left, right, diag)


def _spread(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Balanced, then mixed by an orthogonal matrix so that what remains is spread over all channels."""
    return matrix @ spreading_matrix(matrix.shape[0], generator).to(matrix)


def plain_transforms(layouts: Mapping[str, SiteLayout], starts: Mapping[str, Start]) -> dict[str, Transform]:
    """The transforms of `starts` in float32; sites without one are left out."""
    transforms: dict[str, Transform] = {}
    for name, start in starts.items():
        if any(part is not None for part in start):
            transforms[name] = transform_from_matrices(layouts[name].width, *start, dtype=torch.float32)
    return transforms
