"""From evidence to figures: what one model measures, and what it measures beside a baseline, pair by pair.

`figures` makes every figure that a gate can name; `comparison` is the part of them that a result shows of its baseline:

    perplexity.TEXT        the perplexity               TASK.METRIC        a score as the harness gives it
    perplexity_ratio.TEXT  target's / baseline's        TASK.METRIC_drop   how much worse than the baseline's
    kl_divergence.TEXT     KL(baseline ‖ target), nats
    top1_agreement.TEXT    share of positions where both find the same token the likeliest
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

from flatq_cli.evaluation.evidence import GroupEvidence, PairEvidence, TaskEvidence, WindowEvidence
from flatq_cli.evaluation.figures import DROP, Change, Figure, Guessing
from flatq_cli.evaluation.paired import (
    Drop,
    ExpMean,
    Mean,
    Normal,
    Proportion,
    Sample,
    guessing_tail,
    resample,
)

CONFIDENCE = 0.95
"""Of the intervals that a result shows. Gates have their own."""

_SCORED_BY_LUCK = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
"""Metrics of multiple-choice tasks in which a guesser gets 1 / choices."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model.

    Attributes:
        perplexity: of each text. windows: what it is made of; a text may lack it.
        scores: by task or group, and metric. answers: what they are made of; of a group see `pooled`.
    """

    perplexity: Mapping[str, float] = field(default_factory=dict)
    windows: Mapping[str, WindowEvidence] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    answers: Mapping[str, TaskEvidence] = field(default_factory=dict)


def figures(
    target: Measured, baseline: Measured | None = None, pairs: Mapping[str, PairEvidence] | None = None
) -> dict[str, Figure]:
    """All figures of a target by the names that gates know, those against a baseline among them.

    Args:
        target, baseline: measured on the same texts and questions.
        pairs: by text, both models' predictions beside each other; of a text that they cut into other tokens there are
            none, and how far its ratio can be trusted is not known.
    """
    made = [
        *(figure for text in target.perplexity for figure in _text_figures(text, target, baseline, pairs or {})),
        *(figure for task in target.scores for figure in _task_figures(task, target, baseline)),
    ]
    return {figure.metric: figure for figure in made}


def pooled(group: GroupEvidence, answers: Mapping[str, TaskEvidence]) -> TaskEvidence:
    """The questions of a group's tasks as if they were those of one task, numbered through.

    That is right of metrics in which the group counts every question once (`weight_by_size`). Those of other metrics
    are among the `others`: what is known of their noise is the harness's standard error.

    Args:
        answers: by task; those of all tasks of the group.
    """
    parts = [answers[task] for task in group.tasks]
    spans = [1 + max(chain(part.choices, *part.values.values(), *part.others.values()), default=-1) for part in parts]
    starts = list(accumulate(spans, initial=0))
    by_size = {config["metric"] for config in group.metrics if config.get("weight_by_size", True)}

    def through(mappings: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
        pairs = zip(starts, mappings, strict=False)
        return {start + question: value for start, mapping in pairs for question, value in mapping.items()}

    everything = {metric: through([part.values.get(metric, {}) for part in parts]) for metric in parts[0].values}
    shared = {
        metric
        for metric in everything
        if metric.partition(",")[0] in by_size and all(metric in part.values for part in parts)
    }
    return replace(
        parts[0],
        values={metric: everything[metric] for metric in shared},
        others={metric: values for metric, values in everything.items() if metric not in shared},
        choices=through([part.choices for part in parts]),
        hashes={},
        questions=sum(part.questions for part in parts),
    )


def comparison(made: Mapping[str, Figure]) -> dict[str, Any]:
    """What a result says of its baseline: every difference, its interval, and whether it is beyond noise.

    Args:
        made: from `figures`, with a baseline.
    Returns:
        `{"confidence", "perplexity": {TEXT: {KIND: DIFFERENCE}}, "tasks": {TASK: {METRIC: DIFFERENCE}}}`, KIND one of
        `perplexity_ratio`, `kl_divergence`, `top1_agreement`. A DIFFERENCE is `{"value", "low", "high", "count",
        "change"}`: `change` is "worse", "better" or "within noise", None of what has no such sides or noise that is not
        known. A difference of right answers has McNemar's `p_value` too.
    """
    texts: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for figure in made.values():
        if figure.compares:
            of_unit, kind = (texts, figure.kind) if figure.unit == "windows" else (tasks, figure.kind[: -len(DROP)])
            of_unit.setdefault(figure.subject, {})[kind] = _difference(figure)
    return {"confidence": CONFIDENCE, "perplexity": texts, "tasks": tasks}


def _difference(figure: Figure) -> dict[str, Any]:
    sample = figure.sample
    low, high = (math.nan, math.nan)
    if sample is not None and math.isfinite(figure.value):
        low, high = sample.interval(CONFIDENCE)
    change = None
    if figure.change is not None and math.isfinite(figure.value):
        same = figure.change.same
        change = "worse" if low > same else "better" if high < same else "within noise"
    return {
        "value": _finite(figure.value),
        "low": _finite(low),
        "high": _finite(high),
        "change": change,
        "count": None if sample is None else sample.count,
        **({"p_value": sample.p_value} if isinstance(sample, Drop) else {}),
    }


def _text_figures(
    text: str, target: Measured, baseline: Measured | None, pairs: Mapping[str, PairEvidence]
) -> Iterator[Figure]:
    level = Figure(text, "perplexity", target.perplexity[text], False, "windows", exact=True)
    if baseline is None or text not in baseline.perplexity:
        yield level
        return
    reference = baseline.perplexity[text]
    ratio = target.perplexity[text] / reference if math.isfinite(reference) else math.nan
    sample = _ratio(target.windows[text], baseline.windows[text]) if text in pairs else None
    change = None if sample is None else Change(sample, same=1.0)
    yield replace(level, baseline=reference, change=change)
    yield Figure(text, "perplexity_ratio", ratio, False, "windows", sample, compares=True, change=change)
    if text in pairs:
        divergence, agreement = Mean(pairs[text].kl), Mean(pairs[text].agreement)
        yield Figure(text, "kl_divergence", divergence.value, False, "windows", divergence, compares=True)
        yield Figure(text, "top1_agreement", agreement.value, True, "windows", agreement, compares=True)


def _ratio(ours: WindowEvidence, theirs: WindowEvidence) -> ExpMean:
    """The ratio of two perplexities of the same windows, from what each window's losses differ by."""
    return ExpMean(Mean(tuple(our - their for our, their in zip(ours.losses, theirs.losses, strict=True))))


