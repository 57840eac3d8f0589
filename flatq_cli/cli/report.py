"""`flatq report`: a run on one page."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from flatq_cli.cli.console import log, open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors


class ReportFormat(str, Enum):
    """What `--format` takes."""

    html = "html"
    md = "md"
    json = "json"


def report(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run. (default: the last one used here)")
    ] = None,
    format: Annotated[
        ReportFormat, typer.Option("--format", "-f", help="A page with pictures, Markdown, or flatq.report/1 JSON.")
    ] = ReportFormat.html,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to. (default: RUN/report.FORMAT)")
    ] = None,
    compared: Annotated[
        list[Path],
        typer.Option("--compare", "-c", metavar="RUN|JSON", help="A run or a result beside this one. Repeatable."),
    ] = [],  # noqa: B006  (typer reads the default, nothing changes it)
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.auto,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository brings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a page about a run: settings, results, errors, and how flat the model became.

    A few windows of the calibration text pass through the full-precision blocks once.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        from flatq_cli.stages import report as stage
        from flatq_cli.store.last import last_run
        from flatq_cli.store.run import Run

        if run is None:
            run = last_run()
            log(f"run: {run}")
        where = resolve_device(device)
        written = stage.report(
            Run.open(run), compared, format.value, out, where, progress, trust_remote_code=trust_remote_code
        )
    print(written)
