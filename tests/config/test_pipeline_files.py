from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatq_cli.config.pipeline_files import load_pipeline
from flatq_cli.errors import UsageError

WHOLE = """\
model: smollm2-135m
recipe: balanced
set:
  weights: {bits: 3}
  tune:
    steps: 64
run: runs/nightly
device: cpu
export: {out: packed}
eval:
  ppl: [pydoc-test]
  tasks: [arc_easy, piqa]
  limit: 20
  batch: auto
  baseline: smollm2-135m
  json: out/result.json
gate_files: [w4a16]
gates:
  - {metric: arc_easy.acc, min: 0.3, confidence: 0}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "pipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_pipeline_file_says_all_that_the_options_say(tmp_path: Path):
    pipeline, gates = load_pipeline(written(tmp_path, WHOLE), {})
    assert (pipeline.model, pipeline.recipe, pipeline.run, pipeline.device) == (
        "smollm2-135m",
        "balanced",
        "runs/nightly",
        "cpu",
    )
    assert pipeline.changes == {"weights": {"bits": 3}, "tune": {"steps": 64}}
    assert pipeline.export.out == "packed"
    assert (pipeline.eval.tasks, pipeline.eval.batch, pipeline.eval.json_file) == (
        ["arc_easy", "piqa"],
        "auto",
        "out/result.json",
    )
    own = gates[-1]
    assert (own.metric, own.bound, own.limit, own.confidence) == ("arc_easy.acc", "min", 0.3, 0.0)
    assert len(gates) > 1, "those of the bundled file come first"


def test_options_replace_what_the_file_says_and_nothing_else(tmp_path: Path):
    given: dict[str, Any] = {"recipe": "rtn", "eval": {"limit": 2, "tasks": ["piqa"]}, "gate_files": []}
    pipeline, gates = load_pipeline(written(tmp_path, WHOLE), given)
    assert (pipeline.recipe, pipeline.eval.limit, pipeline.eval.tasks) == ("rtn", 2, ["piqa"])
    assert (pipeline.eval.ppl, pipeline.eval.baseline) == (["pydoc-test"], "smollm2-135m")
    assert [gate.metric for gate in gates] == ["arc_easy.acc"]


def test_options_alone_are_a_pipeline():
    pipeline, gates = load_pipeline(None, {"model": "x"})
    assert (pipeline.model, pipeline.recipe, pipeline.changes, gates) == ("x", "flatq", {}, ())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("recipe: flatq\n", "model: this key is missing"),
        ("model: m\nrecipes: rtn\n", "2: recipes: unknown key 'recipes' (did you mean 'recipe'?)"),
        ("model: m\nset:\n  weights: {bit: 4}\n", "3: set.weights.bit: unknown key 'bit' (did you mean 'bits'?)"),
        ("model: m\nset: {}\n", "2: set: "),
        ("model: m\neval:\n  limit: 0\n", "3: eval.limit: 0 should be greater than or equal to 1"),
        ("model: m\neval:\n  tasks: piqa\n", "3: eval.tasks: 'piqa' should be a valid list"),
        ("model: m\ndevice: gpu\n", "2: device: 'gpu' is not one of auto, cpu, cuda"),
        ("model: m\ngates:\n  - {metric: perplexity}\n", "3: gates.0: "),
        ("model: m\ngate_files: [nonsense]\n", "--gates: there are no gates 'nonsense'"),
        ("model: m\ngates:\n- {metric: a.b, max: 1}\n- {metric: a.b, min: 0}\n", "4: the gate at "),
        ("- model\n", "1: a pipeline is a list of `key: value` lines"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, line: str):
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_pipeline(file, {})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"cannot read this pipeline"):
        load_pipeline(tmp_path / "none.yaml", {})
