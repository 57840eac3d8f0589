"""`flatq report`: what a run did, what came of it, and how flat it made the model, as one page.

`gather` collects plain data (schema `flatq.report/1`) from what the stages left in the run; only flatness must be
measured: a few calibration windows pass through the full-precision blocks, one block in memory at a time. `render`
turns the data into HTML, Markdown or JSON and knows nothing else. Nothing of the present moment gets into it, so a run
that did not change gives the same page again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flatq_cli.calibration.learnable import WEIGHT_CLIP, transforms_from_plain
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.compare import compare
from flatq_cli.evaluation.flatness import DIGITS, Calibrated, Tuned, measure_block, watch_tuned, watches
from flatq_cli.evaluation.report_html import report_html
from flatq_cli.evaluation.report_text import report_markdown
from flatq_cli.models.checkpoint import SafetensorsCheckpoint
from flatq_cli.models.families import Family
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source, run_in_batches
from flatq_cli.runtime.fused import FusedSource
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import attach_sites
from flatq_cli.stages.calibrate import STAGE as CALIBRATE
from flatq_cli.stages.calibrate import block_name, calibration_tokens, to_device
from flatq_cli.stages.fuse import STAGE as FUSE
from flatq_cli.stages.tune import STAGE as TUNE
from flatq_cli.stages.tune import TUNED
from flatq_cli.store import atomic
from flatq_cli.store.progress import Progress
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage

SCHEMA = "flatq.report/1"
Format = Literal["html", "md", "json"]
FORMATS: tuple[Format, ...] = ("html", "md", "json")
CURVE, DIVERGENCE = "curve", "divergence"
"""The item of the tuning stage, and its tensor, float64 [steps]: the divergence of every step."""
TOKENS = 2048
"""About so many tokens of the calibration text are looked at; at least one window."""


def report(
    run: Run,
    compared: Sequence[Path],
    format: Format,
    out: Path | None,
    device: str,
    progress: Progress,
    trust_remote_code: bool = False,
) -> Path:
    """Write the report of `run`.

    Args:
        compared: runs and result files that stand beside it.
        out: the file; None: RUN/report.FORMAT.
        device: "cpu" or "cuda", for measuring flatness.
    Returns:
        The file that was written.
    Raises:
        UsageError: something compared is no run or result, a damaged artifact, or a place that cannot be written.
    """
    place = out if out is not None else run.path / f"report.{format}"
    if place.is_dir():
        raise UsageError(f"--out {place} is a directory; give a file")
    atomic.make_directory(place.parent)
    data = gather(run, compared, device, progress, trust_remote_code)
    atomic.write_text(place, render(data, format))
    return place


def render(data: dict[str, Any], format: Format) -> str:
    """The data of schema `flatq.report/1` as a page, as Markdown, or as JSON."""
    if format == "html":
        return report_html(data)
    if format == "md":
        return report_markdown(data)
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def gather(
    run: Run, compared: Sequence[Path], device: str, progress: Progress, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The report's data, schema `flatq.report/1` (docs/evaluation.md). What the run does not have yet is None, and
    `missing` says it in words.
    """
    config = run.config
    missing = _missing_stages(run)
    rows = compare([run.path, *compared])
    flatness, why = _flatness(run, device, progress, trust_remote_code)
    return {
        "schema": SCHEMA,
        "run": run.path.resolve().name,
        "model": config.model.model_dump(mode="json", exclude={"location"}),
        "data": None if config.data is None else config.data.model_dump(mode="json"),
        "recipe_name": config.recipe_name,
        "recipe": config.recipe.model_dump(mode="json"),
        "versions": dict(config.versions),
        "stages": _stages(run),
        "comparison": rows,
        "blocks": _blocks(run),
        "tuning": _tuning(run),
        "flatness": flatness,
        "missing": missing + why,
    }


