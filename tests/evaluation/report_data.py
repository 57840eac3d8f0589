"""Data of schema `flatq.report/1` for tests of the pages: small, whole, and with any name in it."""

from __future__ import annotations

from typing import Any

from flatq_cli.config.recipe import Recipe

TUNING = {"steps": 64, "divergence_before": 0.3, "divergence_after": 0.25, "seconds": 130.0}


def side(name: str, error: float | None, tuned: bool = False) -> dict[str, Any]:
    """A side of a site, with channels; `tuned`: as of a tuned run."""
    before = {"largest": 40.0, "mean": 2.0, "error": error, "by_channel": [1.0, 40.0, 0.0], "sorted": [40.0, 1.0, 0.0]}
    after = {"largest": 3.0, "mean": 2.0, "error": error, "by_channel": [2.0, 3.0, 1.0], "sorted": [3.0, 2.0, 1.0]}
    other = {**after, "largest": 2.5, "error": error and error / 2, "by_channel": [2.5, 2.0, 1.0]}
    return {"name": name, "before": before, "after": after, "tuned": other if tuned else None}


def report_data(name: str = "tiny-run", **changes: Any) -> dict[str, Any]:
    """A report in which `name` stands for everything that a user or a file names; `changes` replace whole keys."""
    row = {"kind": "fake-quant", "recipe": name, f"perplexity.{name}": 21.5, f"{name}.acc": 0.25}
    memory = {"peak_memory_bytes": 300 * 2**20, "peak_gpu_memory_bytes": None}
    nothing = {"bytes": None, "compression": None, "seconds": None, "memory_bytes": None}
    sites = [
        {
            "site": "attn_in",
            "width": 3,
            "activation": side("activation", 0.02, tuned=True),
            "partner": side("weights", 0.01),
        },
        {"site": "key", "width": 3, "activation": side("keys", 0.004, tuned=True), "partner": side("queries", None)},
    ]
    data = {
        "schema": "flatq.report/1",
        "run": name,
        "model": {
            "spec": name,
            "kind": "directory",
            "name": name,
            "revision": None,
            "fingerprint": "0123456789abcdef",
            "model_type": "llama",
            "num_blocks": 2,
        },
        "data": {"name": name, "sha256": "0", "characters": 9},
        "recipe_name": name,
        "recipe": Recipe(description=name).model_dump(mode="json"),
        "versions": {"flatq": "0.1.0", name: "1"},
        "stages": [{"stage": "calibrate", "status": "done", "bytes": 3000, "seconds": 75.0, **memory}],
        "comparison": [
            {
                "name": name,
                **row,
                "bytes": 50 * 2**20,
                "compression": 2.5,
                "seconds": 90.0,
                "memory_bytes": 300 * 2**20,
            },
            {
                "name": f"{name} b",
                **row,
                "bytes": 60 * 2**20,
                "compression": 2.0,
                "seconds": 30.0,
                "memory_bytes": None,
            },
            {"name": f"{name} c", **row, **nothing},
            {"name": f"{name} full", **row, "kind": "float", **nothing},
        ],
        "blocks": [
            {"block": 0, "loss_before": 0.3, "loss_after": 0.02, "steps": 5, "rounding_error": 0.01},
            {"block": 1, "loss_before": 0.1, "loss_after": 0.08, "steps": 5, "rounding_error": None},
        ],
        "tuning": {**TUNING, "curve": [0.31, 0.28, None, 0.24]},
        "flatness": {
            "tokens": 2048,
            "shown": [{"block": 0, "why": "first"}],
            "blocks": [{"block": 0, "sites": sites}, {"block": 1, "sites": sites}],
        },
        "missing": [],
    }
    return {**data, **changes}


def untuned(data: dict[str, Any]) -> None:
    """Make it the report of a run that was not tuned, in place."""
    data["tuning"] = None
    for block in data["flatness"]["blocks"]:
        for site in block["sites"]:
            site["activation"]["tuned"] = None


def bare_data(name: str = "tiny-run") -> dict[str, Any]:
    """The report of a run that has hardly begun."""
    figures = ("kind", "recipe", "bytes", "compression", "seconds", "memory_bytes")
    row = {"name": name, **dict.fromkeys(figures)}
    return report_data(
        name,
        data=None,
        versions={},
        stages=[],
        comparison=[row],
        blocks=[],
        tuning=None,
        flatness=None,
        missing=[f"{name} is missing"],
    )
