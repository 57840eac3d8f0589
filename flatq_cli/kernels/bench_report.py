"""What a measurement means, and the benchmark's report: fractions of the roofline, speed-ups, JSON and Markdown.

The roofline of a row is the time that it must take on this very chip: the larger of its least bytes over the measured
bandwidth of a plain copy and its tensor-core operations over the measured rate of a large matrix product.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "flatq.bench.kernels/1"


@dataclass(frozen=True)
class Rates:
    """What this chip does a second, measured: bytes of a copy (read and written), and operations (2 a product).

    Args:
        copy: of a copy that does not fit into the caches. float16, int8: of a large matrix product. int4: twice int8
            where the chip has int4 tensor cores, else int8's.
    """

    copy: float
    float16: float
    int8: float
    int4: float


@dataclass
class Row:
    """One kernel at one size.

    Args:
        op, size, tokens: what was run.
        bytes: moved at the least. operations: on tensor cores, of kind `unit`, a field of `Rates`.
        seconds: median of a call; None where it was not measured, `error` then says why.
        baselines: seconds of what it is compared with, by name.
    """

    op: str
    size: str
    tokens: int
    bytes: float
    operations: float
    unit: str
    seconds: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def roofline_seconds(row: Row, rates: Rates) -> float:
    """The least time that a row can take on a chip of these rates."""
    return max(row.bytes / rates.copy, row.operations / float(getattr(rates, row.unit)))


def row_json(row: Row, rates: Rates | None) -> dict[str, Any]:
    """A row with what follows from it."""
    data = asdict(row)
    measured = row.seconds is not None and row.seconds > 0
    data["bytes_per_second"] = row.bytes / row.seconds if measured and row.seconds else None
    fraction = roofline_seconds(row, rates) / row.seconds if measured and rates and row.seconds else None
    data["roofline_fraction"] = fraction
    data["bound"] = None if rates is None else _bound(row, rates)
    data["speedups"] = {
        name: seconds / row.seconds for name, seconds in row.baselines.items() if measured and row.seconds
    }
    return data


def _bound(row: Row, rates: Rates) -> str:
    return "memory" if row.bytes / rates.copy >= row.operations / getattr(rates, row.unit) else "tensor cores"


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The goals that the kernels were built to, each with the worst figure measured and whether it is met."""

    def worst(values: Iterable[float | None]) -> float | None:
        return min((value for value in values if value is not None), default=None)

    kron = [row for row in rows if row["op"] == "kron_quant" and row["tokens"] >= 2048]
    memory = worst(row["roofline_fraction"] for row in kron if 1536 <= _width(row["size"]) <= 8192)
    tensor = worst(row["roofline_fraction"] for row in kron if _width(row["size"]) > 8192)
    cublas = worst(row["speedups"].get("cublas + ideal quantize") for row in kron)
    layers = [row for row in rows if row["op"] == "layer"]
    decode = worst(row["speedups"].get("fp16") for row in layers if row["tokens"] <= 16)
    attention = [row for row in rows if row["op"] == "kv_attention" and "32768" in row["size"]]
    loss = [
        row["baselines"]["fp16"] * (1 / row["baselines"]["no transforms"] - 1 / row["seconds"])
        for row in layers
        if row["tokens"] == 2048 and row["seconds"] and {"fp16", "no transforms"} <= set(row["baselines"])
    ]
    table = [
        ("kron_quant, n 1536 to 8192, from 2,048 tokens: fraction of roofline", memory, 0.85, "at least"),
        ("kron_quant, larger n, from 2,048 tokens: fraction of roofline", tensor, 0.65, "at least"),
        ("kron_quant against cuBLAS + an ideal quantization, from 2,048 tokens", cublas, 3.0, "at least"),
        (
            "a layer's linears at 2,048 tokens: speed-up lost to the transforms",
            max(loss, default=None),
            0.05,
            "at most",
        ),
        ("a layer's linears at 1 to 16 tokens against fp16", decode, 1.7, "at least"),
        (
            "kv_attention at 32 k tokens: fraction of roofline",
            worst(r["roofline_fraction"] for r in attention),
            0.8,
            "at least",
        ),
    ]
    return [
        {"goal": goal, "limit": limit, "value": value, "met": None if value is None else _met(value, limit, how)}
        for goal, value, limit, how in table
    ]


