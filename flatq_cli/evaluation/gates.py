"""What becomes of a figure and a limit: a pure decision, in one of four words.

    pass        on the right side of the limit, beyond noise
    regression  on the wrong side of it, beyond noise
    undecided   the sample is too small to tell the figure from the limit
    anomalous   not to be trusted: no number, no better than guessing, or better than the baseline beyond noise

Noise is the figure's interval at the gate's confidence. A figure without a sample, and every figure at confidence 0, is
judged as the number it is. Nothing here measures, prints or exits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flatq_cli.config.gate_files import Gate
from flatq_cli.evaluation.figures import Figure, relative
from flatq_cli.evaluation.paired import Interval, Sample
from flatq_cli.evaluation.tables import gates_title

Word = Literal["pass", "regression", "undecided", "anomalous"]

_MOST_NEEDED = 2**20
"""How many times the sample is looked at for `needed`; who lies nearer to the limit is on it."""


@dataclass(frozen=True)
class Verdict:
    """How a gate ended.

    Attributes:
        word: the verdict. reason: one clause that says why, with the figures.
        needed: of an undecided gate: how many units would decide it if they were like those there are; None if that
            cannot be said.
        value: the figure as it was judged; of a relative limit the multiple of the baseline's.
        interval: its interval; equal ends for a bare number.
    """

    word: Word
    reason: str
    needed: int | None
    value: float
    interval: Interval


@dataclass(frozen=True)
class Judgement:
    """A gate with its verdict, and whether that lets the model through."""

    gate: Gate
    verdict: Verdict
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """An entry of `gates` in schema `flatq.eval/1`; what is not a finite number is None."""
        low, high = self.verdict.interval
        return {
            "name": self.gate.name,
            "metric": self.gate.metric,
            "bound": self.gate.bound,
            "limit": self.gate.limit,
            "value": _finite(self.verdict.value),
            "low": _finite(low),
            "high": _finite(high),
            "confidence": self.gate.confidence,
            "verdict": self.verdict.word,
            "passed": self.passed,
            "reason": self.verdict.reason,
            "needed": self.verdict.needed,
        }


def decide(gate: Gate, figure: Figure) -> Judgement:
    """Judge a figure, and say whether the gate lets its verdict through. Raises as `judge`."""
    verdict = judge(gate, figure)
    passed = verdict.word == "pass" or (verdict.word == "undecided" and gate.undecided_passes)
    return Judgement(gate, verdict, passed)


def judge(gate: Gate, figure: Figure) -> Verdict:
    """Judge a figure by a gate.

    An anomaly goes before the limit: a figure that cannot be trusted keeps no promise. With `anomalous_passes` the
    limit decides and the reason names the anomaly; but what is no number never passes.

    Raises:
        ValueError: the limit is relative, and the figure has no baseline.
    """
    value, sample = relative(figure) if gate.relative else (figure.value, figure.sample)
    if not math.isfinite(value):
        return Verdict("anomalous", _no_number(gate, figure, value), None, value, (value, value))
    limited = _by_limit(gate, value, sample, figure)
    anomaly = _anomaly(gate, figure)
    if anomaly is None:
        return limited
    if gate.anomalous_passes:
        return replace(limited, reason=f"{limited.reason}; {anomaly}, which the gate allows")
    return replace(limited, word="anomalous", reason=f"{anomaly}; {limited.reason}", needed=None)


def failures(gates: Sequence[Mapping[str, Any]]) -> str:
    """All gates that failed, in one line; empty where none did.

    Args:
        gates: those of a result, as `Judgement.to_json` gives them.
    """
    failed = [gate for gate in gates if not gate["passed"]]
    listed = "; ".join(f"{gate['name']}: {gate['verdict']}: {gate['reason']}" for gate in failed)
    return f"{gates_title(gates)}: {listed}" if failed else ""


def _by_limit(gate: Gate, value: float, sample: Sample | None, figure: Figure) -> Verdict:
    """The verdict of the limit alone, on a finite value."""
    interval = (value, value) if sample is None or gate.confidence == 0 else sample.interval(gate.confidence)
    shown, limit = _with_interval(value, interval, gate.confidence), f"the limit {show(gate.limit)}"
    exact = gate.confidence == 0 or (figure.exact and not gate.relative)
    if sample is None and not exact:
        reason = f"the noise of {shown} is not known; `confidence: 0` judges the bare number"
        return Verdict("undecided", reason, None, value, (-math.inf, math.inf))
    word = _side(gate, interval)
    if word == "pass":
        return Verdict(word, f"{shown} keeps {limit}", None, value, interval)
    if word == "regression":
        beyond = "above" if gate.is_ceiling else "below"
        return Verdict(word, f"{shown} is {beyond} {limit} by {show(abs(value - gate.limit))}", None, value, interval)
    assert sample is not None  # a bare number is always on one side
    needed = _needed(gate, sample)
    reason = f"{shown} cannot be told from {limit} by {_counted(sample.count, figure.unit)}"
    return Verdict(word, f"{reason}{_remedy(sample, needed)}", needed, value, interval)


def _remedy(sample: Sample, needed: int | None) -> str:
    if needed is not None:
        return f"; about {needed:,} would do"
    return ": one has no spread to judge by" if sample.count < 2 else ": it lies on the limit"


def _side(gate: Gate, interval: Interval) -> Word:
    low, high = interval
    if (high <= gate.limit) if gate.is_ceiling else (low >= gate.limit):
        return "pass"
    if (low > gate.limit) if gate.is_ceiling else (high < gate.limit):
        return "regression"
    return "undecided"


def _needed(gate: Gate, sample: Sample) -> int | None:
    """How many units would have decided, were there more like those there are; in two digits, rounded up."""

    def decides(count: int) -> bool:
        return _side(gate, sample.interval(gate.confidence, count / sample.count)) != "undecided"

    low, high = sample.count, 2 * sample.count  # low does not decide
    while not decides(high):
        low, high = high, 2 * high
        if high > _MOST_NEEDED * sample.count:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    unit = int(10 ** max(len(str(high)) - 2, 0))
    return math.ceil(high / unit) * unit


def _anomaly(gate: Gate, figure: Figure) -> str | None:
    """Why a finite figure cannot be trusted, or None; the bare number of confidence 0 is not asked."""
    if gate.confidence == 0:
        return None
    guessing = figure.guessing
    by_luck = (1 - gate.confidence) / 2
    if guessing is not None and guessing.tail > by_luck:
        reason = f"a score of {show(guessing.score)} is within noise of guessing ({show(guessing.chance)})"
        if guessing.baseline_tail is not None and guessing.baseline_tail > by_luck:
            return f"{reason}, and so is the baseline's: these questions say nothing about either"
        return reason
    change = figure.change
    if change is None or not math.isfinite(change.sample.value) or _asks_for_better(gate, figure):
        return None
    interval = change.sample.interval(gate.confidence)
    if interval[1] >= change.same:
        return None
    what = "perplexity ratio" if change.same == 1 else "drop"
    shown = _with_interval(change.sample.value, interval, gate.confidence)
    return f"better than the baseline beyond noise ({what} {shown})"


def _asks_for_better(gate: Gate, figure: Figure) -> bool:
    """Whether only what is better than the baseline passes, so that being better is no surprise."""
    if gate.relative:
        return gate.limit < 1 if gate.is_ceiling else gate.limit > 1
    return figure.compares and figure.change is not None and gate.is_ceiling and gate.limit < figure.change.same


def _no_number(gate: Gate, figure: Figure, value: float) -> str:
    if math.isfinite(figure.value):  # a relative limit, and a baseline that is nothing to be a multiple of
        return f"the baseline's figure is {figure.baseline}: there is no multiple of it"
    broken = "the output of the model or of its baseline" if figure.compares else "the model's output"
    return f"the figure is {value}: {broken} is broken"


def _with_interval(value: float, interval: Interval, confidence: float) -> str:
    low, high = interval
    if low == high:
        return show(value)
    return f"{show(value)} ({show(low)} to {show(high)} at {confidence:.4g} confidence)"


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit if count != 1 else unit.removesuffix('s')}"


def show(value: float) -> str:
    """A figure with four digits that count."""
    return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:,.0f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
