"""The decision by itself: figures and limits in, a word out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import stats

from flatq_cli.config.gate_files import Bound, Gate
from flatq_cli.evaluation.figures import Change, Figure, Guessing
from flatq_cli.evaluation.gates import decide, failures, judge
from flatq_cli.evaluation.paired import Drop, ExpMean, Mean, Proportion, guessing_tail


def gate(bound: Bound, limit: float, **settings: Any) -> Gate:
    return Gate("a gate", "a metric", bound, limit, **settings)


def perplexity(value: float) -> Figure:
    return Figure("prose", "perplexity", value, False, "windows", exact=True)


def ratio(*logs: float) -> Figure:
    sample = ExpMean(Mean(logs))
    change = Change(sample, same=1.0)
    return Figure("prose", "perplexity_ratio", sample.value, False, "windows", sample, compares=True, change=change)


def score(right: int, count: int, choices: int = 4, baseline_right: int | None = None) -> Figure:
    """A score whose errors the baseline, if any, shares as far as can be."""
    guessing = Guessing(
        right / count,
        1 / choices,
        guessing_tail(right, {choices: count}),
        None if baseline_right is None else guessing_tail(baseline_right, {choices: count}),
    )
    level = Figure("task", "acc", right / count, True, "questions", Proportion(right, count), guessing=guessing)
    if baseline_right is None:
        return level
    sample = Drop(max(baseline_right - right, 0), max(right - baseline_right, 0), count)
    return replace(level, baseline=baseline_right / count, change=Change(sample, same=0.0))


def drop(lost: int, won: int, count: int) -> Figure:
    sample = Drop(lost, won, count)
    change = Change(sample, same=0.0)
    return Figure("task", "acc_drop", sample.value, False, "questions", sample, compares=True, change=change)


def test_a_bare_number_passes_up_to_the_limit_and_not_beyond():
    assert judge(gate("max", 20.0), perplexity(20.0)).word == "pass"
    verdict = judge(gate("max", 20.0), perplexity(20.5))
    assert (verdict.word, verdict.reason) == ("regression", "20.5 is above the limit 20 by 0.5")
    assert judge(gate("min", 20.0), perplexity(19.9)).word == "regression"


def test_a_real_drop_is_a_regression_and_one_within_noise_is_undecided():
    real = judge(gate("max", 0.02), drop(lost=60, won=10, count=500))
    noise = judge(gate("max", 0.02), drop(lost=14, won=10, count=200))
    kept = judge(gate("max", 0.02), drop(lost=20, won=21, count=5000))
    assert [verdict.word for verdict in (real, noise, kept)] == ["regression", "undecided", "pass"]
    assert real.reason.startswith("0.1 (0.06")
    assert real.reason.endswith("at 0.95 confidence) is above the limit 0.02 by 0.08")


def test_an_undecided_gate_says_how_many_questions_would_decide_it_and_they_do():
    figure = drop(lost=14, won=12, count=200)
    verdict = judge(gate("max", 0.03), figure)
    assert verdict.word == "undecided"
    assert verdict.needed is not None
    assert f"by 200 questions; about {verdict.needed:,} would do" in verdict.reason
    times = math.ceil(verdict.needed / 200)
    assert judge(gate("max", 0.03), drop(14 * times, 12 * times, 200 * times)).word == "pass"
    fewer = times // 2
    assert judge(gate("max", 0.03), drop(14 * fewer, 12 * fewer, 200 * fewer)).word == "undecided"


def test_no_number_of_questions_tells_a_figure_from_the_limit_it_lies_on():
    verdict = judge(gate("max", 0.02), drop(lost=4, won=0, count=200))
    assert (verdict.word, verdict.needed) == ("undecided", None)
    assert verdict.reason.endswith("it lies on the limit")


def test_one_window_has_no_spread_and_decides_nothing_but_at_confidence_zero():
    verdict = judge(gate("max", 1.5), ratio(0.1))
    assert (verdict.word, verdict.needed) == ("undecided", None)
    assert "by 1 window: one has no spread" in verdict.reason
    assert judge(gate("max", 1.5, confidence=0.0), ratio(0.1)).word == "pass"


def test_confidence_zero_judges_the_bare_number():
    noisy = drop(lost=14, won=10, count=200)
    assert judge(gate("max", 0.021, confidence=0.0), noisy).word == "pass"
    assert judge(gate("max", 0.019, confidence=0.0), noisy).word == "regression"
    better = drop(lost=0, won=30, count=200)
    assert judge(gate("max", 0.02, confidence=0.0), better).word == "pass"


def test_a_figure_whose_noise_is_not_known_is_undecided_unless_noise_is_not_asked_for():
    figure = Figure("task", "bleu", 30.0, True, "questions")
    assert "noise of 30 is not known" in judge(gate("min", 20.0), figure).reason
    assert judge(gate("min", 20.0), figure).word == "undecided"
    assert judge(gate("min", 20.0, confidence=0.0), figure).word == "pass"


def test_a_perplexity_relative_to_one_of_other_tokens_has_noise_that_is_not_known():
    figure = replace(perplexity(22.0), baseline=20.0)
    verdict = judge(gate("max_relative", 1.2), figure)
    assert (verdict.word, verdict.value) == ("undecided", pytest.approx(1.1))
    assert judge(gate("max_relative", 1.2, confidence=0.0), figure).word == "pass"
    assert judge(gate("max", 25.0), figure).word == "pass"


def test_better_than_the_baseline_beyond_noise_is_anomalous():
    for figure in (ratio(-0.2, -0.21, -0.19, -0.2), drop(lost=2, won=40, count=200), score(150, 200, 4, 110)):
        loose = gate("min", 0.2) if figure.kind == "acc" else gate("max", 1.1)
        verdict = judge(loose, figure)
        assert verdict.word == "anomalous"
        assert verdict.reason.startswith("better than the baseline beyond noise")
    within = judge(gate("max", 1.1), ratio(-0.01, 0.02, -0.03, 0.01))
    assert within.word == "pass"


def test_who_asks_for_better_than_the_baseline_is_not_surprised_by_it():
    assert judge(gate("max", 0.9), ratio(-0.2, -0.21, -0.19, -0.2)).word == "pass"
    assert judge(gate("max", -0.05), drop(lost=2, won=60, count=200)).word == "pass"
    assert judge(gate("min_relative", 1.1), score(150, 200, 4, 110)).word == "pass"


def test_a_score_at_chance_is_anomalous_and_says_whether_the_baseline_is_there_too():
    alone = judge(gate("min", 0.2), score(54, 200))
    assert alone.word == "anomalous"
    assert alone.reason.startswith("a score of 0.27 is within noise of guessing (0.25); ")
    both = judge(gate("min", 0.2), score(54, 200, 4, 56))
    assert "and so is the baseline's: these questions say nothing about either" in both.reason
    fallen = judge(gate("min", 0.2), score(54, 200, 4, 120))
    assert fallen.word == "anomalous"
    assert "baseline" not in fallen.reason
    assert judge(gate("min", 0.2), score(80, 200)).word == "pass"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", ["max", "min"])
def test_what_is_no_number_never_passes(value: float, bound: Bound):
    allowed = gate(bound, 1.0, anomalous_passes=True, undecided_passes=True, confidence=0.0)
    for figure in (perplexity(value), replace(drop(1, 1, 10), value=value, sample=None, change=None)):
        judged = decide(allowed, figure)
        assert (judged.verdict.word, judged.passed) == ("anomalous", False)
        assert judged.to_json()["value"] is None


def test_an_allowed_anomaly_is_named_and_the_limit_decides():
    better = ratio(-0.2, -0.21, -0.19, -0.2)
    verdict = judge(gate("max", 1.1, anomalous_passes=True), better)
    assert verdict.word == "pass"
    assert "better than the baseline" in verdict.reason
    assert verdict.reason.endswith("which the gate allows")
    guessed = judge(gate("min", 0.5, anomalous_passes=True), score(54, 200))
    assert guessed.word == "regression"


def test_relative_limits_are_multiples_of_the_baselines_figure():
    measured = replace(perplexity(24.0), baseline=20.0, change=ratio(0.18, 0.19, 0.18, 0.17).change)
    assert judge(gate("max_relative", 1.25), measured).word == "pass"
    assert judge(gate("max_relative", 1.15), measured).word == "regression"
    assert judge(gate("max_relative", 1.25), measured).value == pytest.approx(math.exp(0.18))
    kept = judge(gate("min_relative", 0.9), score(2900, 5000, 4, 3000))
    assert (kept.word, kept.value) == ("pass", pytest.approx(29 / 30))
    low, high = Drop(100, 0, 5000).interval(0.95)
    assert kept.interval == pytest.approx((1 - high / 0.6, 1 - low / 0.6))
    assert judge(gate("min_relative", 0.98), score(2900, 5000, 4, 3000)).word == "regression"


def test_a_relative_limit_of_a_figure_without_a_baseline_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match=r"perplexity\.prose has no baseline"):
        judge(gate("max_relative", 1.2), perplexity(20.0))


def test_a_baseline_of_zero_has_no_multiples():
    figure = Figure(
        "task", "acc", 0.5, True, "questions", Proportion(10, 20), baseline=0.0, change=Change(Drop(0, 10, 20), 0.0)
    )
    verdict = judge(gate("min_relative", 0.9), figure)
    assert (verdict.word, verdict.reason) == ("anomalous", "the baseline's figure is 0.0: there is no multiple of it")


def test_undecided_is_let_through_only_where_the_gate_says_so():
    noisy = drop(lost=14, won=10, count=200)
    assert not decide(gate("max", 0.02), noisy).passed
    let_through = decide(gate("max", 0.02, undecided_passes=True), noisy)
    assert (let_through.verdict.word, let_through.passed) == ("undecided", True)


def test_all_failures_are_told_in_one_line():
    judged = [
        decide(replace(gate("max", 20.0), name="first"), perplexity(25.0)).to_json(),
        decide(replace(gate("max", 20.0), name="second"), perplexity(15.0)).to_json(),
        decide(replace(gate("max", 0.02), name="third"), drop(14, 10, 200)).to_json(),
    ]
    line = failures(judged)
    assert line.startswith("2 of 3 gates failed: first: regression: 25 is above the limit 20 by 5; third: undecided: ")
    assert failures(judged[1:2]) == ""


def test_an_entry_of_the_result_has_its_keys_and_is_json():
    entry = decide(gate("max", 1.5), ratio(0.1)).to_json()
    assert list(entry) == [
        "name", "metric", "bound", "limit", "value", "low", "high", "confidence", "verdict", "passed", "reason",
        "needed",
    ]  # fmt: skip
    assert (entry["low"], entry["high"], entry["verdict"], entry["passed"]) == (0.0, None, "undecided", False)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_a_guesser_is_found_out_975_times_in_1000():
    """Summed over every number of right answers that a guesser can have."""
    lenient = gate("min", 0.0)
    found = sum(
        stats.binom.pmf(right, 200, 0.25)
        for right in range(201)
        if judge(lenient, score(right, 200)).word == "anomalous"
    )
    assert 0.97 <= found <= 0.985


ORDER = {"pass": 0, "undecided": 1, "regression": 2}


@given(
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.floats(-0.3, 0.3), st.sampled_from([0.0, 0.8, 0.95])
)
def test_a_larger_drop_never_gets_a_better_verdict(lost: int, more: int, won: int, limit: float, confidence: float):
    tolerant = gate("max", limit, confidence=confidence, anomalous_passes=True)
    smaller, larger = (judge(tolerant, drop(count, won, 100)) for count in (lost, lost + more))
    assert ORDER[smaller.word] <= ORDER[larger.word]


@given(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=9), st.floats(0, 0.5), st.floats(0.5, 2))
def test_a_larger_ratio_never_gets_a_better_verdict(logs: list[float], more: float, limit: float):
    tolerant = gate("max", limit, anomalous_passes=True)
    smaller, larger = (judge(tolerant, ratio(*(log + shift for log in logs))) for shift in (0.0, more))
    assert ORDER[smaller.word] <= ORDER[larger.word]


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 60), st.floats(-0.3, 0.3), st.integers(2, 9))
@example(lost=5, won=0, same=195, limit=0.0, times=2)
def test_more_questions_of_the_same_kind_never_make_a_clear_verdict_undecided(lost, won, same, limit, times):
    count = lost + won + same
    assume(count > 0)
    strict = gate("max", limit)
    before = judge(strict, drop(lost, won, count))
    after = judge(strict, drop(lost * times, won * times, count * times))
    if before.word != "undecided":
        # more evidence may show that it is better than the baseline, which is clearer still
        assert after.word == before.word or (before.word, after.word) == ("pass", "anomalous")


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 60), st.floats(-0.3, 0.3))
def test_what_is_said_to_be_needed_is_enough_and_more_than_there_is(lost, won, same, limit):
    figure = drop(lost, won, lost + won + same)
    strict = gate("max", limit, anomalous_passes=True)
    verdict = judge(strict, figure)
    if verdict.needed is not None:
        assert figure.sample is not None
        assert verdict.needed > figure.sample.count
        low, high = figure.sample.interval(0.95, verdict.needed / figure.sample.count)
        assert high <= limit or low > limit


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10), st.sampled_from(["max", "min"]))
def test_a_bare_number_is_never_undecided(value: float, limit: float, bound: Bound):
    word = judge(gate(bound, limit), perplexity(value)).word
    passes = value <= limit if bound == "max" else value >= limit
    assert word == ("anomalous" if not math.isfinite(value) else "pass" if passes else "regression")
