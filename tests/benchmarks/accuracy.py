"""What every method costs and gives: `make accuracy` writes docs/benchmarks/accuracy.md.

One small model, one text to calibrate on, two to judge by, and four tasks of lm-eval from a folder (`FLATQ_DATA`). All
of it through the `flatq` command, each method in each format a run of its own under --runs; what is there already is
not done again, so a killed benchmark goes on, and a new method costs only itself. The rows are kept beside the page,
docs/benchmarks/accuracy.json: those that were measured elsewhere stay until they are measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatq_cli.evaluation.compare import compare

MODEL = "smollm2-135m"
TEXTS = {"wikitext2-eval": "WikiText-2", "pydoc-test": "Python's reference"}
TASKS = {"arc_easy": "acc", "piqa": "acc", "winogrande": "acc", "hellaswag": "acc_norm"}
QUESTIONS = 200
WINDOWS = ("--seqlen", "2048", "--limit", "8")

FORMATS: dict[str, dict[str, Any]] = {
    "W4A4KV4": {},
    "W4A8KV8": {"activations.bits": 8, "kv_cache.bits": 8},
    "W4A16": {"activations.bits": 16, "activations.clip": "none", "kv_cache.bits": 16, "kv_cache.clip": "none"},
    "W3A16": {
        "weights.bits": 3,
        "activations.bits": 16,
        "activations.clip": "none",
        "kv_cache.bits": 16,
        "kv_cache.clip": "none",
    },
}


class Method(NamedTuple):
    """A row of the table: a bundled recipe with some keys changed."""

    recipe: str
    changed: Mapping[str, Any] = {}


METHODS = {
    "rtn": Method("rtn"),
    "smoothquant": Method("smoothquant"),
    "hadamard": Method("hadamard"),
    "spin": Method("spin"),
    "balanced": Method("balanced"),
    "balanced, GPTQ": Method("balanced", {"weights.rounding": "gptq"}),
    "flatquant": Method("flatquant"),
    "flatquant, GPTQ": Method("flatquant", {"weights.rounding": "gptq"}),
    "flatq": Method("flatq"),
    "flatq-best": Method("flatq-best"),
}
BASELINE = "full precision"
REFERENCE = "flatquant"
"""Times are shares of its."""

INTRODUCTION = """\
# Accuracy

Written by `make accuracy FLATQ_DATA=DIR` (`tests/benchmarks/accuracy.py`): SmolLM2-135M, calibrated on 16 × 256 tokens
of WikiText-2 (GPTQ reads 64 × 256; tuning reads as much as its steps take), judged by the perplexity of 8 windows of
2,048 tokens of other articles and of as many of Python's language reference{tasks}. Seconds are those of calibrate and
fuse as their manifests have them, on two CPU cores; memory is the larger peak of the two.

Versions: {versions}."""

OF_TASKS = f""",
and by four tasks of lm-eval, {QUESTIONS} questions each (a standard error of about 3 points a task)"""


def run_method(name: str, bits: str, runs: Path, data: Path, tasks: bool) -> None:
    """Quantize and evaluate one method in one format, as far as that is not done."""
    method, run = METHODS[name], run_of(name, bits, runs)
    settings = {
        "calibration.data": data / "wikitext2-calib.txt",
        "calibration.samples": 16,
        "calibration.seqlen": 256,
        **FORMATS[bits],
        **method.changed,
    }
    changed = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    flatq("calibrate", "--model", MODEL, "--recipe", method.recipe, "--run", run, *changed)
    flatq("fuse", run)
    evaluate(run, run / "eval", data, tasks)


def evaluate(target: str | Path, results: Path, data: Path, tasks: bool) -> list[Path]:
    """Perplexity and, where asked for, the tasks, of a run or of the float model; the result files."""
    files = [results / "perplexity.json", *([results / "tasks.json"] if tasks else [])]
    texts = ("--ppl", data / "wikitext2-eval.txt", "--ppl", "pydoc-test", *WINDOWS)
    questions = ("--tasks", ",".join(TASKS), "--data-dir", data, "--limit", QUESTIONS)
    for file, asked in zip(files, (texts, questions), strict=False):
        if not file.exists():
            results.mkdir(parents=True, exist_ok=True)
            flatq("eval", target, *asked, "--json", file)
    return files


def flatq(*arguments: object) -> None:
    """The command, as a user calls it; its progress goes to stderr."""
    subprocess.run(
        [sys.executable, "-m", "flatq_cli", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, text=True
    )


def run_of(name: str, bits: str, runs: Path) -> Path:
    """Where a method's run in a format lives."""
    return runs / bits / name.replace(", ", "-").lower()


