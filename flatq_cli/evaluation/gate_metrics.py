"""Which figures the gates of a file name, found by names alone: a misspelt gate shows before hours of measuring.

A gate names a figure (`perplexity_ratio.wikitext2`, `arc_easy.acc_drop`), a figure of the one text there is
(`perplexity_ratio`), or with `*` all figures of a pattern (`*.acc_drop`) but those that have a gate of their own.
A gate that names nothing, or whose limit points the wrong way, would let everything pass: it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flatq_cli.config.gate_files import Gate
from flatq_cli.config.validation import nearest
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.figures import DROP, Figure, Unit, metric_name

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

_OF_TEXTS = {"perplexity": False, "perplexity_ratio": False, "kl_divergence": False, "top1_agreement": True}
"""What is measured of a text, and whether more of it is better."""

_SHOWN = 12
"""Names that an error lists at most."""


@dataclass(frozen=True)
class Known:
    """A figure that an evaluation has or will have; see `Figure` for the attributes.

    Attributes:
        higher_is_better: None where that is not known yet.
    """

    subject: str
    kind: str
    unit: Unit
    higher_is_better: bool | None
    compares: bool

    @property
    def metric(self) -> str:
        return metric_name(self.subject, self.kind, self.unit)


def expected(texts: Iterable[str], tasks: Mapping[str, Mapping[str, bool | None]]) -> list[Known]:
    """The figures that an evaluation with a baseline will have.

    Args:
        texts: their names. tasks: by task, its metrics, and whether more of them is better.
    """
    known = [
        Known(text, kind, "windows", higher, kind != "perplexity")
        for text in texts
        for kind, higher in _OF_TEXTS.items()
    ]
    for task, metrics in tasks.items():
        for metric, higher in metrics.items():
            known.append(Known(task, metric, "questions", higher, False))
            known.append(Known(task, metric + DROP, "questions", False, True))
    return known


def task_metrics(tasks: Iterable[Task | Group]) -> tuple[dict[str, dict[str, bool | None]], set[str]]:
    """What tasks of the harness will measure, before they do.

    Returns:
        By task, its metrics under the names they have in results, and whether more is better; and the groups, whose
        metrics depend on what their tasks turn out to measure.
    """
    metrics: dict[str, dict[str, bool | None]] = {}
    groups: set[str] = set()
    for item in tasks:
        if hasattr(item, "get_all_tasks"):
            groups |= {group.name for group in (item, *item.get_all_groups())}
            metrics |= task_metrics(item.get_all_tasks())[0]
            continue
        higher = item.higher_is_better()
        chosen = [each.name for each in getattr(item, "_filters", [])] or ["none"]
        metrics[item.task_name] = {
            metric if name == "none" else f"{metric},{name}": higher.get(metric)
            for metric in item.aggregation()
            for name in chosen
        }
    return metrics, groups


def measured(figures: Iterable[Figure]) -> list[Known]:
    """The figures that an evaluation has."""
    return [
        Known(figure.subject, figure.kind, figure.unit, figure.higher_is_better, figure.compares) for figure in figures
    ]


def assign(
    gates: Sequence[Gate], known: Sequence[Known], *, baseline: bool, unknown: Collection[str] = ()
) -> list[Gate]:
    """Give every gate the full name of its figure; a `*` becomes one gate for each figure it stands for.

    Args:
        known: the figures there are, those that compare with a baseline included whether there is one or not.
        baseline: whether there is one.
        unknown: subjects of which it is not known yet what will be measured: their figures are taken as they are named.
    Raises:
        UsageError: a gate that names no figure, or one that needs the missing baseline; a relative limit of a figure
            that is relative already; a limit on the wrong side; two patterns that stand for the same figure. Every
            gate with such a fault is named.
    """
    named = {figure.metric: figure for figure in known}
    own = {gate.metric for gate in gates}
    found: dict[str, Gate] = {}
    faults: list[str] = []
    for gate in gates:
        try:
            for metric in _matching(gate, named, own, unknown):
                _check(gate, metric, named.get(metric), baseline)
                _add(replace(gate, metric=metric, name=_name(gate, metric)), found)
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("; ".join(faults))
    return list(found.values())


def check_baseline(gates: Iterable[Gate]) -> None:
    """Find a gate that needs a baseline, by its name alone, where there is none.

    Raises:
        UsageError: there are such gates; each is named.
    """
    faults = []
    for gate in gates:
        kind = gate.metric.partition(".")[0]
        if gate.relative or gate.metric.endswith(DROP) or (kind in _OF_TEXTS and kind != "perplexity"):
            faults.append(_no_baseline(gate, gate.metric))
    if faults:
        raise UsageError("; ".join(faults))


def _matching(gate: Gate, named: Mapping[str, Known], own: Collection[str], unknown: Collection[str]) -> list[str]:
    """The figures that a gate stands for: none only where each that fits its `*` has a gate of its own."""
    if "*" in gate.metric:
        pattern = re.compile(".*".join(map(re.escape, gate.metric.split("*"))))
        fitting = [metric for metric in named if pattern.fullmatch(metric)]
        if fitting or unknown:
            return [metric for metric in fitting if metric not in own]
    elif gate.metric in named or any(gate.metric.startswith(f"{subject}.") for subject in unknown):
        return [gate.metric]
    elif gate.metric in _OF_TEXTS:
        of_texts = [figure.metric for figure in named.values() if figure.kind == gate.metric]
        if len(of_texts) == 1:
            return of_texts
        if of_texts:
            raise UsageError(f"{gate.where}: '{gate.metric}' of which text? One of {', '.join(of_texts)}")
        raise UsageError(f"{gate.where}: '{gate.metric}' is measured of a text, and there is none: add --ppl FILE")
    listed = ", ".join(list(named)[:_SHOWN]) + (", …" if len(named) > _SHOWN else "")
    hint = nearest(gate.metric, list(named))
    raise UsageError(f"{gate.where}: nothing measured is called '{gate.metric}'{hint}; there is {listed or 'nothing'}")


def _check(gate: Gate, metric: str, figure: Known | None, baseline: bool) -> None:
    if (gate.relative or (figure is not None and figure.compares)) and not baseline:
        raise UsageError(_no_baseline(gate, metric))
    if figure is None:
        return
    if gate.relative and figure.compares:
        raise UsageError(f"{gate.where}: '{metric}' is relative to the baseline already: give it a max or min")
    if figure.higher_is_better is gate.is_ceiling:
        side, right = ("more", "min") if figure.higher_is_better else ("less", "max")
        right += "_relative" if gate.relative else ""
        raise UsageError(f"{gate.where}: {side} of '{metric}' is better, so its limit is a {right}, not a {gate.bound}")


def _no_baseline(gate: Gate, metric: str) -> str:
    return f"{gate.where}: '{metric}' is compared with a baseline, and there is none: add --baseline TARGET"


def _add(gate: Gate, found: dict[str, Gate]) -> None:
    if gate.name in found:
        raise UsageError(f"{gate.where}: the gate at {found[gate.name].where} is about '{gate.name}' too")
    found[gate.name] = gate


def _name(gate: Gate, metric: str) -> str:
    """A pattern's gates are told apart by their figures; any other gate keeps its name."""
    if "*" not in gate.metric:
        return gate.name
    return metric if gate.name == gate.metric else f"{gate.name}: {metric}"
