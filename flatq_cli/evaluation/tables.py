"""An evaluation as Markdown: what lies beside RUN/eval/<name>.json for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def evaluation_markdown(result: dict[str, Any]) -> str:
    """Render an evaluation of schema `flatq.eval/1`; with a `baseline`, its figures stand in a column of their own."""
    baseline = result.get("baseline")
    columns = [result] if baseline is None else [result, baseline]
    names = [f"{column['kind']}{' ' + column['recipe'] if column['recipe'] else ''}" for column in columns]
    rows = [[label, *(_show(_pick(column, path)) for column in columns)] for label, path in _figures(result)]
    title = f"# {result['target']}\n\n"
    note = "" if baseline is None else f"Baseline: {baseline['target']}\n\n"
    return title + note + markdown_table(["", *names], rows) + f"\n{result['seconds']:.0f} seconds\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, figures to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(_escape(cell) for cell in row) + " |\n" for row in (header, align, *rows))


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each figure's label and where it is in the result."""
    for name, measured in result["perplexity"].items():
        tokens = f"{measured['tokens']:,} tokens in windows of {measured['seqlen']}"
        yield f"perplexity of {name} ({tokens})", ("perplexity", name, "value")
    for task, metrics in result["tasks"].items():
        for metric in metrics:
            if "_stderr" not in metric:
                yield f"{task}: {metric}", ("tasks", task, metric)


def _pick(result: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        result = result.get(key, {})
    return result if result != {} else None


def _show(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
