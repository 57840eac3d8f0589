"""Evaluations that are judged: from models and gate files to verdicts, in what is returned and what a run keeps."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from flatq_cli.config.gate_files import Gate, load_gates
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.evaluation.shard import Shard
from flatq_cli.stages.calibrate import calibrate, open_or_create_run
from flatq_cli.stages.eval_request import EvalRequest, check_request
from flatq_cli.stages.evaluate import evaluate
from flatq_cli.stages.fuse import fuse
from flatq_cli.stages.judge import judge_result
from flatq_cli.stages.merge import merge
from flatq_cli.store.progress import SilentProgress
from tests.tiny import bpe_tokenizer, random_model, save_model, tiny_config, tiny_recipe, tiny_text

SMALL: dict[str, Any] = {"seqlen": 32, "limit": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a slightly damaged copy, a broken one, and a text with sentences."""
    place = tmp_path_factory.mktemp("judge")
    rng = random.Random(1)
    sentences = [" ".join(f"w{word}" for word in rng.choices(range(40), k=9)) + " ww." for _ in range(60)]
    (place / "story.txt").write_text(" ".join(sentences), encoding="utf-8")
    tiny_text(place)
    model = random_model(tiny_config("llama"))
    save_model(model, bpe_tokenizer(), place / "model")
    for name, noise in (("damaged", 0.1), ("broken", math.nan)):
        copy = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        save_model(copy, bpe_tokenizer(), place / name)
    return place


def asked(folder: Path, target: str, *gates: Gate, **changes: Any) -> EvalRequest:
    settings = {"ppl": (str(folder / "text.txt"),), "baseline": str(folder / "model"), **SMALL, **changes}
    return EvalRequest(str(folder / target), gates=gates, **settings)


def gate(metric: str, bound: Any, limit: float, **settings: Any) -> Gate:
    return Gate(metric, metric, bound, limit, **settings)


def judged(request: EvalRequest) -> EvalResult:
    return evaluate(request, SilentProgress())


def verdicts(result: EvalResult) -> dict[str, str]:
    return {entry["name"]: entry["verdict"] for entry in result.gates}


def test_a_damaged_model_is_told_from_its_original(folder: Path):
    limits = (
        gate("perplexity_ratio", "max", 1.001),
        gate("top1_agreement", "min", 0.999),
        gate("kl_divergence", "max", 9),
    )
    result = judged(asked(folder, "damaged", *limits))
    assert verdicts(result)["top1_agreement"] == "regression"
    assert verdicts(result)["kl_divergence"] == "pass"
    assert result.baseline is not None
    assert result.comparison is not None
    shown = result.comparison["perplexity"]["text"]
    ratio = result.perplexity["text"].value / result.baseline.perplexity["text"].value
    assert shown["perplexity_ratio"]["value"] == pytest.approx(ratio)
    assert shown["perplexity_ratio"]["count"] == 6
    assert shown["kl_divergence"]["value"] == pytest.approx(sum(result.evidence.pairs["text"].kl) / 6)


def test_a_model_is_no_worse_than_itself(folder: Path):
    request = asked(
        folder, "model",
        gate("perplexity_ratio", "max", 1.0), gate("kl_divergence", "max", 1e-9), gate("top1_agreement", "min", 1.0),
        gate("lastword:story.acc_drop", "max", 0.5),
        tasks=(f"lastword:{folder / 'story.txt'}",),
    )  # fmt: skip
    result = judged(request)
    assert set(verdicts(result).values()) == {"pass"}
    assert result.comparison is not None
    drop = result.comparison["tasks"]["lastword:story"]["acc"]
    assert (drop["value"], drop["change"], drop["p_value"], drop["count"]) == (0.0, "within noise", 1.0, 6)


def test_a_broken_model_passes_no_gate_whatever_the_file_allows(folder: Path):
    lenient = {"anomalous_passes": True, "undecided_passes": True, "confidence": 0.0}
    limits = [gate(metric, "max", 1e9, **lenient) for metric in ("perplexity", "perplexity_ratio", "kl_divergence")]
    result = judged(asked(folder, "broken", *limits))
    assert set(verdicts(result).values()) == {"anomalous"}
    assert not any(entry["passed"] for entry in result.gates)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["gates"][0]["value"] is None


