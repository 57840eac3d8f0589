"""`flatq calibrate`: learn the transforms and clips of every block, one at a time, each saved as soon as it is done.

The blocks are independent of each other given their full-precision inputs, so a run that was killed goes on at the
first block it has not saved: the blocks before it are only run forward again, to get the next block's input.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatq_cli.calibration.clips import ClipStart, fixed_clips, searched_clips
from flatq_cli.calibration.fit import FitResult, QuantizedBlock, fit_block
from flatq_cli.calibration.learnable import BlockParameters
from flatq_cli.calibration.moments import Recorder, recorders
from flatq_cli.calibration.precision import fast_matmuls, with_fast_linears
from flatq_cli.calibration.start import Start, plain_transforms, starting_transforms
from flatq_cli.config.recipe import Recipe
from flatq_cli.data.texts import load_text
from flatq_cli.data.windows import available_windows, calibration_windows
from flatq_cli.errors import WorkError
from flatq_cli.models.families import Shapes, family_of
from flatq_cli.models.locate import fingerprint, load_tokenizer, locate
from flatq_cli.models.source import BlockSource, open_source, run_in_batches
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import attach_sites, online_sites
from flatq_cli.store.progress import Progress
from flatq_cli.store.records import Metrics
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage
from flatq_cli.store.versions import package_versions

STAGE = "calibrate"


def calibrate(run: Run, device: str, progress: Progress, trust_remote_code: bool = False) -> dict[str, Any]:
    """Learn the transforms and clips of every block not yet in `run`.

    Returns:
        The stage's metrics: blocks, mean relative error before and after, seconds.
    Raises:
        FlatqError: anything a user can act on.
    """
    started = time.monotonic()
    recipe = run.config.recipe
    torch_device = _prepare(recipe, device)
    stage = run.stage(STAGE)
    stage.begin()
    source = open_source(locate(run.config.model.location), trust_remote_code=trust_remote_code)
    names = [block_name(index) for index in range(source.num_blocks)]
    if stage.done and all(stage.complete(name) for name in names):
        progress.log(f"calibrate: all {len(names)} blocks are done")
        return dict(stage.manifest.metrics)

    hidden = source.embed(calibration_tokens(run, source))
    kwargs = source.block_kwargs(hidden[:1])
    layouts = block_layout(recipe, source.family, source.shapes)
    # Weight clips weigh errors by what a linear reads, also where nothing transforms or quantizes that.
    sites = {*layouts, *(site.name for site in source.family.sites)}
    maxima = recipe.transform.diagonal == "smooth"
    # A run may have been killed after its last block and before the stage was done: then there is none.
    last_missing = max((i for i, name in enumerate(names) if not stage.complete(name)), default=-1)
    for index in progress.track(range(last_missing + 1), "calibrate"):
        block_started = time.monotonic()
        missing = not stage.complete(names[index])
        samples, seqlen, _ = hidden.shape
        recorded = recorders(source.family, source.shapes, sites, samples, seqlen, maxima) if missing else {}
        block = source.block(index, device=torch_device)
        # The block that is fitted stays as it was read: the full-precision pass may take its linears in bf16.
        full_precision = attach_sites(_sharing_copy(block) if missing else block, source.family, recorded)
        targets = _run(full_precision, hidden, kwargs[index], recipe, torch_device)
        del full_precision
        if missing:
            _check_finite(source, index, targets)
            tensors, fit = _fit(
                source, index, block, recipe, layouts, recorded, hidden, targets, kwargs[index], torch_device
            )
            _save(stage, index, tensors, fit, time.monotonic() - block_started)
            progress.note(f"loss {fit.loss_before:.5f} → {fit.loss_after:.5f}")
        hidden = targets
    metrics = _summary(stage, names)
    stage.finish(metrics, seconds=time.monotonic() - started)
    return metrics


def open_or_create_run(
    model: str,
    recipe: Recipe,
    run_dir: Path,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    recipe_name: str | None = None,
) -> Run:
    """The run at `run_dir` for this model and recipe; an existing one made with others is refused with the difference
    shown.
    """
    from flatq_cli.models.locate import load_config
    from flatq_cli.store.records import DataIdentity, ModelIdentity, RunConfig
    from flatq_cli.store.run import open_or_create

    location = locate(model)
    config = load_config(location, trust_remote_code=trust_remote_code)
    # A recipe that does not fit the model is refused before there is a run.
    block_layout(recipe, family_of(config), Shapes.of(config))
    # The text of an existing run stays the run's: `auto` is decided once.
    asked = _recorded_text(run_dir, recipe) or recipe.calibration.data
    text = load_text(asked, warn=progress.log if progress is not None else None)
    if not (run_dir / "run.yaml").exists():
        # A text that is too short is refused before there is a run, so that the advice can be followed with the same
        # --run.
        spec = recipe.calibration
        calibration_windows(text, load_tokenizer(location, trust_remote_code), spec.samples, spec.seqlen, spec.seed)
    identity = RunConfig(
        recipe_name=recipe_name,
        recipe=recipe,
        model=ModelIdentity(
            spec=model,
            location=str(location.path),
            kind=location.kind,
            name=location.name,
            revision=location.revision,
            fingerprint=fingerprint(location),
            model_type=config.model_type,
            num_blocks=config.num_hidden_layers,
        ),
        data=DataIdentity(name=text.name, sha256=text.sha256, characters=len(text.content)),
        versions=package_versions(),
    )
    return open_or_create(run_dir, identity)


def _recorded_text(run_dir: Path, recipe: Recipe) -> str | None:
    """The text an existing run resolved `auto` to; None for a new run or another recipe."""
    if recipe.calibration.data != "auto" or not (run_dir / "run.yaml").exists():
        return None
    data = Run.open(run_dir).config.data
    return data.name if data is not None else None


def block_name(index: int) -> str:
    """Name of a block's item in the manifest and, with `.safetensors`, of its file."""
    return f"block-{index:05d}"


