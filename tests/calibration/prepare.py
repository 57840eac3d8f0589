"""One block with everything its calibration starts from, without a run around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatq_cli.calibration.clips import ClipStart, fixed_clips, searched_clips
from flatq_cli.calibration.fit import FitResult, QuantizedBlock, error_measure, evaluate_block, fit_block
from flatq_cli.calibration.learnable import BlockParameters
from flatq_cli.calibration.moments import Recorder, recorders
from flatq_cli.calibration.start import Start, plain_transforms, starting_transforms
from flatq_cli.config.recipe import Recipe
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import ATTENTION, attach_sites, online_sites
from tests.reference import array
from tests.tiny import tiny_source, tiny_tokens

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prepared:
    """The first block of a model: its input and full-precision output, and what passed its sites on the way."""

    source: BlockSource
    hidden: Tensor
    targets: Tensor
    recorded: dict[str, Recorder]
    kwargs: dict[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.source.block_tensors(0).items()}

    def layouts(self, recipe: Recipe) -> dict[str, SiteLayout]:
        return block_layout(recipe, self.source.family, self.source.shapes)

    def starts(self, recipe: Recipe, seed: int = 0) -> dict[str, Start]:
        generator = torch.Generator().manual_seed(seed)
        family, shapes = self.source.family, self.source.shapes
        return starting_transforms(
            recipe.transform, self.layouts(recipe), family, shapes, self.weights, self.recorded, generator
        )

    def searched(self, recipe: Recipe, starts: dict[str, Start]) -> ClipStart:
        layouts = self.layouts(recipe)
        transforms = plain_transforms(layouts, starts)
        family, shapes = self.source.family, self.source.shapes
        return searched_clips(recipe, layouts, transforms, self.weights, self.recorded, family, shapes)

    def learnable(self, recipe: Recipe, seed: int = 0, clip: float | None = None) -> BlockParameters:
        """What is trained, at its start; `clip` starts every clip there, else they are searched."""
        starts, layouts = self.starts(recipe, seed), self.layouts(recipe)
        linears = self.source.shapes.linears(self.source.family)
        clips = self.searched(recipe, starts) if clip is None else fixed_clips(clip, layouts, linears, recipe.weights)
        return BlockParameters(recipe, layouts, starts, clips)

    def quantized(self, recipe: Recipe) -> QuantizedBlock:
        source = self.source
        block = attach_sites(source.block(0), source.family, online_sites(self.layouts(recipe)))
        return QuantizedBlock(block, source.family, source.shapes, recipe.weights)

    def error(self, recipe: Recipe, learnable: BlockParameters) -> float:
        """Relative squared error of the quantized block's output with `learnable` as it is."""
        measure = error_measure("relative", self.targets)
        quantized = self.quantized(recipe)
        return evaluate_block(quantized, learnable, self.hidden, self.targets, self.kwargs, measure, 4, CPU)

    def fit(self, recipe: Recipe, learnable: BlockParameters, **changes: Any) -> FitResult:
        """Train `learnable` on this block; `changes` replace its fields."""
        at = replace(self, **changes)
        return fit_block(
            at.quantized(recipe),
            learnable,
            at.hidden,
            at.targets,
            at.kwargs,
            recipe.calibration,
            index=0,
            device=CPU,
        )


def moment(recorder: Recorder) -> np.ndarray:
    """The mean of xᵀx over the rows that passed a site, float64 [width, width]."""
    rows = array(recorder.rows)
    mean: np.ndarray = rows.T @ rows / len(rows)
    return mean


def prepare(folder: Path, name: str = "llama", **options: int) -> Prepared:
    """The first block of a variant; `options` are those of `prepared`."""
    return prepared(tiny_source(folder, name), **options)


@torch.no_grad()
def prepared(source: BlockSource, samples: int = 8, seqlen: int = 16, batch: int = 4) -> Prepared:
    """Run the first block of a model in full precision, `batch` sequences a forward, with recorders at every site."""
    hidden = source.embed(tiny_tokens(samples, seqlen))
    kwargs = source.block_kwargs(hidden, ATTENTION)[0]
    recorded = recorders(source.family, source.shapes, block_layout(Recipe(), source.family, source.shapes))
    block = attach_sites(source.block(0, attention=ATTENTION), source.family, recorded)
    targets = torch.cat([run_block(block, rows, kwargs) for rows in hidden.split(batch)])
    return Prepared(source, hidden, targets, recorded, kwargs)