def _missing_stages(run: Run) -> list[str]:
    """What a whole run has and this one has not, one sentence each."""
    sentences = []
    blocks = run.config.model.num_blocks
    names = [block_name(index) for index in range(blocks)]
    for stage, verb in ((run.stage(CALIBRATE), "calibrated"), (run.stage(FUSE), "rounded")):
        if not stage.done:
            done = sum(name in stage.manifest.items for name in names)
            sentences.append(f"{stage.name} is not finished: {done} of {blocks} blocks are {verb}.")
    tuning = run.stage(TUNE)
    if CURVE in tuning.manifest.items and not tuning.complete(CURVE, verify=True):
        sentences.append("The divergence of each tuning step is not shown: its file is missing or damaged.")
    if not any(run.path.glob("export/*/manifest.json")):
        sentences.append("There is no export, so the run has no size (flatq export).")
    if not any(run.path.glob("eval/*.json")):
        sentences.append("Nothing was evaluated, so there is no perplexity (flatq eval).")
    return sentences


def _stages(run: Run) -> list[dict[str, Any]]:
    """A row for each stage that began, in the order of the pipeline."""
    places = [
        CALIBRATE,
        FUSE,
        TUNE,
        *sorted(f"export/{file.parent.name}" for file in run.path.glob("export/*/manifest.json")),
    ]
    rows = []
    for name in dict.fromkeys(places):
        manifest = run.stage(name).manifest
        if not manifest.items and not manifest.inputs and manifest.status != "done":
            continue
        seconds = manifest.seconds or sum(item.seconds for item in manifest.items.values())
        size = sum(item.bytes for item in manifest.items.values())
        memory = {key: getattr(manifest, key) for key in ("peak_memory_bytes", "peak_gpu_memory_bytes")}
        rows.append({"stage": name, "status": manifest.status, "bytes": size, "seconds": seconds, **memory})
    return rows


def _blocks(run: Run) -> list[dict[str, Any]]:
    """The figures of every block that is calibrated or fused; None for what it has not."""
    calibrated, fused = run.stage(CALIBRATE).manifest.items, run.stage(FUSE).manifest.items
    rows = []
    for index in range(run.config.model.num_blocks):
        name = block_name(index)
        figures = {**(calibrated[name].metrics if name in calibrated else {})}
        figures |= fused[name].metrics if name in fused else {}
        if figures:
            keys = ("loss_before", "loss_after", "steps", "rounding_error")
            rows.append({"block": index, **{key: figures.get(key) for key in keys}})
    return rows


def _tuning(run: Run) -> dict[str, Any] | None:
    """The divergence before and after tuning, and of every step; None for a run that has not been tuned."""
    stage = run.stage(TUNE)
    item = stage.manifest.items.get(TUNED)
    if item is None:
        return None
    figures = {key: item.metrics.get(key) for key in ("divergence_before", "divergence_after")}
    return {"steps": run.config.recipe.tune.steps, **figures, "seconds": item.seconds, "curve": _curve(stage)}


def _curve(tuning: Stage) -> list[float | None] | None:
    """The divergence of every step; None where it was not kept, or its file is gone: a picture is not worth an error,
    and no stage would make it again.
    """
    if not tuning.complete(CURVE, verify=True):
        return None
    losses = tuning.load(CURVE)[DIVERGENCE].tolist()
    return [float(f"{loss:.{DIGITS}g}") if isfinite(loss) else None for loss in losses]