def _prepare(recipe: Recipe, device: str) -> torch.device:
    if recipe.calibration.threads:
        torch.set_num_threads(recipe.calibration.threads)
    torch.manual_seed(recipe.calibration.seed)
    return torch.device(device)


def calibration_tokens(run: Run, source: BlockSource, samples: int = 0) -> Tensor:
    """[samples, seqlen] token ids of the run's calibration text.

    Args:
        samples: how many windows, or fewer where the text has no more; 0: exactly the recipe's `samples`. More windows
            begin with the same ones.
    """
    spec = run.config.recipe.calibration
    data = run.config.data
    text = load_text(data.name if data is not None and spec.data == "auto" else spec.data)
    tokenizer = load_tokenizer(source.location)
    if samples:
        return available_windows(text, tokenizer, samples, spec.seqlen, spec.seed)
    return calibration_windows(text, tokenizer, spec.samples, spec.seqlen, spec.seed)


def _sharing_copy(block: nn.Module) -> nn.Module:
    """A copy whose parameters are others with the same memory."""
    shared = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in block.parameters()}
    return copy.deepcopy(block, dict[int, Any](shared))


def _check_finite(source: BlockSource, index: int, targets: Tensor) -> None:
    """WorkError where the model itself gives no numbers: nothing could be calibrated to that."""
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(targets)):
        return
    bad = [name for name, tensor in source.block_tensors(index).items() if not torch.isfinite(tensor).all()]
    why = f"{', '.join(bad[:3])} of the model holds NaN or Inf" if bad else "its input or a value in between overflows"
    raise WorkError(f"block {index}: the full-precision output is not a number ({why}): check the model's files")


def _run(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any], recipe: Recipe, device: torch.device) -> Tensor:
    """The full-precision output of a block for `hidden`, [samples, tokens, hidden]; fills its recorders on the way."""
    block = with_fast_linears(block, device)
    with fast_matmuls(device):
        return run_in_batches(block, hidden, to_device(kwargs, device), recipe.calibration.batch, device)


def _fit(
    source: BlockSource,
    index: int,
    block: nn.Module,
    recipe: Recipe,
    layouts: dict[str, SiteLayout],
    recorded: dict[str, Recorder],
    hidden: Tensor,
    targets: Tensor,
    kwargs: dict[str, Any],
    device: torch.device,
) -> tuple[dict[str, Tensor], FitResult]:
    """Start and train `block`, which is the model's block `index`; its tensors as they are stored.

    Empties `recorded`.
    """
    generator = torch.Generator().manual_seed(recipe.calibration.seed * 100_003 + index)
    block = attach_sites(block, source.family, online_sites(layouts)).to(device)
    quantized = QuantizedBlock(block, source.family, source.shapes, recipe.weights)
    starts = starting_transforms(
        recipe.transform, layouts, source.family, source.shapes, quantized.parameters, recorded, generator
    )
    clips = _starting_clips(source, recipe, layouts, starts, quantized.parameters, recorded)
    recorded.clear()  # rows that training has no use for
    learnable = BlockParameters(recipe, layouts, starts, clips).to(device)
    fit = fit_block(
        quantized, learnable, hidden, targets, to_device(kwargs, device), recipe.calibration, index=index, device=device
    )
    return learnable.plain(), fit


def _starting_clips(
    source: BlockSource,
    recipe: Recipe,
    layouts: dict[str, SiteLayout],
    starts: dict[str, Start],
    weights: dict[str, Tensor],
    recorded: dict[str, Recorder],
) -> ClipStart:
    if recipe.calibration.clip_start == "fixed":
        factor = float(torch.sigmoid(torch.tensor(recipe.calibration.clip_init)))
        return fixed_clips(factor, layouts, source.shapes.linears(source.family), recipe.weights)
    transforms = plain_transforms(layouts, starts)
    return searched_clips(recipe, layouts, transforms, weights, recorded, source.family, source.shapes)


def _save(stage: Stage, index: int, tensors: dict[str, Tensor], fit: FitResult, seconds: float) -> None:
    name = block_name(index)
    metrics: Metrics = {"loss_before": fit.loss_before, "loss_after": fit.loss_after, "steps": fit.steps}
    stage.save(name, f"{name}.safetensors", tensors, metrics, seconds)


def _summary(stage: Stage, names: list[str]) -> dict[str, float | int]:
    items = [stage.manifest.items[name] for name in names]

    def mean(key: str) -> float:
        return sum(float(item.metrics[key] or 0.0) for item in items) / len(items)

    return {"blocks": len(items), "loss_before": mean("loss_before"), "loss_after": mean("loss_after")}


def to_device(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Block arguments with every tensor, also inside tuples, on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value

    return {name: move(value) for name, value in kwargs.items()}
