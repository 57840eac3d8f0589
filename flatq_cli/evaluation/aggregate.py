"""From the values of questions to the figures of tasks and groups, with the harness's own functions.

The harness does this itself at the end of an evaluation. A shard has to leave out the questions of the others, and
shards that are joined have no harness any more: both go through here, and get what the harness would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from flatq_cli.evaluation.evidence import GroupEvidence, TaskEvidence
from flatq_cli.evaluation.silence import quiet

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

BOOTSTRAP = 100
"""Resamples for the standard error of a metric that has no closed form (perplexity): right to 7 %, in no time."""

_NO_FILTER = "none"
Figures = dict[str, dict[str, float]]


def metric_name(metric: str, filter: str) -> str:
    """A metric as results call it: with its filter's name, where it has one (`exact_match,strict-match`)."""
    return metric if filter == _NO_FILTER else f"{metric},{filter}"


def plain_figures(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one of the harness's results, which mixes them with its names and with "N/A"."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "," in key}
    return {metric_name(*key.split(",", 1)): float(value) for key, value in numbers.items()}


def aggregate(
    tasks: Mapping[str, TaskEvidence], groups: Mapping[str, GroupEvidence], of_a_part: bool = False
) -> Figures:
    """The figures of tasks, and of groups of them.

    Args:
        tasks: all that `groups` name; every metric has the name of its aggregation (`own_aggregations`).
        of_a_part: leave out a figure that cannot be made: a part may hold too few questions for it.
    Returns:
        As `run_tasks`: for each task and group its metrics, `acc` and `acc_stderr`, or nothing where nothing was asked.
    """
    with quiet():
        found = {name: _task_figures(evidence, of_a_part) for name, evidence in tasks.items()}
    for name, group in groups.items():
        found[name] = dict(_harness_group(name, group).aggregate(found))
    return {name: plain_figures(values) for name, values in found.items()}


def aggregation_name(task: Task, metric: str) -> str | None:
    """The registered name of a task's aggregation of a metric; None if it is a function of the task's own."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = task.aggregation().get(metric)
    if function is None:
        return "mean"  # what the harness takes
    return next((name for name, known in AGGREGATION_REGISTRY.items() if known is function), None)


def own_aggregations(tasks: Sequence[Task]) -> list[str]:
    """The tasks that aggregate with a function of their own, which a file of evidence cannot name."""
    return [
        task.task_name for task in tasks if any(aggregation_name(task, name) is None for name in task.aggregation())
    ]


def group_evidence(group: Group) -> GroupEvidence:
    """What a group of the harness makes its figures of."""
    metrics = tuple(asdict(metric) for metric in group.aggregate_metric_list or ())
    return GroupEvidence(tuple(task.task_name for task in group.get_all_tasks()), metrics)


def _task_figures(evidence: TaskEvidence, of_a_part: bool) -> dict[str, Any]:
    """A task's figures in the harness's own shape, for its groups."""
    figures: dict[str, Any] = {"sample_len": evidence.n}
    for name, by_question in {**evidence.values, **evidence.others}.items():
        items = [by_question[number] for number in sorted(by_question)]
        try:
            value, stderr = _figure(items, evidence.aggregations.get(name))
        except Exception:  # whatever a metric's own code does with too little
            if not of_a_part:
                raise
            continue
        metric, _, filter = name.partition(",")
        figures[f"{metric},{filter or _NO_FILTER}"] = value
        figures[f"{metric}_stderr,{filter or _NO_FILTER}"] = stderr
    return figures


def _figure(items: Sequence[Any], aggregation: str | None) -> tuple[float, Any]:
    """A metric's figure and its standard error, "N/A" where the harness has none."""
    from lm_eval.api.metrics import stderr_for_metric

    function = _aggregation(aggregation)
    stderr = stderr_for_metric(metric=function, bootstrap_iters=BOOTSTRAP)
    return function(items), stderr(items) if stderr is not None and len(items) > 1 else "N/A"


def _aggregation(name: str | None) -> Callable[[Sequence[Any]], float]:
    from lm_eval.api.registry import get_aggregation

    function = get_aggregation(name or "mean")
    assert function is not None, name  # who asks has looked at `own_aggregations`
    return function  # type: ignore[no-any-return]


def _harness_group(name: str, group: GroupEvidence) -> Group:
    """A group of the harness whose tasks are names alone: its figures are made of theirs."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    class NamedGroup(Group):  # type: ignore[misc]
        def get_all_tasks(self, recursive: bool = True) -> list[Any]:
            return [SimpleNamespace(task_name=task) for task in group.tasks]

    return NamedGroup(name=name, aggregate_metric_list=[AggMetricConfig(**metric) for metric in group.metrics])