def _task_figures(task: str, target: Measured, baseline: Measured | None) -> Iterator[Figure]:
    ours, scores = target.answers.get(task), target.scores[task]
    theirs = None if baseline is None else baseline.answers.get(task)
    for metric, value in scores.items():
        if "_stderr" in metric:
            continue
        higher = _higher_is_better(ours, metric)
        sample = _level(ours, metric) or _normal(value, [scores], metric, ours)
        guessing = _guessing(ours, theirs, metric)
        level = Figure(task, metric, value, higher, "questions", sample, guessing=guessing)
        other = {} if baseline is None else baseline.scores.get(task, {})
        if metric not in other:
            yield level
            continue
        drop = other[metric] - value if higher else value - other[metric]
        sample = _drop(ours, theirs, metric, higher) or _normal(drop, [scores, other], metric, ours)
        change = None if sample is None else Change(sample, same=0.0)
        yield replace(level, baseline=other[metric], change=change)
        yield Figure(
            task, metric + DROP, drop, False, "questions", sample, compares=True, change=change, guessing=guessing
        )


def _level(answers: TaskEvidence | None, metric: str) -> Sample | None:
    """What a score was measured from, question by question; None where that is not known."""
    values = _values(answers, metric)
    if not values:
        return None
    if _aggregation(answers, metric) == "mean":
        return Proportion(int(sum(values)), len(values)) if _right_or_wrong(values) else Mean(values)
    if _aggregation(answers, metric) == "perplexity":
        return ExpMean(Mean(tuple(-value for value in values)))
    return None


