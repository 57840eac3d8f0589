"""`flatq report`: a run on one page."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from flatq_cli.cli.console import open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.options import Debug, DeviceOption, Quiet, RemoteCode, RunArgument, last_run


class ReportFormat(str, Enum):
    """What `--format` takes."""

    html = "html"
    md = "md"
    json = "json"


def report(
    run: RunArgument = None,
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
    device: DeviceOption = Device.auto,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a page about a run: settings, results, errors, and how flat the model became.

    A few windows of the calibration text pass through the full-precision blocks once.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        from flatq_cli.stages import report as stage
        from flatq_cli.store.run import Run

        where = resolve_device(device)
        of = Run.open(run or last_run())
        written = stage.report(of, compared, format.value, out, where, progress, trust_remote_code=trust_remote_code)
    print(written)
