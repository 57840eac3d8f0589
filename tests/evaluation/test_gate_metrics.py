from __future__ import annotations

from typing import Any

import pytest
import yaml
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from flatq_cli.config.gate_files import Gate
from flatq_cli.config.locations import configs_dir
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.gate_metrics import assign, check_baseline, expected, task_metrics

KNOWN = expected(["prose", "python.3"], {"arc_easy": {"acc": True, "acc_norm": True}, "piqa": {"acc": True}})
ONE_TEXT = expected(["prose"], {})


def gate(metric: str, bound: str | None = None, name: str | None = None, limit: float = 1.0) -> Gate:
    higher = metric.endswith(("acc", "norm")) or metric.startswith("top1")
    side: Any = bound or ("min" if higher else "max")
    return Gate(name or metric, metric, side, limit, where="gates.yaml:3")


def test_a_figure_is_named_in_full_or_as_that_of_the_only_text():
    full = assign([gate("perplexity_ratio.prose"), gate("arc_easy.acc")], KNOWN, baseline=True)
    assert [item.metric for item in full] == ["perplexity_ratio.prose", "arc_easy.acc"]
    (short,) = assign([gate("perplexity_ratio")], ONE_TEXT, baseline=True)
    assert (short.metric, short.name) == ("perplexity_ratio.prose", "perplexity_ratio")


def test_a_text_whose_name_has_a_dot_is_found():
    assert assign([gate("perplexity.python.3")], KNOWN, baseline=False)[0].metric == "perplexity.python.3"


def test_a_star_stands_for_each_figure_that_has_no_gate_of_its_own():
    found = assign([gate("*.acc_drop"), gate("piqa.acc_drop", limit=0.1)], KNOWN, baseline=True)
    assert [(item.name, item.metric, item.limit) for item in found] == [
        ("arc_easy.acc_drop", "arc_easy.acc_drop", 1.0),
        ("piqa.acc_drop", "piqa.acc_drop", 0.1),
    ]
    named = assign([gate("kl_divergence.*", name="divergence")], KNOWN, baseline=True)
    assert [item.name for item in named] == ["divergence: kl_divergence.prose", "divergence: kl_divergence.python.3"]


@pytest.mark.parametrize(
    ("asked", "baseline", "expected_line"),
    [
        (gate("perplexity"), True, r"'perplexity' of which text\? One of perplexity\.prose, perplexity\.python\.3"),
        (
            gate("arc_esy.acc"),
            True,
            r"nothing measured is called 'arc_esy\.acc' \(did you mean 'arc_easy\.acc'\?\); there",
        ),
        (gate("*.f1"), True, r"nothing measured is called '\*\.f1'"),
        (gate("arc_easy.acc_drop"), False, "is compared with a baseline, and there is none: add --baseline"),
        (gate("perplexity_ratio.*"), False, r"'perplexity_ratio\.prose' is compared with a baseline"),
        (gate("perplexity.prose", "max_relative"), False, "is compared with a baseline"),
        (gate("perplexity_ratio.prose", "max_relative"), True, "is relative to the baseline already: give it a max or"),
        (gate("arc_easy.acc", "max"), True, r"more of 'arc_easy\.acc' is better, so its limit is a min, not a max"),
        (gate("arc_easy.acc", "max_relative"), True, "its limit is a min_relative, not a max_relative"),
        (gate("kl_divergence.prose", "min"), True, "less of 'kl_divergence.prose' is better, so its limit is a max"),
    ],
)
def test_what_cannot_be_judged_is_an_error_with_its_line(asked: Gate, baseline: bool, expected_line: str):
    with pytest.raises(UsageError, match=r"^gates\.yaml:3: .*" + expected_line):
        assign([asked], KNOWN, baseline=baseline)


def test_every_gate_with_a_fault_is_named():
    asked = [gate("perplexity_ratio"), gate("arc_easy.acc"), gate("piqa.f1"), gate("piqa.acc_drop")]
    with pytest.raises(UsageError) as told:
        assign(asked, KNOWN, baseline=False)
    assert [line.split("'")[1] for line in str(told.value).split("; gates.yaml")] == [
        "perplexity_ratio", "piqa.f1", "piqa.acc_drop",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"'perplexity_ratio' is compared .*; .*'piqa\.acc_drop' is compared"):
        check_baseline(asked)


def test_a_text_metric_without_a_text_says_how_to_measure_one():
    with pytest.raises(UsageError, match=r"'perplexity' is measured of a text, and there is none: add --ppl FILE"):
        assign([gate("perplexity")], expected([], {"piqa": {"acc": True}}), baseline=False)


def test_two_patterns_for_one_figure_are_refused():
    with pytest.raises(UsageError, match=r"the gate at gates.yaml:3 is about 'piqa.acc_drop' too"):
        assign([gate("*.acc_drop"), gate("piqa.*_drop", name="piqa.*_drop")], KNOWN, baseline=True)


def test_what_a_group_will_measure_is_taken_as_it_is_named():
    found = assign([gate("mmlu.acc"), gate("*.acc_drop")], [], baseline=True, unknown={"mmlu"})
    assert [item.metric for item in found] == ["mmlu.acc"]


def test_the_harnesss_tasks_say_what_they_will_measure():
    manager = TaskManager(include_path=str(configs_dir() / "tasks"), include_defaults=False)
    questions = Dataset.from_list([{"context": "The dog sees the", "word": "cat"}])
    config = yaml.safe_load((configs_dir() / "tasks" / "lastword.yaml").read_text(encoding="utf-8"))
    filters = [{"name": "first", "filter": [{"function": "take_first"}]}]
    data = {"custom_dataset": lambda **_: {"test": questions}}
    plain = manager.load([{**config, **data, "task": "plain"}])["tasks"]["plain"]
    filtered = manager.load([{**config, **data, "task": "filtered", "filter_list": filters}])["tasks"]["filtered"]
    inner, outer = Group("inner"), Group("outer")
    inner.add(filtered)
    outer.add(inner)
    assert task_metrics([plain, outer]) == (
        {
            "plain": {"perplexity": False, "acc": True},
            "filtered": {"perplexity,first": False, "acc,first": True},
        },
        {"inner", "outer"},
    )
