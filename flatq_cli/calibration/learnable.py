"""The numbers that calibration learns for one block, and the plain tensors they stand for.

A `BlockParameters` holds a trainable form of every matrix (`transforms/parametrize.py`), the diagonals, and the clips
before their sigmoid. Everything outside this module sees transforms and clip factors. `plain()` gives what is stored;
`transforms_from_plain` is its inverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from flatq_cli.calibration.clips import ClipStart
from flatq_cli.calibration.start import Start
from flatq_cli.config.recipe import Recipe
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.transforms.kronecker import Invertible, Transform, transform_from_matrices
from flatq_cli.transforms.parametrize import Parametrization, make_matrix

WEIGHT_CLIP = "weight_clip"


class SiteParameters(nn.Module):
    """Trainable transform of one site: float32."""

    def __init__(self, layout: SiteLayout, start: Start, parametrization: Parametrization) -> None:
        super().__init__()
        self.width = layout.width
        self.left = None if start.left is None else make_matrix(parametrization, start.left)
        self.right = None if start.right is None else make_matrix(parametrization, start.right)
        self.diag = None if start.diag is None else nn.Parameter(start.diag.float())

    def transform(self) -> Transform | None:
        """The transform of this moment, differentiable; None if the site has none."""
        if self.left is None and self.right is None and self.diag is None:
            return None
        return Transform(width=self.width, left=_invertible(self.left), right=_invertible(self.right), diag=self.diag)


def _invertible(matrix: nn.Module | None) -> Invertible | None:
    return None if matrix is None else matrix.invertible()  # type: ignore[operator,no-any-return]


class BlockParameters(nn.Module):
    """All that is learned for a block: transforms by site, activation clips by site, weight clips by linear."""

    def __init__(
        self,
        recipe: Recipe,
        layouts: Mapping[str, SiteLayout],
        starts: Mapping[str, Start],
        clips: ClipStart,
    ) -> None:
        """Build the trainable forms.

        Args:
            layouts, starts: by site.
            clips: where clips start.
        """
        super().__init__()
        self.sites = nn.ModuleDict(
            {
                name: SiteParameters(layout, starts[name], recipe.transform.parametrization)
                for name, layout in layouts.items()
            }
        )
        self.clips = nn.ParameterDict(
            {name: nn.Parameter(torch.logit(clips.sites[name])) for name, layout in layouts.items() if layout.clip}
        )
        weights = recipe.weights
        learned = weights.bits < 16 and weights.clip == "learned"
        # Module names hold no dots, so the linears are numbered; `_linears` keeps their names.
        self._linears = list(clips.linears) if learned else []
        self.weight_clips = nn.ParameterList([nn.Parameter(torch.logit(clips.linears[name])) for name in self._linears])

    def transforms(self) -> dict[str, Transform]:
        """Differentiable transforms by site; sites without one are left out."""
        found = {name: site.transform() for name, site in self.sites.items()}  # type: ignore[operator]
        return {name: transform for name, transform in found.items() if transform is not None}

    def activation_clips(self) -> dict[str, Tensor]:
        """Clip factors [2] in (0, 1) by site."""
        return {name: torch.sigmoid(clip) for name, clip in self.clips.items()}

    def linear_clips(self) -> dict[str, Tensor]:
        """Clip factors [out, groups, 2] in (0, 1) by linear."""
        return {name: torch.sigmoid(clip) for name, clip in zip(self._linears, self.weight_clips, strict=True)}

    def clip_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learn at the clips' rate."""
        yield from self.clips.values()
        yield from self.weight_clips

    def transform_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learn at the transforms' rate."""
        yield from self.sites.parameters()

    @torch.no_grad()
    def plain(self) -> dict[str, Tensor]:
        """What is stored: float32 matrices, diagonals and clip factors, by the names of `docs/architecture.md`."""
        tensors: dict[str, Tensor] = {}
        for name, transform in self.transforms().items():
            if transform.left is not None:
                tensors[f"{name}.left"] = transform.left.matrix
            if transform.right is not None:
                tensors[f"{name}.right"] = transform.right.matrix
            if transform.diag is not None:
                tensors[f"{name}.diag"] = transform.diag
        tensors |= {f"{name}.clip": clip for name, clip in self.activation_clips().items()}
        tensors |= {f"{name}.{WEIGHT_CLIP}": clip for name, clip in self.linear_clips().items()}
        return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}


def transforms_from_plain(
    plain: Mapping[str, Tensor], layouts: Mapping[str, SiteLayout], dtype: torch.dtype
) -> dict[str, Transform]:
    """The transforms of stored tensors in `dtype`; inverses are taken in `dtype`, of the matrices that run online."""
    transforms: dict[str, Transform] = {}
    for name, layout in layouts.items():
        left, right, diag = (plain.get(f"{name}.{part}") for part in ("left", "right", "diag"))
        if left is not None or right is not None or diag is not None:
            transforms[name] = transform_from_matrices(layout.width, left, right, diag, dtype=dtype)
    return transforms
