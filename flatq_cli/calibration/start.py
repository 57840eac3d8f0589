"""Where the transforms of a block start: identity, random orthogonal, Hadamard, or balanced from second moments.

For a site with input second moment Σx and weight second moment Σw the quantization noise of both sides grows with
tr(Tᵀ Σx T) · tr(T⁻¹ Σw T⁻ᵀ). The balanced start minimizes that in Kronecker form (`transforms/balanced.py`); the others
ignore the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flatq_cli.calibration.moments import Recorder, output_moment_by_head, partial_trace, weight_moment
from flatq_cli.config.recipe import TransformSpec
from flatq_cli.models.families import Family, Shapes
from flatq_cli.runtime.layout import ATTN_OUT, KEY, QUERY, VALUE, SiteLayout
from flatq_cli.transforms.balanced import balanced_diag, balanced_matrix, balanced_transform
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
        recorded: moments of the sites and of `query`.
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
    return balanced_diag(recorded[layout.name].moment.diagonal(), weight_moment(readers).diagonal())


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
    moment = recorded[layout.name].moment
    if layout.name == KEY:
        return Start(None, _spread(balanced_matrix(moment, recorded[QUERY].moment), generator), None)
    if layout.name == VALUE:
        output = output_moment_by_head(weights[f"{family.output_proj}.weight"], shapes.head_dim)
        return Start(None, _spread(balanced_matrix(moment, output), generator), None)
    weight = weight_moment(_readers(family, layout.name, weights))
    if layout.name == ATTN_OUT:
        value = starts[VALUE].right if VALUE in starts else None
        inverse_transpose = None if value is None else torch.linalg.inv(value).T
        heads_x = partial_trace(moment, shapes.heads, value)
        heads_w = partial_trace(weight, shapes.heads, inverse_transpose)
        return Start(_spread(balanced_matrix(heads_x, heads_w), generator), None, None)
    if not layout.left:
        diag = _diag(spec, layout, family, weights, recorded) if layout.diag else None
        return Start(None, None, diag)
    if layout.diag and spec.diagonal == "smooth":
        diag = _diag(spec, layout, family, weights, recorded)
        by_channel = diag.to(moment.dtype)
        moment = moment * by_channel[:, None] * by_channel
        weight = weight / by_channel[:, None] / by_channel
        left, right, _ = balanced_transform(moment, weight, layout.n1, layout.n2, with_diag=False, generator=generator)
        return Start(left, right, diag)
    return Start(*balanced_transform(moment, weight, layout.n1, layout.n2, with_diag=layout.diag, generator=generator))


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
