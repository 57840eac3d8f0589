"""The judging end of an evaluation: a result gets its `comparison` with the baseline and the verdicts of its gates.

What gates name is checked before anything is measured, as far as names can tell; what becomes of them is decided
afterwards, from the evidence in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flatq_cli.config.gate_files import Gate
from flatq_cli.evaluation.comparison import Measured, comparison, figures, pooled
from flatq_cli.evaluation.gate_metrics import assign, expected, measured, task_metrics
from flatq_cli.evaluation.gates import decide
from flatq_cli.evaluation.result import EvalResult

if TYPE_CHECKING:
    from flatq_cli.evaluation.harness import TaskSet


def check_gates(gates: Sequence[Gate], texts: Iterable[str], tasks: TaskSet | None, *, baseline: bool) -> None:
    """Find a gate that cannot be judged before anything is measured.

    Args:
        texts: the names of the texts. tasks: loaded. baseline: whether there is one.
    Raises:
        UsageError: as `assign`.
    """
    metrics, groups = ({}, set()) if tasks is None else task_metrics(tasks.tasks)
    assign(gates, expected(texts, metrics), baseline=baseline, unknown=groups)


def judge_result(result: EvalResult, gates: Sequence[Gate]) -> EvalResult:
    """A result with its gates' verdicts, and, where it has a baseline, with what differs from it.

    Raises:
        UsageError: a gate names what was not measured.
    """
    baseline = result.baseline
    made = figures(_measured(result), None if baseline is None else _measured(baseline), result.evidence.pairs)
    assigned = assign(gates, measured(made.values()), baseline=baseline is not None)
    return replace(
        result,
        gates=tuple(decide(gate, made[gate.metric]).to_json() for gate in assigned),
        comparison=None if baseline is None else comparison(made),
    )


def _measured(result: EvalResult) -> Measured:
    evidence = result.evidence
    groups = {name: pooled(group, evidence.tasks) for name, group in evidence.groups.items()}
    return Measured(
        perplexity={text: found.value for text, found in result.perplexity.items()},
        windows=evidence.windows,
        scores=result.tasks,
        answers={**evidence.tasks, **groups},
    )