def _normal(
    value: float, scores: Sequence[Mapping[str, float]], metric: str, answers: TaskEvidence | None
) -> Sample | None:
    """A figure by the harness's standard errors alone. Those of a difference add up as if the models were asked
    different questions, which makes the interval wider than it need be; None where one of them is missing.
    """
    name, comma, chosen = metric.partition(",")
    errors = [given.get(f"{name}_stderr{comma}{chosen}", math.nan) for given in scores]
    if answers is None or not all(map(math.isfinite, (value, *errors))):
        return None
    return Normal(value, math.hypot(*errors), answers.n)


def _drop(ours: TaskEvidence | None, theirs: TaskEvidence | None, metric: str, higher: bool) -> Sample | None:
    """How much worse a score is than the baseline's, question by question."""
    if ours is None or theirs is None or metric not in ours.values or metric not in theirs.values:
        return None
    asked = [question for question in ours.values[metric] if question in theirs.values[metric]]
    pairs = [(ours.values[metric][question], theirs.values[metric][question]) for question in asked]
    if not pairs or not all(map(math.isfinite, (value for pair in pairs for value in pair))):
        return None
    sign = 1.0 if higher else -1.0
    if _aggregation(ours, metric) == "mean":
        if higher and _right_or_wrong([value for pair in pairs for value in pair]):
            split = Counter(pairs)
            return Drop(lost=split[(0.0, 1.0)], won=split[(1.0, 0.0)], count=len(pairs))
        return Mean(tuple(sign * (their - our) for our, their in pairs))
    if _aggregation(ours, metric) == "perplexity":

        def drop(chosen: Sequence[int]) -> float:
            means = [-sum(pairs[index][side] for index in chosen) / len(chosen) for side in (0, 1)]
            our, their = map(_exp, means)
            return sign * (their - our)

        return resample(drop, len(pairs))
    return None


def _guessing(ours: TaskEvidence | None, theirs: TaskEvidence | None, metric: str) -> Guessing | None:
    """How a guesser does, where the metric is a share of right answers and every question's choices are known."""
    values = _values(ours, metric)
    if ours is None or metric.partition(",")[0] not in _SCORED_BY_LUCK or not values or not _right_or_wrong(values):
        return None
    choices = [ours.choices.get(question, 0) for question in ours.values[metric]]
    if min(choices) < 2:
        return None
    counted = Counter(choices)
    other = _values(theirs, metric)
    return Guessing(
        score=sum(values) / len(values),
        chance=sum(questions / options for options, questions in counted.items()) / len(values),
        tail=guessing_tail(int(sum(values)), counted),
        baseline_tail=guessing_tail(int(sum(other)), counted) if len(other) == len(values) else None,
    )


def _values(answers: TaskEvidence | None, metric: str) -> tuple[float, ...]:
    """The values of a metric, or none where one of them is no number."""
    values = () if answers is None else tuple(answers.values.get(metric, {}).values())
    return values if all(map(math.isfinite, values)) else ()


def _aggregation(answers: TaskEvidence | None, metric: str) -> str | None:
    named = {} if answers is None else answers.aggregations
    return named.get(metric, named.get(metric.partition(",")[0]))


def _higher_is_better(answers: TaskEvidence | None, metric: str) -> bool:
    """As the task says; of a metric that does not say, yes: nearly all of lm-eval's are scores."""
    named = {} if answers is None else answers.higher_is_better
    higher = named.get(metric, named.get(metric.partition(",")[0]))
    return True if higher is None else higher


def _right_or_wrong(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
