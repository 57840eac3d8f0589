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
from torch import Tensor

from flatq_cli.calibration.learnable import WEIGHT_CLIP, transforms_from_plain
from flatq_cli.config.recipe import Recipe
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source
from flatq_cli.quantization.weights import dequantize_weight, round_weight
from flatq_cli.runtime.folding import fold, online_tensors
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.stages.calibrate import STAGE as CALIBRATE
from flatq_cli.stages.calibrate import block_name
from flatq_cli.store.atomic import write_json
from flatq_cli.store.progress import Progress
from flatq_cli.store.records import Metrics
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

STAGE = "fuse"
INDEX = "model.safetensors.index.json"
EDGES = "edges"


def fuse(run: Run, device: str, progress: Progress, trust_remote_code: bool = False) -> dict[str, Any]:
    """Fold and round every block of `run` that is not yet fused.

    Returns:
        The stage's metrics: blocks, bytes, and the mean relative rounding error of the weights.
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
    for index in progress.track(range(source.num_blocks), "fuse"):
        name = block_name(index)
        if stage.complete(name):
            continue
        item_started = time.monotonic()
        tensors, error = fuse_block(source, index, calibrated.load(name), recipe, layouts, torch.device(device))
        _save(stage, source, index, tensors, {"rounding_error": error}, item_started)
        progress.note(f"rounding error {error:.5f}")
    if not stage.complete(EDGES):
        _save(stage, source, source.num_blocks, source.edge_tensors(), {}, time.monotonic())
    _write_index(stage, source)
    items = [stage.manifest.items[block_name(index)] for index in range(source.num_blocks)]
    metrics = {
        "blocks": source.num_blocks,
        "bytes": sum(item.bytes for item in stage.manifest.items.values()),
        "rounding_error": sum(float(item.metrics["rounding_error"] or 0.0) for item in items) / len(items),
    }
    stage.finish(metrics, seconds=time.monotonic() - started)
    return metrics


@torch.no_grad()
def fuse_block(
    source: BlockSource,
    index: int,
    calibrated: dict[str, Tensor],
    recipe: Recipe,
    layouts: dict[str, SiteLayout],
    device: torch.device,
) -> tuple[dict[str, Tensor], float]:
    """The fused tensors of block `index`, by full name, and the relative squared rounding error of its weights.

    Args:
        calibrated: the block's tensors of the calibrate stage.
    """
    stored = source.block_tensors(index)
    parameters = {name: tensor.to(device, torch.float64) for name, tensor in stored.items()}
    plain = {name: tensor.to(device) for name, tensor in calibrated.items()}
    transforms = transforms_from_plain(plain, layouts, torch.float64)
    folded = fold(parameters, transforms, source.family, source.shapes)
    fused: dict[str, Tensor] = {}
    error = power = 0.0
    for name, tensor in folded.items():
        linear = name.removesuffix(".weight")
        if linear not in source.family.linears or not name.endswith(".weight"):
            fused[name] = tensor.float()
        elif recipe.weights.bits == 16:
            fused[name] = tensor.to(source.checkpoint.dtype)
        else:
            spec = recipe.weights
            clip = plain.get(f"{linear}.{WEIGHT_CLIP}")
            rounded = round_weight(tensor.float(), spec.bits, spec.group, spec.symmetric, clip)
            fused |= {f"{linear}.{part}": value for part, value in rounded.items()}
            error += float((dequantize_weight(rounded).double() - tensor).pow(2).sum())
            power += float(tensor.pow(2).sum())
    for name, tensor in online_tensors(transforms).items():
        fused[f"sites.{name}"] = tensor.float()
    for name, layout in layouts.items():
        if layout.clip:
            fused[f"sites.{name}.clip"] = plain[f"{name}.clip"]
    prefix = f"{source.family.layers}.{index}."
    return {prefix + name: tensor.cpu().contiguous() for name, tensor in fused.items()}, error / power if power else 0.0


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
