"""Plain data as tables on stdout, or as JSON: what every command prints its results with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from flatq_cli.cli.console import console_for, duration

Row = Mapping[str, Any]


def show_json(data: Any) -> None:
    """Print data as JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def show_rows(rows: Sequence[Row], title: str = "") -> None:
    """Print one table with a column for every key, in the order in which the keys first appear."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        numeric = all(_is_number(row.get(key)) for row in rows)
        table.add_column(_words(key), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(key, row.get(key)) for key in columns))
    console_for(sys.stdout).print(table)


def show_mapping(data: Row, title: str = "") -> None:
    """Print a two-column table of names and values; what is nested gets dotted names, long lists are counted."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for key, value in _flat(data):
        table.add_row(_words(key), cell(key, value))
    console_for(sys.stdout).print(table)


def show_evaluation(result: Row) -> None:
    """Print an evaluation (schema `flatq.eval/1`): its figures, those of its baseline beside them, which differ beyond
    noise, and what became of its gates.
    """
    from flatq_cli.evaluation.tables import comparison_rows, gate_limit

    baseline = result.get("baseline")
    texts, tasks = [], []
    for name, measured in result["perplexity"].items():
        beside = {} if baseline is None else {"baseline": baseline["perplexity"].get(name, {}).get("value")}
        rest = {key: value for key, value in measured.items() if key != "value"}
        texts.append({"text": name, "perplexity": measured["value"], **beside, **rest})
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            beside = {} if baseline is None else {"baseline": baseline["tasks"].get(task, {}).get(metric)}
            tasks.append({"task": task, "metric": metric, "value": value, **beside})
    gates = [
        {
            "gate": gate["name"],
            "limit": gate_limit(gate),
            "figure": gate["value"],
            "verdict": gate["verdict"],
            "passed": gate["passed"],
            "why": gate["reason"],
        }
        for gate in result["gates"]
    ]
    for rows in (texts, tasks, comparison_rows(result), gates):
        if rows:
            show_rows(rows)


def cell(key: str, value: Any) -> str:
    """A value as a person reads it; its key tells bytes and seconds from other numbers."""
    last = key.rsplit(".", 1)[-1]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if last.endswith("bytes") and isinstance(value, (int, float)):
        return size(value)
    if last.endswith("seconds") and isinstance(value, (int, float)):
        return duration(value) if value >= 10 else f"{value:.1f}s"
    if isinstance(value, float):
        return f"{value:.2f}" if 10 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def size(count: float) -> str:
    """Bytes with a binary unit: `96.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _flat(data: Row, prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list)) for item in value):
            pairs.append((f"{prefix}{key}", f"{len(value)} entries"))
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _words(key: str) -> str:
    """A key as a label; `memory_bytes` is `memory`, its values say their unit."""
    return key.removesuffix("_bytes").replace("_", " ")
