"""How far a figure can be told from noise: intervals of figures that were measured on a sample, and tests of pairs.

Two models that answer the same questions share what makes a question hard, so the difference of their scores is known
far better than either score: what is looked at are the differences question by question (window by window), never two
separate intervals. Each class here is one kind of figure with what it was measured from. All have a `value`, a `count`
and an `interval`, so that whoever decides something need not know which kind it is.

`interval(confidence, times)` also says what the interval would be had there been `times` as much evidence of the same
kind: that is how "how many questions would it take?" is answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import optimize, stats

Interval = tuple[float, float]

RESAMPLES = 2000
"""Resamples of a bootstrap: an end of a 95 % interval is then right to about 4 % of its width."""

_EDGE = 1e-12
"""How near to a difference of ±1 the score statistic is asked; at ±1 itself it is 0/0."""


class Sample(Protocol):
    """A figure measured on a sample: its value, on how many units it rests, and how far it may be off."""

    @property
    def value(self) -> float: ...

    @property
    def count(self) -> int: ...

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        """The two-sided interval, each side with half of what `confidence` leaves.

        Args:
            confidence: in [0, 1); 0 gives the value alone.
            times: as if there were so many times the evidence, otherwise alike.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The mean of one number a unit (a window's KL divergence, the difference of two scores): Student's t.

    Attributes:
        values: at least one. Of one alone the spread is not known, and the interval is everything.
    """

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return float(np.mean(self.values))

    @property
    def count(self) -> int:
        return len(self.values)

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        value, count = self.value, self.count
        if confidence == 0:
            return value, value
        freedom = count * times - 1
        if count < 2 or freedom <= 0:
            return -math.inf, math.inf
        error = math.sqrt(float(np.var(self.values)) / freedom)
        half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
        return value - half, value + half


@dataclass(frozen=True)
class ExpMean:
    """exp of a mean: the ratio of two perplexities, from the differences of their windows' losses."""

    logs: Mean

    @property
    def value(self) -> float:
        return _exp(self.logs.value)

    @property
    def count(self) -> int:
        return self.logs.count

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        low, high = self.logs.interval(confidence, times)
        return _exp(low), _exp(high)


@dataclass(frozen=True)
class Affine:
    """`offset + scale · x` of another figure x."""

    sample: Sample
    offset: float
    scale: float

    @property
    def value(self) -> float:
        return self.offset + self.scale * self.sample.value

    @property
    def count(self) -> int:
        return self.sample.count

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        low, high = sorted(self.offset + self.scale * end for end in self.sample.interval(confidence, times))
        return low, high


@dataclass(frozen=True)
class Proportion:
    """The share of questions answered right: Wilson's score interval, good for few questions and near 0 and 1 too."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        squared = _z(confidence) ** 2 / (self.count * times)
        middle = (self.value + squared / 2) / (1 + squared)
        spread = self.value * (1 - self.value) * squared + squared * squared / 4
        half = math.sqrt(max(spread, 0.0)) / (1 + squared)
        return min(middle - half, self.value), max(middle + half, self.value)


@dataclass(frozen=True)
class Drop:
    """How many fewer questions the second of two models answers right, as a share: the paired difference of 0/1 scores.

    The interval is Tango's score interval, which knows that models that agreed on all of 20 questions may still differ
    on others. Where McNemar's exact test sees no difference it is widened to hold 0, so that the two never disagree.

    Attributes:
        lost: questions that only the first answers right. won: questions that only the second answers right.
        count: all questions.
    Source: Tango (Statistics in Medicine 17, 1998); McNemar (Psychometrika 12, 1947), in its exact, binomial form.
    """

    lost: int
    won: int
    count: int

    @property
    def value(self) -> float:
        return (self.lost - self.won) / self.count

    @property
    def p_value(self) -> float:
        """McNemar's exact test of no difference, two-sided."""
        return mcnemar(self.lost, self.won)

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        if confidence == 0:
            return self.value, self.value
        lost, won, count = self.lost * times, self.won * times, self.count * times
        low, high = _tango(lost, won, count, _z(confidence))
        if mcnemar(round(lost), round(won)) >= 1 - confidence:
            low, high = min(low, 0.0), max(high, 0.0)
        return min(low, self.value), max(high, self.value)


@dataclass(frozen=True)
class Normal:
    """A figure of which nothing is known but its standard error: the normal distribution.

    Attributes:
        value, error: the figure and its standard error, both finite. count: units it rests on.
    """

    value: float
    error: float
    count: int

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        half = _z(confidence) * self.error / math.sqrt(times)
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Resampled:
    """A figure without a formula for its noise, from resamples of its units: the percentile bootstrap.

    Attributes:
        value: the figure itself. count: units it rests on. resamples: the figure of each resample, sorted.
    """

    value: float
    count: int
    resamples: tuple[float, ...]

    def interval(self, confidence: float, times: float = 1.0) -> Interval:
        if confidence == 0:
            return self.value, self.value
        if self.count < 2 or not np.isfinite(self.resamples).all():
            return -math.inf, math.inf
        ends = np.quantile(self.resamples, [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = self.value + (ends - self.value) / math.sqrt(times)
        return min(float(low), self.value), max(float(high), self.value)


def resample(
    figure: Callable[[Sequence[int]], float], count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """Bootstrap a figure over its units.

    Args:
        figure: the figure of the units whose indices it is given; an index may come several times.
        count: units there are.
    """
    draw = np.random.default_rng(seed)
    values = [figure(draw.integers(count, size=count).tolist()) for _ in range(resamples)]
    return Resampled(figure(range(count)), count, tuple(sorted(values)))


def mcnemar(lost: int, won: int) -> float:
    """The two-sided p-value of McNemar's exact test: how likely so uneven a split of the discordant pairs is by luck.

    Args:
        lost, won: pairs that only the first, and only the second, of two models got right. Without any, 1.
    """
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def guessing_tail(right: int, choices: Mapping[int, int]) -> float:
    """How likely a guesser gets at least so many questions right.

    Args:
        right: questions answered right.
        choices: number of questions by their number of choices: `{4: 180, 5: 20}`.
    Returns:
        P(X ≥ right), X the sum over questions of a success with probability 1 / choices: exact, by convolution of
        one binomial distribution for each number of choices.
    """
    distribution = np.ones(1)
    for options, questions in choices.items():
        binomial = stats.binom.pmf(np.arange(questions + 1), questions, 1 / options)
        distribution = np.convolve(distribution, binomial)
    return min(1.0, float(distribution[right:].sum()))


def _z(confidence: float) -> float:
    return float(stats.norm.ppf((1 + confidence) / 2))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _tango(lost: float, won: float, count: float, z: float) -> Interval:
    """Differences that the score test does not reject: where its statistic is within ±z."""

    def statistic(difference: float) -> float:
        a = 2 * count
        b = (2 * count - lost + won) * difference - lost - won
        c = -won * difference * (1 - difference)
        share_won = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # most likely, given the difference
        variance = count * (2 * share_won + difference * (1 - difference))
        return (lost - won - count * difference) / math.sqrt(max(variance, _EDGE * _EDGE))

    value = (lost - won) / count
    bottom, top = -1 + _EDGE, 1 - _EDGE
    low = high = value
    if value > bottom:
        low = optimize.brentq(lambda x: statistic(x) - z, bottom, value) if statistic(bottom) > z else -1.0
    if value < top:
        high = optimize.brentq(lambda x: statistic(x) + z, value, top) if statistic(top) < -z else 1.0
    return float(low), float(high)
