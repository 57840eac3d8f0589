"""Intervals and tests against scipy, the literature, and simulated questions whose truth is known."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from flatq_cli.evaluation.paired import (
    Affine,
    Drop,
    ExpMean,
    Mean,
    Normal,
    Proportion,
    Sample,
    guessing_tail,
    mcnemar,
    resample,
)

CONFIDENCES = st.sampled_from([0.5, 0.8, 0.95, 0.99])
FEW = st.integers(0, 12)


@st.composite
def drops(draw: st.DrawFn) -> Drop:
    lost, won, same = draw(FEW), draw(FEW), draw(st.integers(0, 40))
    return Drop(lost, won, max(lost + won + same, 1))


@st.composite
def proportions(draw: st.DrawFn) -> Proportion:
    count = draw(st.integers(1, 60))
    return Proportion(draw(st.integers(0, count)), count)


VALUES = st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=2, max_size=12)
SAMPLES: st.SearchStrategy[Sample] = st.one_of(
    drops(), proportions(), VALUES.map(lambda values: Mean(tuple(values))), st.just(Normal(0.4, 0.1, 50))
)


def test_the_interval_of_a_mean_is_that_of_scipys_t_test():
    values = np.random.default_rng(0).normal(0.1, 1, 9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert Mean(tuple(values)).interval(0.9) == pytest.approx((expected.low, expected.high))


def test_a_paired_interval_of_losses_is_that_of_scipys_paired_test_made_a_ratio():
    rng = np.random.default_rng(1)
    theirs = rng.normal(3, 0.5, 8)
    ours = theirs + rng.normal(0.2, 0.02, 8)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    ratio = ExpMean(Mean(tuple(ours - theirs)))
    assert ratio.value == pytest.approx(math.exp(ours.mean()) / math.exp(theirs.mean()))
    assert ratio.interval(0.95) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


@given(proportions(), CONFIDENCES)
def test_the_interval_of_a_proportion_is_scipys_wilson_interval(share: Proportion, confidence: float):
    expected = stats.binomtest(share.right, share.count).proportion_ci(confidence, method="wilson")
    assert share.interval(confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(FEW, FEW)
def test_mcnemars_p_value_is_the_sum_over_splits_no_likelier_than_the_one_seen(lost: int, won: int):
    pairs = lost + won
    chances = [math.comb(pairs, k) / 2**pairs for k in range(pairs + 1)]
    expected = sum(chance for chance in chances if chance <= chances[lost] * (1 + 1e-9))
    assert mcnemar(lost, won) == pytest.approx(min(expected, 1.0))


@pytest.mark.parametrize(
    ("drop", "confidence", "published"),
    [
        # Crossover trial of two contact lens solutions, Tango 1998: 43 approve of both, 1 of the second alone.
        (Drop(0, 1, 44), 0.90, (-0.096, 0.037)),
        # Airway hyper-responsiveness, as in Fagerland, Lydersen and Laake 2014: 1 and 7 discordant of 21.
        (Drop(1, 7, 21), 0.95, (-0.517, -0.026)),
    ],
)
def test_the_interval_of_a_drop_is_tangos_as_published(drop, confidence, published):
    low, high = drop.interval(confidence)
    assert low == pytest.approx(published[0], abs=5e-4)
    # the second one's McNemar p-value is 0.07: the interval is widened to hold no difference
    assert high == pytest.approx(0.0 if drop.p_value > 1 - confidence and published[1] < 0 else published[1], abs=5e-4)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30))
def test_the_ends_of_a_drops_interval_are_where_the_score_test_just_rejects(lost: int, won: int, same: int):
    """The constrained maximum of the likelihood is found numerically here, not by Tango's formula."""
    count = lost + won + same

    def z_score(difference: float) -> float:
        def minus_log_likelihood(share_won: float) -> float:
            rest = 1 - 2 * share_won - difference
            return -(lost * math.log(share_won + difference) + won * math.log(share_won) + same * math.log(rest))

        edges = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
        share_won = optimize.minimize_scalar(
            minus_log_likelihood, bounds=edges, method="bounded", options={"xatol": 1e-12}
        ).x
        deviation = math.sqrt((2 * share_won + difference - difference**2) / count)
        return ((lost - won) / count - difference) / deviation

    low, high = Drop(lost, won, count).interval(0.95)
    if low not in (-1.0, 0.0):
        assert z_score(low) == pytest.approx(1.959964, rel=1e-3)
    if high not in (1.0, 0.0):
        assert z_score(high) == pytest.approx(-1.959964, rel=1e-3)


@given(drops(), st.sampled_from([0.5, 0.8, 0.95, 0.99]))
def test_a_drop_whose_interval_leaves_out_zero_is_one_that_mcnemars_exact_test_rejects(drop: Drop, confidence: float):
    low, high = drop.interval(confidence)
    if low > 0 or high < 0:
        assert drop.p_value < 1 - confidence