def _flatness(
    run: Run, device: str, progress: Progress, trust_remote_code: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """What `measure_flatness` finds, or None and the reason why it cannot be measured."""
    stage = run.stage(CALIBRATE)
    if not stage.done:
        return None, ["Flatness is measured once calibrate is finished."]
    stage.require_done("flatq report")
    spec = run.config.recipe.calibration
    try:
        source = open_source(locate(run.config.model.location), trust_remote_code=trust_remote_code)
        tokens = calibration_tokens(run, source, min(spec.samples, max(1, TOKENS // spec.seqlen)))
    except UsageError as error:
        return None, [f"Flatness cannot be measured without the model and its text: {error}"]
    return measure_flatness(run, source, tokens, device, progress), []


def measure_flatness(run: Run, source: BlockSource, tokens: Tensor, device: str, progress: Progress) -> dict[str, Any]:
    """Stream the full-precision blocks over `tokens` [windows, seqlen] and look at every site on the way; of a tuned
    run at the tuned blocks too, each on what the full-precision block reads.

    Returns:
        `tokens`, how many were looked at; `shown`, the blocks whose channels are there, with the reason; `blocks`, for
        each `{"block", "sites"}` as `flatness.measure_block` gives them.
    """
    recipe, where = run.config.recipe, torch.device(device)
    layouts = block_layout(recipe, source.family, source.shapes)
    stage = run.stage(CALIBRATE)
    tuned_source = _tuned_source(run, source)
    shown = shown_blocks(_blocks(run), source.num_blocks)
    hidden = source.embed(tokens)
    kwargs = source.block_kwargs(hidden[:1])
    found = []
    for index in progress.track(range(source.num_blocks), "report"):
        calibrated = _calibrated(stage.load(block_name(index)), layouts, source.family, where)
        watched = watches(source.family, source.shapes, calibrated)
        block = source.block(index, device=where)
        parameters = {name: tensor.detach() for name, tensor in block.named_parameters()}
        block = attach_sites(block, source.family, watched)
        arguments, batch = to_device(kwargs[index], where), recipe.calibration.batch
        tuned: Tuned | None = None
        if tuned_source is not None:
            tuned = watch_tuned(tuned_source.block(index, device=where), source.family, source.shapes)
            run_in_batches(tuned.block, hidden, arguments, batch, where)
        run_in_batches(block, hidden, arguments, batch, where, into=hidden)
        curves = any(row["block"] == index for row in shown)
        sites = measure_block(
            parameters, watched, calibrated, source.family, source.shapes, recipe.weights, curves, tuned
        )
        found.append({"block": index, "sites": sites})
    return {"tokens": tokens.numel(), "shown": shown, "blocks": found}


def _tuned_source(run: Run, source: BlockSource) -> FusedSource | None:
    """The fused blocks, where tuning is done and they were made from what calibrate holds now."""
    fuse = run.stage(FUSE)
    current = fuse.manifest.inputs == {CALIBRATE: run.stage(CALIBRATE).digest()}
    if not (fuse.done and run.stage(TUNE).done and current):
        return None
    fuse.verify()
    return FusedSource(source, SafetensorsCheckpoint(fuse.path), run.config.recipe)


def shown_blocks(blocks: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The blocks whose channels are drawn: first, middle, last, and the one of the largest loss; `why` says so."""
    losses = {row["block"]: row["loss_after"] for row in blocks if row["loss_after"] is not None}
    chosen = {"first": 0, "middle": count // 2, "last": count - 1}
    if losses:
        chosen["largest loss"] = max(losses, key=lambda index: (losses[index], -index))
    reasons: dict[int, list[str]] = {}
    for why, index in chosen.items():
        reasons.setdefault(index, []).append(why)
    return [{"block": index, "why": ", ".join(reasons[index])} for index in sorted(reasons)]


def _calibrated(
    stored: Mapping[str, Tensor], layouts: Mapping[str, SiteLayout], family: Family, device: torch.device
) -> Calibrated:
    """The tensors of a block as calibrate stored them, on `device`."""
    plain = {name: tensor.to(device) for name, tensor in stored.items()}
    weight_clips = {linear: plain.get(f"{linear}.{WEIGHT_CLIP}") for linear in family.linears}
    return Calibrated(
        layouts=layouts,
        transforms=transforms_from_plain(plain, layouts, torch.float32),
        clips={name: plain[f"{name}.clip"] for name in layouts if f"{name}.clip" in plain},
        weight_clips={linear: clip for linear, clip in weight_clips.items() if clip is not None},
    )
