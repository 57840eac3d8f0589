"""`flatq fuse`: fold the transforms into the weights, norms and biases in float64, then round the weights to codes.

One shard a block, each complete on disk before the next begins; a last shard holds embedding, final norm and head.
What is written is described in `docs/architecture.md`: codes and scales, folded float parameters, online matrices,
clips.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flatq_cli.calibration.precision import fast_matmuls
from flatq_cli.calibration.rounding import (
    FoldedBlock,
    Rounded,
    fold_block,
    round_gptq,
    round_nearest,
    running_block,
)
from flatq_cli.config.recipe import Recipe, WeightSpec
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source, run_in_batches
from flatq_cli.quantization.weights import dequantize_weight
from flatq_cli.runtime.fused import dequantized
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import attach_sites, online_sites
from flatq_cli.stages.calibrate import STAGE as CALIBRATE
from flatq_cli.stages.calibrate import block_name, calibration_tokens, to_device
from flatq_cli.stages.tune import STAGE as TUNE
from flatq_cli.stages.tune import TUNED, tune
from flatq_cli.store.atomic import write_json
from flatq_cli.store.progress import Progress
from flatq_cli.store.records import Metrics
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

STAGE = "fuse"
INDEX = "model.safetensors.index.json"
EDGES = "edges"


def fuse(run: Run, device: str, progress: Progress, trust_remote_code: bool = False) -> dict[str, Any]:
    """Fold and round every block of `run` that is not yet fused; then tune, if the recipe says so.

    Returns:
        The stage's metrics: blocks, bytes, the mean relative rounding error of the weights, and those of tuning.
    """
    started = time.monotonic()
    recipe = run.config.recipe
    calibrated = run.stage(CALIBRATE)
    calibrated.require_done("flatq fuse")
    stage = run.stage(STAGE)
    stage.begin({CALIBRATE: calibrated.digest()})
    source = open_source(locate(run.config.model.location), trust_remote_code=trust_remote_code)
    if stage.done and all(stage.complete(name) for name in _items(source)):
        progress.log(f"fuse: all {source.num_blocks} blocks are done")
        return dict(stage.manifest.metrics)

    layouts = block_layout(recipe, source.family, source.shapes)
    tuning = run.stage(TUNE)
    if recipe.tune.steps:
        tuning.begin({CALIBRATE: calibrated.digest()})
    missing = _missing(stage, source, tuning)
    prefix = None
    if recipe.weights.bits < 16 and recipe.weights.rounding == "gptq" and missing:
        prefix = Prefix(run, source, layouts, torch.device(device))
    for index in progress.track(range(max(missing, default=-1) + 1), "fuse"):
        name = block_name(index)
        item_started = time.monotonic()
        if index in missing:
            calibration = calibrated.load(name)
            tensors, error = fuse_block(source, index, calibration, recipe, layouts, torch.device(device), prefix)
            _save(stage, source, index, tensors, {"rounding_error": error}, item_started)
            progress.note(f"rounding error {error:.5f}")
        elif prefix is not None:
            prefix.run(index, stage.load(name))
    if not stage.complete(EDGES):
        _save(stage, source, source.num_blocks, source.edge_tensors(), {}, time.monotonic())
    tuned = tune(run, stage, tuning, source, layouts, torch.device(device), progress) if recipe.tune.steps else {}
    _write_index(stage, source)
    items = [stage.manifest.items[block_name(index)] for index in range(source.num_blocks)]
    metrics = {
        "blocks": source.num_blocks,
        "bytes": sum(item.bytes for item in stage.manifest.items.values()),
        "rounding_error": sum(float(item.metrics["rounding_error"] or 0.0) for item in items) / len(items),
        **tuned,
    }
    stage.finish(metrics, seconds=time.monotonic() - started)
    return metrics


def _missing(stage: Stage, source: BlockSource, tuning: Stage) -> list[int]:
    """The blocks still to be rounded: all of them where one is gone and others are tuned already, since GPTQ would
    round it behind a prefix that is not the one it had.
    """
    every = range(source.num_blocks)
    missing = [index for index in every if not stage.complete(block_name(index))]
    if not missing or not tuning.complete(TUNED):
        return missing
    for index in every:
        stage.drop(block_name(index))
    return list(every)


def fuse_block(
    source: BlockSource,
    index: int,
    calibrated: dict[str, Tensor],
    recipe: Recipe,
    layouts: dict[str, SiteLayout],
    device: torch.device,
    prefix: Prefix | None = None,
) -> tuple[dict[str, Tensor], float]:
    """The fused tensors of block `index`, by full name, and the relative squared rounding error of its weights.

    Args:
        calibrated: the block's tensors of the calibrate stage.
        prefix: what the blocks before it put out, for GPTQ; None rounds to nearest.
    """
    folded = fold_block(source.block_tensors(index), calibrated, layouts, source.family, source.shapes, device)
    if recipe.weights.bits == 16:
        rounded: Rounded = {}
    elif prefix is None:
        rounded = round_nearest(folded, source.family, recipe.weights)
    else:
        rounded = prefix.round(folded, index, recipe.weights)
    return _fused_tensors(folded, rounded, source, index)


def _fused_tensors(
    folded: FoldedBlock, rounded: Rounded, source: BlockSource, index: int
) -> tuple[dict[str, Tensor], float]:
    """As `fuse_block`; linears that `rounded` lacks stay in floating point, in the model's dtype."""
    fused: dict[str, Tensor] = {f"sites.{name}": tensor.float() for name, tensor in folded.sites.items()}
    error = power = 0.0
    for name, tensor in folded.parameters.items():
        linear = name.removesuffix(".weight")
        if linear not in source.family.linears or not name.endswith(".weight"):
            fused[name] = tensor.float()
        elif linear not in rounded:
            fused[name] = tensor.to(source.checkpoint.dtype)
        else:
            fused |= {f"{linear}.{part}": value for part, value in rounded[linear].items()}
            error += float((dequantize_weight(rounded[linear]).double() - tensor).pow(2).sum())
            power += float(tensor.pow(2).sum())
    prefix = f"{source.family.layers}.{index}."
    return {prefix + name: tensor.cpu().contiguous() for name, tensor in fused.items()}, error / power if power else 0.0