def _met(value: float, limit: float, how: str) -> bool:
    return value >= limit if how == "at least" else value <= limit


def _width(size: str) -> int:
    """n of a kron_quant row's size, `64x128 int4`."""
    found = re.match(r"(\d+)x(\d+)", size)
    return int(found[1]) * int(found[2]) if found else 0


def slug(name: str) -> str:
    """A GPU's name in a file name: `nvidia-geforce-rtx-4090`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_report(folder: Path, data: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `kernels-GPU.json` and `.md`; each is whole at any time, so a run that is cut off leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels-{slug(data['device']['name'])}"
    json_file, markdown_file = stem.with_suffix(".json"), stem.with_suffix(".md")
    replace_text(json_file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    replace_text(markdown_file, markdown(data))
    return json_file, markdown_file


def replace_text(path: Path, text: str) -> None:
    """Write beside the file, then rename over it."""
    descriptor, staged = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(staged, 0o644)
    os.replace(staged, path)


# ---- Markdown. ----


def markdown(data: Mapping[str, Any]) -> str:
    """The report as a page."""
    device, rates = data["device"], data["rates"]
    lines = [f"# Kernels on {device['name']}", ""]
    lines.append(
        f"sm_{device['arch']}, {device['multiprocessors']} multiprocessors; driver {device['driver']}, torch "
        f"{device['torch']}, CuPy {device['cupy']}, NVRTC {device['nvrtc']}. Made by `make gpu-check`"
        + ("." if data["complete"] else "; **not complete**: the time was spent or the run was cut off.")
    )
    if rates:
        lines += [
            "",
            "Measured on this chip: " + ", ".join(f"{name} {_rate(name, value)}" for name, value in rates.items()),
        ]
    lines += [
        "",
        "Time is the median of CUDA-graph replays, each call on another copy of the data, the copies larger "
        "than L2 together "
        "(24 at the most: the data of a small call stays there). Roofline: the larger of bytes ÷ copy bandwidth and "
        "operations ÷ rate of a matrix product.",
        "",
        "## Checks",
        "",
    ]
    lines += [f"- {check['name']}: {check['result']}" for check in data["checks"]] or ["- none was run"]
    lines += [
        "",
        "## Goals",
        "",
        *table(["goal", "limit", "worst measured", "met"], [_goal(goal) for goal in data["goals"]]),
    ]
    for op in dict.fromkeys(row["op"] for row in data["rows"]):
        lines += ["", f"## {op}", "", *_op_table([row for row in data["rows"] if row["op"] == op])]
    if data["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in data["notes"])]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, as lines."""
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join("---" for _ in header) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _op_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["baselines"]))
    header = ["size", "tokens", "µs", "GB/s", "roofline", "bound", *(f"× {name}" for name in names)]
    cells = []
    for row in rows:
        start = [row["size"], f"{row['tokens']:,}"]
        if row["seconds"] is None:
            cells.append([*start, row["error"] or "not measured", *[""] * (3 + len(names))])
            continue
        fraction = "" if row["roofline_fraction"] is None else f"{row['roofline_fraction']:.2f}"
        speedups = [f"{row['speedups'][name]:.2f}" if name in row["speedups"] else "" for name in names]
        rate = f"{row['bytes_per_second'] / 1e9:.0f}"
        cells.append([*start, f"{row['seconds'] * 1e6:.1f}", rate, fraction, row["bound"] or "", *speedups])
    return table(header, cells)


def _goal(goal: Mapping[str, Any]) -> list[str]:
    value = "–" if goal["value"] is None else f"{goal['value']:.2f}"
    return [goal["goal"], f"{goal['limit']:g}", value, {True: "yes", False: "no", None: "not measured"}[goal["met"]]]


def _rate(name: str, value: float) -> str:
    return f"{value / 1e9:.0f} GB/s" if name == "copy" else f"{value / 1e12:.0f} T/s"
