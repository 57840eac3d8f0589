"""What `flatq eval` says of gates to CI: a JUnit file, a Markdown summary, annotations, and exit code 3."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flatq_cli.cli.console import log
from flatq_cli.cli.options import check_writable
from flatq_cli.config.gate_files import Gate, load_gates
from flatq_cli.errors import GateError, UsageError

PANEL = "Gates and CI"
"""The heading of these options."""

Gates = Annotated[
    list[str],
    typer.Option(
        "--gates",
        metavar="FILE|NAME",
        rich_help_panel=PANEL,
        help="Limits on the figures, exit code 3 where one fails (docs/gates.md). Repeatable.",
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", rich_help_panel=PANEL, help="Write the gates as JUnit XML."),
]
Markdown = Annotated[
    Path | None,
    typer.Option("--markdown", metavar="FILE", rich_help_panel=PANEL, help="Write figures and gates as Markdown."),
]


def read_gates(files: Sequence[str], junit: Path | None, markdown: Path | None) -> tuple[Gate, ...]:
    """The gates of `--gates`, once all that is wrong with these options is found.

    Raises:
        UsageError: a gate file is wrong, a place cannot be written, or there are no gates to put into a JUnit file.
    """
    gates = load_gates(files)
    check_reports(gates, junit, markdown)
    return gates


def check_reports(gates: Sequence[Gate], junit: Path | None, markdown: Path | None) -> None:
    """Refuse a report of gates where there are none, and places that cannot be written. Raises UsageError."""
    if junit is not None and not gates:
        raise UsageError(f"--junit {junit}: reports gates, and there are none: add --gates FILE")
    check_writable(junit, "--junit")
    check_writable(markdown, "--markdown")


def report_gates(data: Mapping[str, Any], junit: Path | None, markdown: Path | None) -> None:
    """Write what was asked for, tell GitHub Actions where it runs this, and fail where a gate failed.

    Args:
        data: a result in schema `flatq.eval/1`; all else that is made of it has been written and shown.
    Raises:
        GateError: a gate failed; all of them are named. UsageError: a file cannot be written.
    """
    from flatq_cli.evaluation.annotations import workflow_commands
    from flatq_cli.evaluation.gates import failures
    from flatq_cli.evaluation.junit import junit_xml
    from flatq_cli.evaluation.tables import evaluation_markdown
    from flatq_cli.store import atomic

    if junit is not None:
        atomic.write_text(junit, junit_xml(data))
    if markdown is not None:
        atomic.write_text(markdown, evaluation_markdown(data))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _append(Path(summary), evaluation_markdown(data))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(data):
            log(line)
    failed = failures(data["gates"])
    if failed:
        raise GateError(failed)


def _append(summary: Path, page: str) -> None:
    """Add to the summary of a GitHub Actions job; a summary that cannot be written fails nobody's evaluation."""
    try:
        with summary.open("a", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        log(f"GITHUB_STEP_SUMMARY {summary}: {error.strerror}; the summary is left out")
