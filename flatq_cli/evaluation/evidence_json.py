"""Evidence as JSON and back, to the last bit: what a shard's result holds for those who join it.

JSON has no number for what is not finite; such a value is written as text, "nan" or "inf".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.evidence import Evidence, GroupEvidence, PairEvidence, TaskEvidence, WindowEvidence


def evidence_to_json(evidence: Evidence) -> dict[str, Any]:
    """`settings`, `texts`, `pairs`, `tasks` and `groups`, of values that JSON holds.

    Raises:
        UsageError: a task whose values of questions JSON cannot hold.
    """
    return {
        "settings": dict(evidence.settings),
        "texts": {name: _written(asdict(windows)) for name, windows in evidence.windows.items()},
        "pairs": {name: _written(asdict(pair)) for name, pair in evidence.pairs.items()},
        "tasks": {name: _task_to_json(name, task) for name, task in evidence.tasks.items()},
        "groups": {name: _written(asdict(group)) for name, group in evidence.groups.items()},
    }


def evidence_from_json(stored: Mapping[str, Any]) -> Evidence:
    """The evidence in the `shard` of a result.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what `evidence_to_json` writes.
    """
    return Evidence(
        windows={name: _windows(windows) for name, windows in stored["texts"].items()},
        pairs={
            name: PairEvidence(_numbers(pair["kl"]), _numbers(pair["agreement"]))
            for name, pair in stored["pairs"].items()
        },
        tasks={name: _task_from_json(task) for name, task in stored["tasks"].items()},
        groups={
            name: GroupEvidence(tuple(group["tasks"]), tuple(group["metrics"]))
            for name, group in stored["groups"].items()
        },
        settings=dict(stored["settings"]),
    )


def _task_to_json(name: str, task: TaskEvidence) -> dict[str, Any]:
    try:
        return dict(_written(asdict(task)))
    except TypeError as error:
        raise UsageError(f"--shard: '{name}' has values that cannot be written ({error}); ask it whole") from error


def _written(value: Any) -> Any:
    """A value as JSON holds it: keys as text, tuples as lists, numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): _written(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_written(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int | bool):
        return value
    raise TypeError(type(value).__name__)


def _windows(stored: Mapping[str, Any]) -> WindowEvidence:
    indices = tuple(int(index) for index in stored["indices"])
    return WindowEvidence(indices, _numbers(stored["losses"]), int(stored["tokens"]), int(stored["seqlen"]))


def _task_from_json(stored: Mapping[str, Any]) -> TaskEvidence:
    return TaskEvidence(
        **{
            **stored,
            "values": {name: _by_question(values, _number) for name, values in stored["values"].items()},
            "others": {name: _by_question(values, lambda value: value) for name, values in stored["others"].items()},
            "choices": _by_question(stored["choices"], int),
            "hashes": _by_question(stored["hashes"], str),
        }
    )


def _by_question(stored: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[int, Any]:
    return {int(number): read(value) for number, value in stored.items()}


def _numbers(stored: Any) -> tuple[float, ...]:
    return tuple(_number(value) for value in stored)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, str) else value
