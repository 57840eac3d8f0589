from __future__ import annotations

from pathlib import Path

import pytest

from flatq_cli.config.gate_files import Gate, gate_file_names, load_gates
from flatq_cli.errors import UsageError


def written(folder: Path, text: str) -> str:
    file = folder / "gates.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_gate_has_what_the_file_says_of_all_gates_unless_it_says_otherwise(tmp_path: Path):
    file = written(
        tmp_path,
        "confidence: 0.9\nundecided: pass\ngates:\n"
        "  - {metric: perplexity, max: 1.5}\n"
        "  - {metric: arc_easy.acc, min: 0.5, confidence: 0, undecided: fail, anomalous: pass, name: ARC}\n"
        "  - {metric: piqa.acc, min_relative: 0.98}\n",
    )
    assert load_gates([file]) == (
        Gate("perplexity", "perplexity", "max", 1.5, 0.9, True, False, f"{file}:4"),
        Gate("ARC", "arc_easy.acc", "min", 0.5, 0.0, False, True, f"{file}:5"),
        Gate("piqa.acc", "piqa.acc", "min_relative", 0.98, 0.9, True, False, f"{file}:6"),
    )


def test_a_bare_file_is_strict(tmp_path: Path):
    (gate,) = load_gates([written(tmp_path, "gates: [{metric: perplexity, max: 20}]")])
    assert (gate.confidence, gate.undecided_passes, gate.anomalous_passes) == (0.95, False, False)


def test_several_files_are_one_list(tmp_path: Path):
    file = written(tmp_path, "gates: [{metric: perplexity, max: 20}]")
    assert [gate.metric for gate in load_gates(["tasks", file])] == ["*.acc_drop", "perplexity"]


@pytest.mark.parametrize("name", gate_file_names())
def test_every_bundled_file_is_found_by_its_name_and_needs_a_baseline_alone(name: str):
    for gate in load_gates([name]):
        assert gate.metric.partition(".")[0] in ("perplexity_ratio", "kl_divergence", "top1_agreement", "*")
        assert "*" in gate.metric


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "gates:\n- {metric: a, maxx: 1}",
            r"gates\.yaml:2: gates\.0\.maxx: unknown key 'maxx' \(did you mean 'max'\?\)$",
        ),
        ("gates:\n- {metric: a}", r"gates\.yaml:2: gates\.0: a gate has one limit of max, min, .*; found none$"),
        ("gates:\n- {metric: a, max: 1, min: 2}", r"gates\.yaml:2: .*one limit of .*; found max and min$"),
        ("gates:\n- metric: a\n  max: x", r"gates\.yaml:3: gates\.0\.max: 'x' should be a valid number"),
        ("gates:\n- metric: a\n  max: .nan", r"gates\.yaml:3: gates\.0\.max: nan should be a finite number"),
        (
            "gates:\n- metric: a\n  max_relative: 0",
            r"gates\.yaml:3: gates\.0\.max_relative: 0 should be greater than 0",
        ),
        (
            "gates:\n- {metric: a, max: 1, undecided: pas}",
            r":2: gates\.0\.undecided: 'pas' is not one of pass, fail \(did",
        ),
        ("gates:\n- perplexity", r"gates\.yaml:2: gates\.0: this is a section with the keys metric, max, min, "),
        ("gates:\n- {max: 1}", r"gates\.yaml:2: gates\.0\.metric: this key is missing$"),
        ("gates: []", r"gates\.yaml:1: gates: \[\] has no gate"),
        ("", r"gates\.yaml: gates: this key is missing"),
        ("confidence: 1\ngates: [{metric: a, max: 1}]", r"gates\.yaml:1: confidence: 1 should be less than 1"),
        ("gates:\n- {metric: a, max: 1}\n- {metric: a, max: 2}", r"gates\.yaml:3: the gate at .*:2 is called 'a' too"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, expected: str):
    with pytest.raises(UsageError, match=expected):
        load_gates([written(tmp_path, text)])


def test_a_file_that_is_not_there_is_told_with_the_bundled_names(tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"no gates 'w4a4' \(did you mean 'w4a4kv4'\?\); bundled are tasks, w4a16, w4a4kv4"
    ):
        load_gates(["w4a4"])
    with pytest.raises(UsageError, match=r"missing\.yaml: cannot read this gate file \(No such file"):
        load_gates([str(tmp_path / "missing.yaml")])
