"""A result of `flatq eval` in schema `flatq.eval/1`, with gates of every verdict, for what is made of it."""

from __future__ import annotations

from typing import Any


def gate(name: str, verdict: str, reason: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "metric": name,
        "bound": "max",
        "limit": 0.02,
        "value": 0.1,
        "low": 0.06,
        "high": 0.14,
        "confidence": 0.95,
        "verdict": verdict,
        "passed": verdict == "pass",
        "reason": reason,
        "needed": None,
        **changes,
    }


def judged_result() -> dict[str, Any]:
    figures = {"target": "gpt2", "kind": "float", "recipe": None}
    figures |= {"perplexity": {"prose": {"value": 20.0, "tokens": 256, "seqlen": 32}}, "tasks": {"piqa": {"acc": 0.6}}}
    difference = {"low": 0.06, "high": 0.14, "count": 200}
    return {
        **figures,
        "schema": "flatq.eval/1",
        "target": "runs/mine",
        "kind": "fake-quant",
        "recipe": "flatq",
        "gates": [
            gate("perplexity.prose", "pass", "20 keeps the limit 25", limit=25.0, value=20.0),
            gate(
                "piqa.acc_drop", "regression", "0.1 (0.06 to 0.14 at 0.95 confidence) is above the limit 0.02 by 0.08"
            ),
            gate("piqa.acc", "undecided", "about 3,400 would do", bound="min_relative", passed=True, needed=3400),
            gate("broken", "anomalous", "the figure is nan: the model's output is broken", value=None),
        ],
        "comparison": {
            "confidence": 0.95,
            "perplexity": {
                "prose": {
                    "perplexity_ratio": {"value": 1.2, **difference, "low": 1.1, "high": 1.3, "change": "worse"},
                    "kl_divergence": {"value": 0.2, **difference, "low": None, "high": None, "change": None},
                }
            },
            "tasks": {"piqa": {"acc": {"value": 0.1, **difference, "change": "within noise", "p_value": 0.2}}},
        },
        "versions": {"flatq": "0.1.0", "torch": "2.13.0"},
        "seconds": 12.3456,
        "peak_memory_bytes": 1 << 30,
        "peak_gpu_memory_bytes": None,
        "baseline": {**figures, "gates": [], "versions": {}, "seconds": 3.0},
    }
