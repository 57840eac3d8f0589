"""Gates as workflow commands of GitHub Actions: lines that it shows as annotations of a run and of a pull request.

::error title=flatq gate arc_easy.acc_drop::regression: 0.1 (0.06 to 0.14 at 0.95 confidence) is above …
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def workflow_commands(result: Mapping[str, Any]) -> list[str]:
    """A line for each gate of an evaluation (schema `flatq.eval/1`) that failed, or passed with a reservation."""
    return [
        _command("warning" if gate["passed"] else "error", f"flatq gate {gate['name']}", _message(gate))
        for gate in result["gates"]
        if not gate["passed"] or gate["verdict"] != "pass"
    ]


def _message(gate: Mapping[str, Any]) -> str:
    return f"{gate['verdict']}: {gate['reason']}"


def _command(level: str, title: str, message: str) -> str:
    """Escaped as the runner unescapes it: in properties a colon and a comma too."""
    return f"::{level} title={_escape(title).replace(':', '%3A').replace(',', '%2C')}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