def test_models_that_agree_on_few_questions_may_still_differ_on_others():
    low, high = Drop(0, 0, 20).interval(0.95)
    assert high == -low == pytest.approx(3.8415 / (20 + 3.8415), rel=1e-3)


@pytest.mark.parametrize(("lost", "won"), [(0.06, 0.06), (0.1, 0.04), (0.01, 0.03)])
def test_95_percent_intervals_of_a_drop_hold_the_truth_95_times_in_100(lost: float, won: float):
    """Not simulated but summed over every outcome that 200 questions can have."""
    coverage = 0.0
    for first, second in product(range(45), range(30)):
        chance = stats.multinomial.pmf([first, second, 200 - first - second], 200, [lost, won, 1 - lost - won])
        if chance > 1e-6:
            low, high = Drop(first, second, 200).interval(0.95)
            coverage += chance * (low <= lost - won <= high)
    assert 0.93 <= coverage <= 0.99  # discordant pairs are few and whole, so it cannot be 0.95 everywhere


def test_an_interval_of_a_drop_lies_above_the_truth_and_below_it_about_once_in_40_each():
    """So a gate at the true drop is passed, or called a regression, that often. Models that disagree on 10 %."""
    rng = np.random.default_rng(3)
    seen = rng.multinomial(4000, [0.06, 0.04, 0.9], size=1000)
    intervals = [Drop(int(lost), int(won), 4000).interval(0.95) for lost, won, _ in seen]
    assert 0.012 <= sum(low > 0.02 for low, _ in intervals) / 1000 <= 0.04
    assert 0.012 <= sum(high < 0.02 for _, high in intervals) / 1000 <= 0.04


def test_95_percent_intervals_of_a_perplexity_ratio_hold_the_truth_95_times_in_100():
    rng, hits = np.random.default_rng(7), 0
    for _ in range(2000):
        low, high = ExpMean(Mean(tuple(rng.normal(0.1, 0.03, 8)))).interval(0.95)
        hits += low <= math.exp(0.1) <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_a_bootstrap_agrees_with_the_formula_where_there_is_one():
    values = np.random.default_rng(2).normal(1, 0.5, 300)
    sampled = resample(lambda chosen: float(values[list(chosen)].mean()), len(values))
    expected = Mean(tuple(values)).interval(0.95)
    width = expected[1] - expected[0]
    assert sampled.value == pytest.approx(values.mean())
    assert sampled.interval(0.95) == pytest.approx(expected, abs=0.06 * width)


@given(SAMPLES, CONFIDENCES, st.integers(2, 6))
def test_an_interval_holds_the_value_and_narrows_with_evidence_and_without_confidence(sample, confidence, times):
    low, high = sample.interval(confidence)
    assert low <= sample.value <= high
    assert sample.interval(0) == pytest.approx((sample.value, sample.value))
    narrower = sample.interval(confidence, times)
    assert low - 1e-9 <= narrower[0] <= narrower[1] <= high + 1e-9
    wider = sample.interval((1 + confidence) / 2)
    assert wider[0] <= low + 1e-9
    assert high - 1e-9 <= wider[1]


@given(drops(), st.integers(2, 5))
def test_times_as_much_evidence_is_the_evidence_so_many_times_over(drop: Drop, times: int):
    over = Drop(drop.lost * times, drop.won * times, drop.count * times)
    assert drop.interval(0.95, times) == pytest.approx(over.interval(0.95))
    values = Mean((0.1, 0.4, 0.2))
    assert values.interval(0.95, times) == pytest.approx(Mean(values.values * times).interval(0.95))


def test_one_value_has_no_spread_however_often_it_is_repeated():
    assert Mean((0.5,)).interval(0.95) == (-math.inf, math.inf)
    assert Mean((0.5,)).interval(0.95, 1000) == (-math.inf, math.inf)


def test_a_scaled_figure_has_the_scaled_interval_the_right_way_round():
    low, high = Proportion(30, 40).interval(0.95)
    assert Affine(Proportion(30, 40), 1.0, -2.0).interval(0.95) == pytest.approx((1 - 2 * high, 1 - 2 * low))


def test_a_guessers_chance_is_counted_over_every_outcome():
    """Two questions of two choices and three of four: all 2^5 outcomes, one by one."""
    chances = [0.5, 0.5, 0.25, 0.25, 0.25]
    for right in range(7):
        expected = sum(
            math.prod(p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True))
            for outcome in product([0, 1], repeat=5)
            if sum(outcome) >= right
        )
        assert guessing_tail(right, {2: 2, 4: 3}) == pytest.approx(expected)


def test_a_guessers_chance_with_equal_choices_is_the_binomial_tail():
    assert guessing_tail(70, {4: 200}) == pytest.approx(stats.binom.sf(69, 200, 0.25))
