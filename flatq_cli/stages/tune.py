"""The last part of `flatq fuse`: tune everything that is not a code, end to end, and write it into the shards.

    RUN/fuse/tune/tuning.safetensors    while it runs: what is learned so far, with the optimizer's moments
    RUN/fuse/tune/tuned.safetensors     the tuned tensors by full name
    RUN/fuse/tune/curve.safetensors     `divergence`, float64 [steps], of the step's text before the step

A killed tuning goes on from `tuning`; once `tuned` is there, each shard is rewritten with its tensors. Doing that again
changes nothing, so it may be cut off anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from flatq_cli.calibration.precision import fast_matmuls, matmul_dtype, with_fast_linears
from flatq_cli.calibration.tune import FreeNumbers, RunningBlock, Tuner, TuneSettings, graph_bytes
from flatq_cli.config.recipe import Recipe
from flatq_cli.models.source import BlockSource, run_in_batches
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.sites import attach_sites, online_sites
from flatq_cli.stages.calibrate import block_name, calibration_tokens, to_device
from flatq_cli.store.atomic import load_tensors
from flatq_cli.store.progress import Progress
from flatq_cli.store.records import Metrics
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

STAGE = "fuse/tune"
TUNING, TUNED, CURVE = "tuning", "tuned", "curve"
CHECKPOINT_SECONDS = 300.0
"""At most so much work is lost by a kill."""
KEEP_SHARE = 0.3
"""Blocks stay dequantized in memory where they take at most this share of what is free; what blocks keep for their
backward pass may take as much of what is free then.
"""


def tune(
    run: Run,
    fuse: Stage,
    stage: Stage,
    source: BlockSource,
    layouts: dict[str, SiteLayout],
    device: torch.device,
    progress: Progress,
) -> dict[str, float | int]:
    """Tune the rounded blocks of stage `fuse`, whose shards are all there, by the run's recipe; resumes.

    Args:
        stage: tuning's own, begun.
    Returns:
        `tune_steps` and the mean divergence of the first and of the last tenth of the steps.
    Raises:
        WorkError: a divergence that is not a number.
    """
    if not stage.complete(TUNED):
        started = time.monotonic()
        fuse.verify()
        # Of a block only what is tuned stays in memory; its codes are read again whenever it runs.
        free = [
            FreeNumbers(_own_tensors(fuse, source, index, device), source.family).to(device)
            for index in range(source.num_blocks)
        ]
        blocks = _running_blocks(fuse, source, layouts, device)
        losses = _learn(run, stage, source, free, blocks, device, progress)
        tensors = {
            f"{source.family.layers}.{index}.{name}": tensor.cpu().contiguous()
            for index, numbers in enumerate(free)
            for name, tensor in numbers.fused().items()
        }
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        metrics: Metrics = {"divergence_before": first, "divergence_after": last}
        stage.save(CURVE, f"{CURVE}.safetensors", {"divergence": torch.tensor(losses, dtype=torch.float64)})
        stage.save(TUNED, f"{TUNED}.safetensors", tensors, metrics, time.monotonic() - started)
    _write_into_shards(fuse, stage, source)
    stage.drop(TUNING)
    stage.finish()
    found = stage.manifest.items[TUNED].metrics
    return {"tune_steps": run.config.recipe.tune.steps, **{k: float(v or 0.0) for k, v in found.items()}}


def _learn(
    run: Run,
    stage: Stage,
    source: BlockSource,
    free: list[FreeNumbers],
    blocks: Callable[[int], RunningBlock],
    device: torch.device,
    progress: Progress,
) -> list[float]:
    """Train `free` in place; the divergence of every step."""
    recipe = run.config.recipe
    tokens = calibration_tokens(run, source, recipe.tune.steps * recipe.calibration.batch)
    embed = source.embedder(device=device)
    kwargs = [to_device(each, device) for each in source.block_kwargs(embed(tokens[:1]))]
    targets = _full_precision_output(source, source.embed(tokens), kwargs, recipe.calibration.batch, device, progress)
    head = with_fast_linears(source.head(device=device), device)
    tuner = Tuner(free, settings_of(recipe), _graphs_that_fit(blocks, free, embed, tokens, kwargs, recipe, device))
    losses: list[float] = []
    if stage.complete(TUNING):
        state = stage.load(TUNING)
        losses = state.pop("losses").tolist()
        tuner.resume(state)
    saved = time.monotonic()
    for _ in progress.track(range(tuner.steps_done, recipe.tune.steps), "tune"):
        rows = batch_rows(tuner.steps_done, len(tokens), recipe.calibration.batch)
        losses.append(tuner.step(blocks, head, embed(tokens[rows]), targets[rows].to(device), kwargs))
        progress.note(f"divergence {losses[-1]:.4f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            state = {name: tensor.cpu() for name, tensor in tuner.state().items()}
            stage.save(TUNING, f"{TUNING}.safetensors", {**state, "losses": torch.tensor(losses, dtype=torch.float64)})
            saved = time.monotonic()
    return losses


def settings_of(recipe: Recipe) -> TuneSettings:
    """A recipe's tuning."""
    spec = recipe.tune
    return TuneSettings(spec.steps, spec.learning_rate, spec.clip_rate, min(spec.warmup, spec.steps))


