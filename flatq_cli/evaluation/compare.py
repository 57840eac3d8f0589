"""Evaluations side by side: a plain row for each run, and for each result file of what is no run (full precision)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatq_cli.evaluation.result import read_result
from flatq_cli.store.run import Run

Row = dict[str, Any]
_PREFERRED_FORMAT = "flatq"
_MADE_BY = ("calibrate", "fuse", "fuse/tune")


def compare(paths: list[Path]) -> list[Row]:
    """Gather what runs and result files hold; renders nothing.

    Args:
        paths: run directories, and JSON files of schema `flatq.eval/1`.
    Returns:
        For each path, in order, a flat dict: `name`; `kind` and `recipe` as in the schema; `perplexity.TEXT` and
        `TASK.METRIC` for each figure, the newest file's where several of a run have the same; `bytes` of the export's
        safetensors (of a float model that one of the runs was made from: its size in 16 bits); `compression` of that
        against the float model in 16 bits; `seconds` of calibrate and fuse; `memory_bytes`, the resident memory that
        calibrate, fuse or tuning took at most. What is unknown is None; a figure that was not measured has no key.
    Raises:
        UsageError: a path that is neither, or a file that is broken.
    """
    runs = [Run.open(path) for path in paths if path.suffix != ".json"]
    float_bytes = {run.config.model.spec: _export_sizes(run)[1] for run in runs}
    return [_file_row(path, float_bytes) if path.suffix == ".json" else _run_row(path) for path in paths]


def _file_row(path: Path, float_bytes: dict[str, float | None]) -> Row:
    """The row of a result file; a float model that one of the runs was made from has the size it has in 16 bits."""
    result = read_result(path)
    size = float_bytes.get(result["target"]) if result["kind"] == "float" else None
    compression = 1.0 if size else None
    unknown = {"seconds": None, "memory_bytes": None}
    return {"name": path.stem, **_figures([result]), "bytes": size, "compression": compression, **unknown}


def _run_row(path: Path) -> Row:
    run = Run.open(path)
    results = sorted(path.glob("eval/*.json"), key=lambda file: file.stat().st_mtime)
    size, float_bytes = _export_sizes(run)
    seconds = sum(run.stage(name).manifest.seconds for name in ("calibrate", "fuse"))
    peaks = [run.stage(name).manifest.peak_memory_bytes for name in _MADE_BY]
    return {
        "name": path.name,
        **_figures([read_result(file) for file in results]),
        "bytes": size,
        "compression": float_bytes / size if size and float_bytes else None,
        "seconds": seconds or None,
        "memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def _figures(results: list[dict[str, Any]]) -> Row:
    """What results say, the later ones over the earlier ones; without standard errors."""
    row: Row = {"kind": None, "recipe": None}
    for result in results:
        row["kind"], row["recipe"] = result["kind"], result["recipe"]
        row.update({f"perplexity.{name}": measured["value"] for name, measured in result["perplexity"].items()})
        for task, metrics in result["tasks"].items():
            row.update({f"{task}.{name}": value for name, value in metrics.items() if "_stderr" not in name})
    return row


def _export_sizes(run: Run) -> tuple[int | None, float | None]:
    """Bytes of an export's weights, and of the float model's in 16 bits; flatq's own format goes before others."""
    formats = sorted(
        (run.path / "export").glob("*/manifest.json"), key=lambda file: file.parent.name != _PREFERRED_FORMAT
    )
    if not formats:
        return None, None
    folder = formats[0].parent
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    float_bytes = run.stage(f"export/{folder.name}").manifest.metrics.get("float16_bytes")
    return size or None, float(float_bytes) if isinstance(float_bytes, int | float) else None