class Prefix:
    """The hidden states that the quantized blocks so far put out for the calibration text: what GPTQ rounds against."""

    def __init__(self, run: Run, source: BlockSource, layouts: dict[str, SiteLayout], device: torch.device) -> None:
        self.source, self.layouts, self.device = source, layouts, device
        self.batch = run.config.recipe.calibration.batch
        self.hidden = source.embed(calibration_tokens(run, source, run.config.recipe.calibration.rounding_samples))
        self.kwargs = [to_device(kwargs, device) for kwargs in source.block_kwargs(self.hidden[:1])]

    def round(self, folded: FoldedBlock, index: int, spec: WeightSpec) -> Rounded:
        """Round block `index` against the prefix, and go on behind it."""
        block, kwargs = self._block(index), self.kwargs[index]
        return round_gptq(folded, block, self.source.family, spec, self.hidden, kwargs, self.batch)

    def run(self, index: int, fused: dict[str, Tensor]) -> None:
        """Go on behind block `index`, rounded by an earlier call."""
        prefix = f"{self.source.family.layers}.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in fused.items()}
        tensors = {name: tensor.to(self.device, torch.float32) for name, tensor in dequantized(own).items()}
        block = running_block(self._block(index), tensors)
        with fast_matmuls(self.device):
            run_in_batches(block, self.hidden, self.kwargs[index], self.batch, self.device, into=self.hidden)

    def _block(self, index: int) -> nn.Module:
        block = self.source.empty_block(index, self.device)
        return attach_sites(block, self.source.family, online_sites(self.layouts))


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`, as transformers names them."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _items(source: BlockSource) -> list[str]:
    return [*(block_name(index) for index in range(source.num_blocks)), EDGES]


def _save(
    stage: Stage, source: BlockSource, index: int, tensors: dict[str, Tensor], metrics: Metrics, started: float
) -> None:
    items = _items(source)
    stage.save(items[index], shard_name(index, len(items)), tensors, metrics, time.monotonic() - started)


def _write_index(stage: Stage, source: BlockSource) -> None:
    """The index that says which shard holds a tensor, in the layout of the Hugging Face hub."""
    weight_map: dict[str, str] = {}
    for name in _items(source):
        file = stage.manifest.items[name].file
        weight_map |= dict.fromkeys(_names_in(stage.path / file), file)
    total = sum(item.bytes for item in stage.manifest.items.values())
    write_json(stage.path / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())
