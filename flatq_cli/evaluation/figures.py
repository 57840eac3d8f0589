"""Figures that can be judged: a value, and what is known about how far it can be trusted.

A figure is plain data. What it was measured from travels with it as a `Sample` (`evaluation/paired.py`), what it is
beside the baseline as a `Change`, and how a guesser would do as `Guessing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flatq_cli.evaluation.paired import Affine, Sample

Unit = Literal["windows", "questions"]

DROP = "_drop"
"""What the name of a score's difference to the baseline's ends in; it is positive where the target is worse."""


@dataclass(frozen=True)
class Change:
    """A figure beside the baseline's; smaller is better.

    Attributes:
        sample: how much worse than the baseline, from both models' answers to the same questions.
        same: its value where both are equally good: 1 of a ratio, 0 of a difference.
    """

    sample: Sample
    same: float


@dataclass(frozen=True)
class Guessing:
    """How a guesser does at the questions of a score.

    Attributes:
        score: the model's share of right answers. chance: the share that a guesser expects.
        tail: how likely a guesser does at least as well as the model; baseline_tail: as the baseline, if there is one.
    """

    score: float
    chance: float
    tail: float
    baseline_tail: float | None = None


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation.

    Attributes:
        subject: the text or the task. kind: what is measured of it: `perplexity_ratio`; `acc`, `acc_drop`.
        value: the figure; nan or inf where the model's output is broken.
        higher_is_better: of this figure: true of `acc`, false of `acc_drop`.
        unit: what it is an average over: "windows" of a text, "questions" of a task.
        sample: what it was measured from; None where its noise is not known, or it has none.
        exact: it has none: the perplexity of a text, which is the same text for all models.
        compares: it is a comparison with the baseline by itself, and so cannot be taken relative to it.
        baseline: the baseline's figure; None where there is no baseline, or the figure compares.
        change: how much worse it is than the baseline's; None without a baseline, or where that is not known.
        guessing: of scores of multiple-choice questions, and of their drops.
    """

    subject: str
    kind: str
    value: float
    higher_is_better: bool
    unit: Unit
    sample: Sample | None = None
    exact: bool = False
    compares: bool = False
    baseline: float | None = None
    change: Change | None = None
    guessing: Guessing | None = None

    @property
    def metric(self) -> str:
        """The name that gates know it by: `perplexity_ratio.TEXT`, `TASK.acc_drop`."""
        return metric_name(self.subject, self.kind, self.unit)


def metric_name(subject: str, kind: str, unit: Unit) -> str:
    """The name of a figure in gates."""
    return f"{kind}.{subject}" if unit == "windows" else f"{subject}.{kind}"


def relative(figure: Figure) -> tuple[float, Sample | None]:
    """A figure as a multiple of the baseline's, and what that was measured from.

    The baseline's own figure counts as exact: what both models share has cancelled in the change already.

    Returns:
        The multiple, and its sample, None where that is not known; nan of a baseline that is no positive number.
    Raises:
        ValueError: the figure has no baseline to be a multiple of.
    """
    if figure.baseline is None:
        raise ValueError(f"{figure.metric} has no baseline")
    if not (math.isfinite(figure.baseline) and figure.baseline > 0):
        return math.nan, None
    if figure.change is None:
        return figure.value / figure.baseline, None
    if figure.change.same == 1:
        return figure.change.sample.value, figure.change.sample
    sign = -1 if figure.higher_is_better else 1
    sample = Affine(figure.change.sample, 1.0, sign / figure.baseline)
    return sample.value, sample
