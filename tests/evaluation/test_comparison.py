"""Figures from evidence, against numbers worked out here from the same evidence in another way."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy import stats

from flatq_cli.config.gate_files import Gate
from flatq_cli.evaluation.comparison import Measured, comparison, figures, pooled
from flatq_cli.evaluation.evidence import GroupEvidence, PairEvidence, TaskEvidence, WindowEvidence
from flatq_cli.evaluation.gates import decide
from flatq_cli.evaluation.paired import Drop, Mean, Normal, Proportion, Resampled


def on_text(*losses: float) -> Measured:
    windows = WindowEvidence(tuple(range(len(losses))), losses, 32 * len(losses), 32)
    return Measured({"prose": math.exp(sum(losses) / len(losses))}, {"prose": windows})


def on_task(values: list[float], metric: str = "acc", stderr: float | None = None, **about) -> Measured:
    about = {"aggregations": {metric: "mean"}, "higher_is_better": {metric: True}, **about}
    figure = sum(values) / len(values)
    if about["aggregations"][metric] == "perplexity":
        figure = math.exp(-figure)
    scores = {metric: figure} | ({} if stderr is None else {f"{metric}_stderr": stderr})
    return Measured(scores={"task": scores}, answers={"task": TaskEvidence({metric: dict(enumerate(values))}, **about)})


def same_tokens(windows: int) -> dict[str, PairEvidence]:
    return {"prose": PairEvidence((0.1,) * windows, (0.9,) * windows)}


def answers(right: int, count: int, seed: int) -> list[float]:
    values = [1.0] * right + [0.0] * (count - right)
    random.Random(seed).shuffle(values)
    return values


def test_without_a_baseline_there_are_levels_alone():
    made = figures(on_text(2.0, 2.5))
    assert list(made) == ["perplexity.prose"]
    assert made["perplexity.prose"].value == pytest.approx(math.exp(2.25))
    assert made["perplexity.prose"].exact
    assert list(figures(on_task([1.0, 0.0]))) == ["task.acc"]


def test_a_text_is_compared_window_by_window():
    ours, theirs = (2.3, 2.9, 2.5), (2.0, 2.7, 2.1)
    pair = PairEvidence(kl=(0.2, 0.3, 0.25), agreement=(0.8, 0.7, 0.9))
    made = figures(on_text(*ours), on_text(*theirs), {"prose": pair})
    assert list(made) == [
        "perplexity.prose", "perplexity_ratio.prose", "kl_divergence.prose", "top1_agreement.prose",
    ]  # fmt: skip
    assert made["perplexity.prose"].baseline == pytest.approx(math.exp(6.8 / 3))
    assert made["perplexity_ratio.prose"].value == pytest.approx(math.exp(0.3))
    shown = comparison(made)["perplexity"]["prose"]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert shown["perplexity_ratio"]["low"] == pytest.approx(math.exp(expected.low))
    assert shown["perplexity_ratio"]["high"] == pytest.approx(math.exp(expected.high))
    assert (shown["perplexity_ratio"]["change"], shown["perplexity_ratio"]["count"]) == ("worse", 3)
    assert shown["kl_divergence"]["value"] == pytest.approx(0.25)
    assert shown["top1_agreement"]["value"] == pytest.approx(0.8)
    assert shown["top1_agreement"]["change"] is None
    assert not made["kl_divergence.prose"].higher_is_better
    assert made["top1_agreement.prose"].higher_is_better


def test_how_far_the_ratio_of_models_with_other_tokens_can_be_trusted_is_not_known():
    made = figures(on_text(2.3, 2.9), on_text(2.0, 2.7, 2.1))
    assert list(made) == ["perplexity.prose", "perplexity_ratio.prose"]
    assert made["perplexity_ratio.prose"].value == pytest.approx(math.exp(2.6 - 6.8 / 3))
    assert made["perplexity_ratio.prose"].sample is None
    assert comparison(made)["perplexity"]["prose"]["perplexity_ratio"]["change"] is None


def test_a_drop_of_right_answers_counts_the_questions_that_only_one_model_got_right():
    theirs = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    ours = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    drop = figures(on_task(ours), on_task(theirs))["task.acc_drop"]
    assert drop.sample == Drop(lost=3, won=1, count=7)
    assert drop.value == pytest.approx(2 / 7)
    assert not drop.higher_is_better


def test_a_drop_beyond_noise_is_called_worse_and_one_within_it_is_not():
    theirs = answers(120, 200, 0)
    near = [1 - value if index < 6 else value for index, value in enumerate(theirs)]
    far = [0.0 if index < 60 else value for index, value in enumerate(theirs)]
    better = [1.0 if index < 60 else value for index, value in enumerate(theirs)]
    changes = [
        comparison(figures(on_task(ours), on_task(theirs)))["tasks"]["task"]["acc"] for ours in (near, far, better)
    ]
    assert [change["change"] for change in changes] == ["within noise", "worse", "better"]
    assert changes[0]["p_value"] > 0.05 > changes[1]["p_value"]


def test_of_identical_models_nothing_is_a_change():
    made = figures(*[on_text(2.0, 2.5, 2.1)] * 2, same_tokens(3)) | figures(*[on_task(answers(20, 50, 0))] * 2)
    shown = comparison(made)
    assert shown["perplexity"]["prose"]["perplexity_ratio"]["value"] == 1.0
    assert shown["perplexity"]["prose"]["perplexity_ratio"]["change"] == "within noise"
    assert shown["tasks"]["task"]["acc"] == pytest.approx(
        {"value": 0.0, "low": -0.0714, "high": 0.0714, "change": "within noise", "count": 50, "p_value": 1.0}, abs=1e-3
    )


def test_a_score_with_fractions_is_compared_by_a_paired_t_test():
    rng = np.random.default_rng(0)
    theirs = rng.uniform(0.3, 1, 30)
    ours = theirs - rng.normal(0.1, 0.05, 30)
    made = figures(*(on_task([float(x) for x in values], "f1_of_a_question") for values in (ours, theirs)))
    drop = made["task.f1_of_a_question_drop"]
    assert isinstance(drop.sample, Mean)
    expected = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    assert drop.sample.interval(0.95) == pytest.approx((expected.low, expected.high))


def test_where_lower_is_better_a_drop_is_a_rise_and_a_perplexity_is_resampled():
    about = {"aggregations": {"perplexity": "perplexity"}, "higher_is_better": {"perplexity": False}}
    rng = np.random.default_rng(0)
    theirs = rng.normal(-3, 1, 200)
    ours = theirs - rng.normal(0.2, 0.1, 200)
    made = figures(*(on_task([float(x) for x in values], "perplexity", **about) for values in (ours, theirs)))
    level, drop = made["task.perplexity"], made["task.perplexity_drop"]
    assert level.sample is not None
    assert level.sample.value == pytest.approx(level.value) == pytest.approx(math.exp(-ours.mean()))
    assert drop.value == pytest.approx(math.exp(-ours.mean()) - math.exp(-theirs.mean()))
    assert isinstance(drop.sample, Resampled)
    # By the delta method: what a question does to the one perplexity, less what it does to the other.
    influence = -math.exp(-ours.mean()) * (ours - ours.mean()) + math.exp(-theirs.mean()) * (theirs - theirs.mean())
    half = 1.96 * influence.std() / math.sqrt(200)
    assert drop.sample.interval(0.95) == pytest.approx((drop.value - half, drop.value + half), rel=0.12)


def test_a_metric_that_is_no_mean_has_the_noise_that_the_harness_says_as_if_it_were_not_paired():
    about = {"aggregations": {"mcc": "matthews_corrcoef"}}
    ours, theirs = on_task([1.0, 0.0], "mcc", 0.03, **about), on_task([1.0, 1.0], "mcc", 0.04, **about)
    made = figures(ours, theirs)
    assert made["task.mcc"].sample == Normal(0.5, 0.03, 2)
    assert made["task.mcc_drop"].sample == Normal(0.5, pytest.approx(0.05), 2)
    assert figures(on_task([1.0, 0.0], "mcc", **about))["task.mcc"].sample is None


def test_a_filters_metric_is_found_by_the_name_without_it():
    ours, theirs = (
        on_task(
            answers(right, 60, 0),
            "exact_match,strict-match",
            aggregations={"exact_match,strict-match": "mean"},
            higher_is_better={"exact_match": True},
        )
        for right in (20, 30)
    )
    made = figures(ours, theirs)
    assert made["task.exact_match,strict-match_drop"].value == pytest.approx(1 / 6)
    assert isinstance(made["task.exact_match,strict-match_drop"].sample, Drop)


def test_chance_follows_from_the_numbers_of_choices():
    choices = dict.fromkeys(range(60), 4) | dict.fromkeys(range(60, 100), 2)
    ours, theirs = (on_task(answers(right, 100, 0), choices=choices) for right in (36, 70))
    guessing = figures(ours, theirs)["task.acc"].guessing
    assert guessing is not None
    assert (guessing.score, guessing.chance) == (0.36, pytest.approx(0.35))
    assert guessing.tail > 0.4
    assert guessing.baseline_tail is not None
    assert guessing.baseline_tail < 1e-6
    assert figures(on_task(answers(36, 100, 0)))["task.acc"].guessing is None
    assert figures(on_task(answers(36, 100, 0), "mcc", choices=choices))["task.mcc"].guessing is None


def test_a_broken_models_figures_are_there_and_are_no_numbers():
    made = figures(on_text(math.nan, 2.5), on_text(2.0, 2.5), {"prose": PairEvidence((math.nan, 0.1), (0.0, 0.9))})
    assert math.isnan(made["perplexity_ratio.prose"].value)
    assert math.isnan(made["kl_divergence.prose"].value)
    shown = comparison(made)["perplexity"]["prose"]["perplexity_ratio"]
    assert shown == {"value": None, "low": None, "high": None, "change": None, "count": 2}
    scores = figures(on_task([math.nan, 1.0]), on_task([0.0, 1.0]))
    assert math.isnan(scores["task.acc_drop"].value)
    assert scores["task.acc_drop"].sample is None
    json.dumps(comparison(made | scores), allow_nan=False)


def test_a_baseline_that_is_broken_makes_no_model_look_good():
    made = figures(on_text(2.0, 2.5), on_text(math.inf, 2.5), same_tokens(2))
    assert math.isnan(made["perplexity_ratio.prose"].value)
    gate = Gate("ratio", "perplexity_ratio.prose", "max", 1.5, confidence=0.0, anomalous_passes=True)
    judged = decide(gate, made["perplexity_ratio.prose"])
    assert (judged.passed, judged.verdict.reason) == (
        False,
        "the figure is nan: the output of the model or of its baseline is broken",
    )
    comparison(made)


def test_a_group_that_counts_questions_is_judged_by_the_questions_of_all_its_tasks():
    parts = {
        task: TaskEvidence(
            {"acc": dict(enumerate(answers(right, count, 1)))},
            choices=dict.fromkeys(range(count), 4),
            aggregations={"acc": "mean"},
            higher_is_better={"acc": True},
        )
        for task, right, count in (("one", 30, 40), ("two", 12, 60))
    }
    group = GroupEvidence(("one", "two"), ({"metric": "acc", "aggregation": "mean", "weight_by_size": True},))
    level = figures(Measured(scores={"both": {"acc": 0.42}}, answers={"both": pooled(group, parts)}))["both.acc"]
    assert level.sample == Proportion(42, 100)
    assert level.guessing is not None
    assert level.guessing.tail == pytest.approx(stats.binom.sf(41, 100, 0.25))


def test_a_group_that_counts_tasks_has_the_noise_that_the_harness_says():
    parts = {task: TaskEvidence({"acc": {0: 1.0, 1: 0.0}}, aggregations={"acc": "mean"}) for task in ("one", "two")}
    group = GroupEvidence(("one", "two"), ({"metric": "acc", "aggregation": "mean", "weight_by_size": False},))
    scores = {"both": {"acc": 0.5, "acc_stderr": 0.1}}
    level = figures(Measured(scores=scores, answers={"both": pooled(group, parts)}))["both.acc"]
    assert level.sample == Normal(0.5, 0.1, 4)
