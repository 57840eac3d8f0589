"""The `flatq` command. Every command parses its options, calls a stage and prints what comes back; nothing else.

Results go to stdout, progress and logs to stderr; exit codes and error lines are made in `errors.py`. Stages (and with
them torch and transformers) are imported inside the commands, so that `flatq --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flatq_cli import __version__
from flatq_cli.cli.bench import bench_app
from flatq_cli.cli.console import open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors, usage_errors
from flatq_cli.cli.evaluate import evaluate, merge
from flatq_cli.cli.generate import generate
from flatq_cli.cli.options import (
    AsJson,
    Debug,
    DeviceOption,
    Format,
    Model,
    Overrides,
    Quiet,
    RecipeName,
    RemoteCode,
    RunArgument,
    RunDir,
    last_run,
)
from flatq_cli.cli.process import keep_freed_memory
from flatq_cli.cli.report import report
from flatq_cli.cli.run import run
from flatq_cli.cli.runs import open_or_create_run, open_run, resolve_recipe
from flatq_cli.cli.tables import show_json, show_mapping, show_rows
from flatq_cli.config.presets import load_preset, preset_names
from flatq_cli.config.recipe_files import describe_recipe, load_recipe, recipe_names


class _Commands(TyperGroup):
    """`flatq eval merge` is a command of two words beside `flatq eval TARGET`; a target so called is `./merge`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words == "eval merge" else args)


app = typer.Typer(
    cls=_Commands,
    help="FlatQuant: a language model in 4 bits (weights, activations, KV cache) that is still the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda asked: _version(asked), help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def calibrate(
    model: Model,
    recipe: RecipeName = "flatq",
    run: RunDir = None,
    overrides: Overrides = [],  # noqa: B006  (typer reads the default, nothing changes it)
    device: DeviceOption = Device.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sites, shapes, memory and time; do nothing.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn transforms and clips, block by block.

    Each block is saved as it is done: the same command, given again, goes on where it stopped.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        resolved = resolve_recipe(model, recipe, overrides)
        where = resolve_device(device)
        if dry_run:
            from flatq_cli.stages.plan import plan

            planned = plan(model, resolved, where, trust_remote_code=trust_remote_code)
            _show_plan(planned.rows(), planned.totals(), as_json)
            return
        from flatq_cli.stages import calibrate as stage

        opened = open_or_create_run(model, recipe, resolved, run, trust_remote_code, progress)
        result = stage.calibrate(opened, where, progress, trust_remote_code=trust_remote_code)
    _show_result("calibrate", result, as_json)


@app.command()
def fuse(
    run: RunArgument = None,
    device: DeviceOption = Device.auto,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fold the transforms into the weights, round them, and tune what is not a code."""
    with command_errors(debug), open_progress(quiet) as progress:
        from flatq_cli.stages import fuse as stage

        result = stage.fuse(open_run(run), resolve_device(device), progress, trust_remote_code=trust_remote_code)
    _show_result("fuse", result, as_json)


@app.command()
def export(
    run: RunArgument = None,
    format: Format = "flatq",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to. (default: RUN/export/FORMAT)")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pack the fused model for an engine.

    The exported directory is loaded again and compared with the fused model before the command succeeds.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        from flatq_cli.stages import export as stage

        result = stage.export(open_run(run), format, out, progress)
    _show_result("export", result, as_json)


app.command(name="eval")(evaluate)
app.command(name="eval merge")(merge)


app.command()(run)
app.command()(generate)


@app.command()
def inspect(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A run, an exported directory, a model, a safetensors file.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact holds."""
    with command_errors(debug):
        from flatq_cli.stages import inspect as stage

        found = stage.inspect(path or str(last_run()))
        if as_json:
            show_json(found)
            return
        summary = {"kind": found["kind"], **found["summary"]}
        tables = [summary.pop(key) for key, value in list(summary.items()) if _is_table(value)]
        show_mapping(summary)
        for rows in tables:
            show_rows(rows)
        if found["tensors"]:
            show_rows([{**tensor, "shape": str(list(tensor["shape"]))} for tensor in found["tensors"]])


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, or JSON files that eval wrote.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put several runs into one table."""
    with command_errors(debug):
        from flatq_cli.evaluation import compare as evaluation

        rows = evaluation.compare(runs)
        show_json(rows) if as_json else show_rows(rows)


app.command()(report)


@app.command()
def models(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the model presets."""
    with command_errors(debug):
        presets = [load_preset(name) for name in preset_names()]
        rows = [{"name": item.name, "hub": item.hub, "description": item.description} for item in presets]
        show_json(rows) if as_json else show_rows(rows)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe in full, every key explained.")] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or print one."""
    with command_errors(debug):
        if name is not None:
            recipe = load_recipe(name, overrides)
            show_json(recipe.model_dump(mode="json")) if as_json else print(describe_recipe(recipe), end="")
            return
        rows = [{"name": item, "description": load_recipe(item).description} for item in recipe_names()]
        show_json(rows) if as_json else show_rows(rows)


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Show versions, GPU, disk, memory, and what is missing."""
    with command_errors(debug):
        from flatq_cli.cli.doctor import examine

        found = examine()
        if as_json:
            show_json(found)
            return
        missing = found.pop("missing")
        show_mapping(found)
        print("\n".join(f"missing: {line}" for line in missing) or "nothing is missing")


def main() -> None:
    """Entry point of the `flatq` script."""
    keep_freed_memory()
    with usage_errors():
        sys.exit(app(prog_name="flatq", standalone_mode=False))


def _version(asked: bool) -> None:
    if asked:
        print(f"flatq {__version__}")
        raise typer.Exit


def _is_table(value: Any) -> bool:
    """Whether a value of a summary is rows of their own, such as the losses of a run's blocks."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _show_plan(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show_json({"sites": list(rows), "totals": totals})
        return
    show_rows(rows)
    show_mapping(totals)


def _show_result(title: str, result: Mapping[str, Any], as_json: bool) -> None:
    show_json(result) if as_json else show_mapping(result, title)
