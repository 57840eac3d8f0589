"""`flatq eval`: figures of a target; and `flatq eval merge`: of the shards that several machines measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flatq_cli.cli.console import open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.gates import Gates, Junit, Markdown, read_gates, report_gates
from flatq_cli.cli.options import (
    Backend,
    Baseline,
    Batch,
    ChatTemplate,
    DataDir,
    Debug,
    DeviceOption,
    Fewshot,
    IncludePath,
    JsonFile,
    Limit,
    LogSamples,
    NoCache,
    OneTurn,
    Ppl,
    Quiet,
    RemoteCode,
    Seqlen,
    ShardOption,
    SystemInstruction,
    Target,
    Tasks,
    check_writable,
    last_run,
    read_batch,
    split_names,
    write_json,
)
from flatq_cli.cli.tables import show_evaluation


def evaluate(
    target: Target = None,
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
    no_fewshot_as_multiturn: OneTurn = False,
    data_dir: DataDir = None,
    include_path: IncludePath = None,
    log_samples: LogSamples = None,
    shard: ShardOption = None,
    no_cache: NoCache = False,
    device: DeviceOption = Device.auto,
    backend: Annotated[
        Backend | None,
        typer.Option("--backend", help="What computes a quantized model. (default: the fastest of equal figures)"),
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity on texts, and lm-eval tasks.

    What the model answers is kept as it answers: the same command, given again, goes on where it stopped.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        check_writable(json_file)
        check_writable(log_samples, "--log-samples")
        limits = read_gates(gates, junit, markdown)
        from flatq_cli.evaluation.prompting import Prompting
        from flatq_cli.evaluation.shard import WHOLE, Shard
        from flatq_cli.stages import eval_request
        from flatq_cli.stages import evaluate as stage

        request = eval_request.EvalRequest(
            target=target or str(last_run()),
            tasks=split_names(tasks),
            ppl=tuple(ppl),
            seqlen=seqlen,
            limit=limit,
            baseline=baseline,
            batch=read_batch(batch),
            device=resolve_device(device),
            prompting=Prompting(
                num_fewshot, apply_chat_template, system_instruction, False if no_fewshot_as_multiturn else None
            ),
            trust_remote_code=trust_remote_code,
            data_dir=data_dir,
            include_path=include_path,
            backend=None if backend is None else backend.value,
            cache=not no_cache,
            shard=WHOLE if shard is None else Shard.parse(shard),
            log_samples=log_samples,
            gates=limits,
        )
        write_evaluation(stage.evaluate(request, progress).to_json(), json_file, junit, markdown)


def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="What `flatq eval --shard --json` wrote.")],
    gates: Gates = [],  # noqa: B006
    junit: Junit = None,
    markdown: Markdown = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Join the shards of an evaluation: the figures of one run on one machine."""
    with command_errors(debug), open_progress(quiet) as progress:
        check_writable(json_file)
        limits = read_gates(gates, junit, markdown)
        from flatq_cli.stages import merge as stage

        write_evaluation(stage.merge(shards, progress, limits).to_json(), json_file, junit, markdown)


def write_evaluation(
    data: Mapping[str, Any], json_file: str | None, junit: Path | None = None, markdown: Path | None = None
) -> None:
    """Write a result to the files that are asked for, and show it, unless stdout has it already.

    Raises:
        GateError: one of its gates failed; everything is written and shown before.
    """
    if json_file is not None:
        write_json(data, json_file)
    if json_file != "-":
        show_evaluation(data)
    report_gates(data, junit, markdown)