def batch_rows(step: int, samples: int, batch: int) -> slice:
    """The samples of a step: in order, from the start again when no whole batch is left."""
    first = step % max(1, samples // batch) * batch
    return slice(first, min(first + batch, samples))


def _full_precision_output(
    source: BlockSource,
    hidden: Tensor,
    kwargs: list[dict[str, Any]],
    batch: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """What the last full-precision block puts out, [samples, tokens, hidden], in the place of `hidden`; one block in
    memory at a time.
    """
    for index in progress.track(range(source.num_blocks), "full precision"):
        block = with_fast_linears(source.block(index, device=device), device)
        with fast_matmuls(device):
            run_in_batches(block, hidden, kwargs[index], batch, device, into=hidden)
    return hidden


def _running_blocks(
    fuse: Stage, source: BlockSource, layouts: dict[str, SiteLayout], device: torch.device
) -> Callable[[int], RunningBlock]:
    """Block i, ready to run: all kept where memory allows, else each read and dequantized when it is asked for."""

    def make(index: int) -> RunningBlock:
        sites = {name: site.to(device) for name, site in online_sites(layouts).items()}
        block = attach_sites(source.empty_block(index, device), source.family, sites)
        return RunningBlock(block, _own_tensors(fuse, source, index, device), source.family)

    weights = sum(rows * columns for rows, columns in source.shapes.linears(source.family).values())
    if matmul_dtype(device).itemsize * weights * source.num_blocks > KEEP_SHARE * _free_memory(device):
        return make
    kept = [make(index) for index in range(source.num_blocks)]
    return kept.__getitem__


def _graphs_that_fit(
    blocks: Callable[[int], RunningBlock],
    free: list[FreeNumbers],
    embed: Callable[[Tensor], Tensor],
    tokens: Tensor,
    kwargs: list[dict[str, Any]],
    recipe: Recipe,
    device: torch.device,
) -> int:
    """How many blocks may keep their graph: as many as a share of what memory is free holds."""
    hidden = embed(tokens[batch_rows(0, len(tokens), recipe.calibration.batch)])
    size = graph_bytes(blocks(0), free[0], hidden, kwargs[0])
    return min(len(free), int(KEEP_SHARE * _free_memory(device)) // max(1, size))


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _own_tensors(fuse: Stage, source: BlockSource, index: int, device: torch.device) -> dict[str, Tensor]:
    """A block's fused tensors by their names inside the block; its file is verified already."""
    prefix = f"{source.family.layers}.{index}."
    loaded = load_tensors(fuse.path / fuse.manifest.items[block_name(index)].file, str(device))
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


def _write_into_shards(fuse: Stage, stage: Stage, source: BlockSource) -> None:
    tuned = stage.load(TUNED)
    for index in range(source.num_blocks):
        item = fuse.manifest.items[block_name(index)]
        tensors = fuse.load(block_name(index))
        prefix = f"{source.family.layers}.{index}."
        changed = {name: tensor for name, tensor in tuned.items() if name.startswith(prefix)}
        if any(not torch.equal(tensors[name], tensor) for name, tensor in changed.items()):
            fuse.save(block_name(index), item.file, {**tensors, **changed}, dict(item.metrics), item.seconds)
