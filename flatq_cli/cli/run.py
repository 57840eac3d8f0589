"""`flatq run`: the whole pipeline, from options, from a file (`config/pipeline_files.py`), or from both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flatq_cli.cli.console import open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.evaluate import write_evaluation
from flatq_cli.cli.gates import Gates, Junit, Markdown, check_reports
from flatq_cli.cli.options import (
    AnyModel,
    Baseline,
    Batch,
    ChatTemplate,
    DataDir,
    Debug,
    DeviceOption,
    Fewshot,
    Format,
    IncludePath,
    JsonFile,
    Limit,
    LogSamples,
    Overrides,
    Ppl,
    Quiet,
    RecipeName,
    RemoteCode,
    RunDir,
    Seqlen,
    SystemInstruction,
    Tasks,
    check_writable,
    read_batch,
    split_names,
)
from flatq_cli.cli.runs import default_run_dir, open_or_create_run, resolve_recipe
from flatq_cli.cli.tables import show_mapping
from flatq_cli.config.pipeline_files import load_pipeline
from flatq_cli.errors import UsageError


def run(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="[PIPELINE.yaml]", help="A pipeline; options replace what it says.")
    ] = None,
    model: AnyModel = None,
    recipe: RecipeName = "flatq",
    run: RunDir = None,
    overrides: Overrides = [],  # noqa: B006
    format: Format = "flatq",
    tasks: Tasks = [],  # noqa: B006
    ppl: Ppl = [],  # noqa: B006
    seqlen: Seqlen = 2048,
    limit: Limit = None,
    baseline: Baseline = None,
    gates: Gates = [],  # noqa: B006
    junit: Junit = None,
    markdown: Markdown = None,
    json_file: JsonFile = None,
    batch: Batch = "1",
    num_fewshot: Fewshot = None,
    apply_chat_template: ChatTemplate = False,
    system_instruction: SystemInstruction = None,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    log_samples: LogSamples = None,
    device: DeviceOption = Device.auto,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Calibrate, fuse, export and eval in one go.

    Without --ppl and --tasks, eval measures perplexity on the text `auto`. What is done already is not
    done again: the same command, given again, goes on where it stopped.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        if file is None and model is None:
            raise UsageError("nothing to run: give --model (`flatq models` lists some), or a pipeline file")
        values = {
            "model": model,
            "recipe": recipe,
            "run": run,
            "format": format,
            "tasks": list(split_names(tasks)),
            "ppl": ppl,
            "seqlen": seqlen,
            "limit": limit,
            "baseline": baseline,
            "gates": gates,
            "junit": junit,
            "markdown": markdown,
            "json_file": json_file,
            "batch": read_batch(batch),
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "system_instruction": system_instruction,
            "data_dir": data_dir,
            "include_path": include_path,
            "log_samples": log_samples,
            "device": device.value,
            "trust_remote_code": trust_remote_code,
        }
        pipeline, limits = load_pipeline(file, _given(context, values))
        resolved = resolve_recipe(pipeline.model, pipeline.recipe, overrides, pipeline.changes)
        step = pipeline.eval
        reports = _path(step.junit), _path(step.markdown)
        check_writable(step.json_file)
        check_writable(step.log_samples, "--log-samples")
        check_reports(limits, *reports)
        where = resolve_device(Device(pipeline.device))
        from flatq_cli.stages import pipeline as stage
        from flatq_cli.stages.evaluate import check_all

        path = _path(pipeline.run) or default_run_dir(pipeline.model, pipeline.recipe)
        request = stage.evaluation_of(pipeline, limits, path, where)
        check_all(request, progress)  # an hour of calibration is no way to find a misspelt name
        opened = open_or_create_run(
            pipeline.model, pipeline.recipe, resolved, path, pipeline.trust_remote_code, progress
        )
        outcome = stage.run_pipeline(opened, pipeline, request, where, progress)
        if step.json_file != "-":
            show_mapping(outcome.made)
        write_evaluation(outcome.evaluated.to_json(), step.json_file, *reports)


_OF_EVAL = (
    *("tasks", "ppl", "seqlen", "limit", "baseline", "junit", "markdown", "batch", "num_fewshot", "data_dir"),
    *("apply_chat_template", "system_instruction", "include_path", "log_samples"),
)
_PLACES = {
    "format": "export.format",
    "gates": "gate_files",
    "json_file": "eval.json",
    **{name: f"eval.{name}" for name in _OF_EVAL},
}
"""Where options stand in a pipeline file, if not under their own name."""


def _given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options that were given, and did not come from a default; nested as in a pipeline file."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT"):
            continue
        *sections, key = _PLACES.get(name, name).split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = str(value) if isinstance(value, Path) else value
    return nested


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
