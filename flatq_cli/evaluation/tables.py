"""An evaluation as Markdown: what lies beside RUN/eval/<name>.json for people, and what CI shows as a summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MARKS = {"worse": "**worse**", "better": "better", "within noise": "within noise", None: ""}
_PASSED = {True: "passed", False: "**failed**"}


def evaluation_markdown(result: Mapping[str, Any]) -> str:
    """Render an evaluation of schema `flatq.eval/1`: its figures, how they differ from its baseline's, its gates."""
    parts = [f"# {result['target']}\n", _gates(result), _figures_table(result), _comparison_table(result)]
    return "\n".join(part for part in parts if part) + f"\n{result['seconds']:.0f} seconds\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, figures to the right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(_escape(cell) for cell in row) + " |\n" for row in (header, align, *rows))


def comparison_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `comparison` of a result as rows: `of`, `difference`, `value`, `interval` (text) and `change`.

    Returns:
        For each text its `perplexity_ratio`, `kl_divergence` and `top1_agreement`, for each task its drops; empty
        without a baseline.
    """
    compared = result.get("comparison") or {"perplexity": {}, "tasks": {}}
    return [
        {
            "of": subject,
            "difference": name.replace("_", " ") if kind == "perplexity" else f"{name} drop",
            "value": entry["value"],
            "interval": _interval(entry),
            "change": entry["change"],
        }
        for kind in ("perplexity", "tasks")
        for subject, differences in compared[kind].items()
        for name, entry in differences.items()
    ]


def gates_title(gates: Sequence[Mapping[str, Any]]) -> str:
    """How many gates failed, in a few words."""
    failed, count = sum(not gate["passed"] for gate in gates), len(gates)
    if count == 1:
        return "The gate failed" if failed else "The gate passed"
    return f"{failed} of {count} gates failed" if failed else f"All {count} gates passed"


def gate_limit(gate: Mapping[str, Any]) -> str:
    """A gate's limit as a person writes it: `max 0.02`, `min 0.98 × baseline`."""
    side, _, relative = gate["bound"].partition("_")
    return f"{side} {gate['limit']:.6g}" + (" × baseline" if relative else "")


def _figures_table(result: Mapping[str, Any]) -> str:
    """The figures; those of the baseline stand in a column of their own."""
    baseline = result.get("baseline")
    columns = [result] if baseline is None else [result, baseline]
    names = [f"{column['kind']}{' ' + column['recipe'] if column['recipe'] else ''}" for column in columns]
    rows = [[label, *(_show(_pick(column, path)) for column in columns)] for label, path in _figures(result)]
    note = "" if baseline is None else f"Baseline: {baseline['target']}\n\n"
    return note + markdown_table(["", *names], rows)


def _comparison_table(result: Mapping[str, Any]) -> str:
    rows = comparison_rows(result)
    if not rows:
        return ""
    confidence = f"{100 * result['comparison']['confidence']:.4g} % interval"
    cells = [
        [f"{row['of']}: {row['difference']}", _show(row["value"]), row["interval"], _MARKS[row["change"]]]
        for row in rows
    ]
    return markdown_table(["beside the baseline", "", confidence, ""], cells)


def _gates(result: Mapping[str, Any]) -> str:
    gates = result["gates"]
    if not gates:
        return ""
    title = gates_title(gates)
    rows = [
        [gate["name"], gate_limit(gate), _show(gate["value"]), gate["verdict"], _PASSED[gate["passed"]]]
        for gate in gates
    ]
    table = markdown_table(["gate", "limit", "figure", "verdict", ""], rows)
    reasons = [f"- {gate['name']}: {gate['reason']}\n" for gate in gates if gate["verdict"] != "pass"]
    return f"**{title}**\n\n{table}" + ("\n" + "".join(reasons) if reasons else "")


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each figure's label and where it is in the result."""
    for name, measured in result["perplexity"].items():
        tokens = f"{measured['tokens']:,} tokens in windows of {measured['seqlen']}"
        yield f"perplexity of {name} ({tokens})", ("perplexity", name, "value")
    for task, metrics in result["tasks"].items():
        for metric in metrics:
            if "_stderr" not in metric:
                yield f"{task}: {metric}", ("tasks", task, metric)


def _pick(result: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        result = result.get(key, {})
    return result if result != {} else None


def _interval(entry: Mapping[str, Any]) -> str:
    """`1.05 to 1.2`; nothing where one end is not known."""
    low, high = entry["low"], entry["high"]
    return "" if low is None or high is None else f"{_show(low)} to {_show(high)}"


def _show(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")