Rows = dict[str, list[dict[str, Any]]]
"""The rows of every format, those of full precision first."""


def gather(runs: Path, tasks: bool, known: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> Rows:
    """The rows of every format; of methods that have not run here those of `known`, if it has them."""
    files = [runs / "float" / name for name in ("perplexity.json", "tasks.json")]
    baseline: dict[str, Any] = {}
    for file in files[: 2 if tasks else 1]:
        baseline |= {key: value for key, value in compare([file])[0].items() if value is not None}
    found = {}
    for bits in FORMATS:
        earlier = {str(row["name"]): row for row in (known or {}).get(bits, ())}
        rows = [{**baseline, "name": BASELINE}]
        for name in METHODS:
            run = run_of(name, bits, runs)
            if (run / "eval" / "perplexity.json").exists():
                rows.append({**shown(compare([run])[0]), "name": name})
            elif name in earlier:
                rows.append(dict(earlier[name]))
        found[bits] = rows
    return found


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page takes from a row of `flatq compare`."""
    keys = (*(f"perplexity.{text}" for text in TEXTS), *(f"{task}.{metric}" for task, metric in TASKS.items()))
    return {key: row[key] for key in (*keys, "seconds", "memory_bytes") if row.get(key) is not None}


def page(found: Mapping[str, Sequence[Mapping[str, Any]]], versions: Mapping[str, str], note: str = "") -> str:
    """docs/benchmarks/accuracy.md; `note` says what else there is to know of this run."""
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    asked = any(f"{task}.{metric}" in row for rows in found.values() for row in rows for task, metric in TASKS.items())
    parts = [INTRODUCTION.format(tasks=OF_TASKS if asked else "", versions=listed)]
    parts += ["", note] if note else []
    for bits, rows in found.items():
        if len(rows) > 1:
            parts += ["", f"## {bits}", "", *table(rows)]
    parts += ["", "## Time against perplexity", "", *trade(found["W4A4KV4"])]
    return "\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A format's rows."""
    tasks = [task for task in TASKS if any(f"{task}.{TASKS[task]}" in row for row in rows)]
    head = ["method", *TEXTS.values(), *tasks, *(["mean"] if tasks else []), "seconds", "memory"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        scores = [row.get(f"{task}.{TASKS[task]}") for task in tasks]
        known = [score for score in scores if score is not None]
        mean = [sum(known) / len(known) if len(known) == len(scores) else None] if tasks else []
        cells = [
            str(row["name"]),
            *(number(row.get(f"perplexity.{text}")) for text in TEXTS),
            *(percent(score) for score in [*scores, *mean]),
            number(row.get("seconds"), 0),
            f"{row['memory_bytes'] / 2**30:.1f} GiB" if row.get("memory_bytes") else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def trade(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Time and perplexity, quickest first; times also as shares of the paper's setting's."""
    timed = sorted((row for row in rows if row.get("seconds")), key=lambda row: float(row["seconds"]))
    reference = next((float(row["seconds"]) for row in timed if row["name"] == REFERENCE), None)
    lines = [f"| method | seconds | of `{REFERENCE}`'s | perplexity |", "| --- | ---: | ---: | ---: |"]
    for row in timed:
        share = f"1/{reference / row['seconds']:.1f}" if reference is not None else ""
        lines.append(
            f"| {row['name']} | {number(row['seconds'], 0)} | {share} | {number(row['perplexity.wikitext2-eval'])} |"
        )
    return lines


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits if value < 1000 else 0}f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of wikitext2-*.txt and the tasks")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/accuracy.md"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--no-tasks", action="store_true", help="perplexity alone")
    parser.add_argument("--note", default="", help="a sentence for the page")
    options = parser.parse_args(None if arguments is None else list(arguments))
    tasks = not options.no_tasks
    evaluate(MODEL, options.runs / "float", options.data, tasks)
    for bits in options.formats:
        for name in options.methods:
            print(f"{bits}: {name}", file=sys.stderr)
            run_method(name, bits, options.runs, options.data, tasks)
    versions = json.loads((options.runs / "float" / "perplexity.json").read_text())["versions"]
    kept = options.out.with_suffix(".json")
    known = json.loads(kept.read_text(encoding="utf-8"))["rows"] if kept.exists() else None
    found = gather(options.runs, tasks, known)
    kept.write_text(json.dumps({"rows": found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    options.out.write_text(page(found, versions, options.note), encoding="utf-8")


if __name__ == "__main__":
    main()