def test_a_run_keeps_its_verdicts_and_a_junit_file(folder: Path):
    recipe = tiny_recipe(folder, weights={"bits": 2})
    run = open_or_create_run(str(folder / "model"), recipe, folder / "run", recipe_name="two-bit")
    calibrate(run, "cpu", SilentProgress())
    fuse(run, "cpu", SilentProgress())
    result = judged(asked(folder, "run", *load_gates(["w4a16"])))
    assert "regression" in verdicts(result).values()
    (kept,) = (folder / "run" / "eval").glob("*.json")
    assert json.loads(kept.read_text(encoding="utf-8")) == result.to_json()
    cases = ElementTree.parse(kept.with_suffix(".xml")).getroot().iter("testcase")
    assert [case.get("name") for case in cases] == [
        "perplexity_ratio.text", "kl_divergence.text", "top1_agreement.text",
    ]  # fmt: skip
    page = kept.with_suffix(".md").read_text(encoding="utf-8")
    assert "gates failed**" in page
    assert "| text: perplexity ratio |" in page
    judged(asked(folder, "run"))
    assert not kept.with_suffix(".xml").exists()  # nothing was judged this time


def test_without_a_baseline_there_is_no_comparison_and_without_gates_no_verdict(folder: Path):
    alone = judged(asked(folder, "model", baseline=None))
    assert (alone.comparison, alone.gates) == (None, ())
    assert "comparison" not in alone.to_json()


@pytest.mark.parametrize(
    ("limit", "changes", "expected"),
    [
        (gate("perplexity_ratio", "max", 2), {"baseline": None}, "'perplexity_ratio' is compared with a baseline"),
        (
            gate("arc_easy.acc_drop", "max", 2),
            {"baseline": None, "tasks": ("arc_easy",)},
            "is compared with a baseline",
        ),
        (gate("perplexity.txt", "max", 2), {}, r"nothing measured is called 'perplexity\.txt'"),
        (gate("perplexity", "max", 2), {"shard": Shard(1, 2)}, "--gates: a shard has a part of the figures; give"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_a_model_is_opened(folder: Path, limit, changes, expected):
    request = replace(asked(folder, "nowhere", limit), **changes)
    with pytest.raises(UsageError, match=expected):
        check_request(request)


def test_a_gate_on_a_score_that_a_task_does_not_have_is_refused_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def measured(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("flatq_cli.stages.evaluate._measure_texts", measured)
    request = asked(folder, "model", gate("lastword:story.f1", "min", 0.5), tasks=(f"lastword:{folder / 'story.txt'}",))
    with pytest.raises(UsageError, match=r"nothing measured is called 'lastword:story\.f1'.*lastword:story\.acc"):
        judged(request)


def test_shards_are_judged_when_they_are_joined(folder: Path, tmp_path: Path):
    limits = (gate("perplexity_ratio", "max", 1.001), gate("lastword:story.acc_drop", "max", 0.9))
    tasks = (f"lastword:{folder / 'story.txt'}",)
    whole = judged(asked(folder, "damaged", *limits, tasks=tasks))
    files = []
    for part in (1, 2):
        shard = judged(asked(folder, "damaged", tasks=tasks, shard=Shard(part, 2)))
        assert (shard.gates, shard.comparison) == ((), None)
        files.append(tmp_path / f"{part}.json")
        files[-1].write_text(json.dumps(shard.to_json()), encoding="utf-8")
    joined = merge(files, SilentProgress(), limits)
    assert joined.gates == whole.gates
    assert joined.comparison == whole.comparison


def test_a_gate_on_what_was_not_measured_is_an_error_afterwards_too(folder: Path):
    result = judged(asked(folder, "model"))
    with pytest.raises(UsageError, match=r"nothing measured is called 'mmlu\.acc'"):
        judge_result(result, [gate("mmlu.acc", "min", 0.5)])
