"""The shards of an evaluation, joined to the result that one machine would have got: the very same figures.

A shard's file holds the evidence of its windows and questions. Joined and put in order, it goes through the functions
that make figures of it in any evaluation (`evaluation/aggregate.py`, `evaluation/perplexity.py`). What does not belong
together, or is not all there, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.aggregate import aggregate
from flatq_cli.evaluation.evidence import Evidence, PairEvidence, TaskEvidence, WindowEvidence
from flatq_cli.evaluation.evidence_json import evidence_from_json
from flatq_cli.evaluation.perplexity import perplexity
from flatq_cli.evaluation.result import EvalResult, read_result
from flatq_cli.store.memory import Peak


@dataclass(frozen=True)
class _Part:
    """One model's side of a shard: its file, the result in it, and the evidence."""

    file: Path
    result: Mapping[str, Any]
    evidence: Evidence


def merge(files: Sequence[Path]) -> EvalResult:
    """Join the results of all shards of an evaluation.

    Args:
        files: what `flatq eval --shard I/N --json FILE` wrote, in any order.
    Returns:
        The result of the whole, its figures equal to the last bit; `seconds` is the sum, `peak` the largest.
    Raises:
        UsageError: a file that is no shard; a shard that is missing or there twice; shards of different models,
            settings or versions.
    """
    results = sorted(((file, _read(file)) for file in files), key=lambda pair: int(pair[1]["shard"]["part"]))
    _check_parts(results)
    baselines = [(file, result["baseline"]) for file, result in results if "baseline" in result]
    if baselines and len(baselines) < len(results):
        without = next(file for file, result in results if "baseline" not in result)
        raise UsageError(f"{without}: has no baseline, and {baselines[0][0]} has one")
    joined = _join([_part(file, result) for file, result in results])
    return replace(joined, baseline=_join([_part(*side) for side in baselines]) if baselines else None)


def _read(file: Path) -> Mapping[str, Any]:
    result = read_result(file)
    shard = result.get("shard")
    if not isinstance(shard, dict) or not all(isinstance(shard.get(key), int) for key in ("part", "of")):
        raise UsageError(f"{file}: not a shard; `flatq eval TARGET … --shard 1/4 --json {file.name}` writes one")
    return result


def _check_parts(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """All parts of one division are there, each once."""
    first, of = results[0][0], results[0][1]["shard"]["of"]
    seen: dict[int, Path] = {}
    for file, result in results:
        part, parts = result["shard"]["part"], result["shard"]["of"]
        if parts != of:
            raise UsageError(f"{file}: is one of {parts} shards, and {first} one of {of}")
        if part in seen:
            raise UsageError(f"{file}: is shard {part}/{of}, and {seen[part]} is that too")
        seen[part] = file
    if missing := [part for part in range(1, of + 1) if part not in seen]:
        raise UsageError(f"shard {', '.join(f'{part}/{of}' for part in missing)} is missing; give all {of}")


def _part(file: Path, result: Mapping[str, Any]) -> _Part:
    try:
        return _Part(file, result, evidence_from_json(result["shard"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: the evidence in it is damaged ({type(error).__name__}: {error})") from error


def _join(parts: Sequence[_Part]) -> EvalResult:
    """The result of one model from all of its parts, in their order."""
    first = parts[0]
    for part in parts[1:]:
        _check_same(part, first)
    settings = first.evidence.settings
    evidence = Evidence(
        windows={name: _windows([part.evidence.windows[name] for part in parts]) for name in first.evidence.windows},
        pairs={name: _pair([part.evidence for part in parts], name) for name in first.evidence.pairs},
        tasks={name: _task([part.evidence.tasks[name] for part in parts]) for name in first.evidence.tasks},
        groups=first.evidence.groups,
        settings=settings,
    )
    _check_whole(evidence, parts)
    shared = first.result
    return EvalResult(
        target=shared["target"],
        kind=shared["kind"],
        recipe=shared["recipe"],
        perplexity={name: perplexity(found.losses, found.seqlen) for name, found in evidence.windows.items()},
        tasks=aggregate(evidence.tasks, evidence.groups),
        versions=shared["versions"],
        seconds=round(sum(part.result["seconds"] for part in parts), 3),
        data=shared.get("data", {}),
        peak=_largest_peak(parts),
        evidence=evidence,
        name=shared["shard"]["name"],
    )


def _check_same(part: _Part, first: _Part) -> None:
    """Two parts are of one evaluation: of one model, with the same settings and versions."""
    compared = [(key, part.result.get(key), first.result.get(key)) for key in ("kind", "recipe")]
    for group in ("versions", "data"):
        mine, other = part.result.get(group, {}), first.result.get(group, {})
        compared += [(key, _identity(mine.get(key)), _identity(other.get(key))) for key in {**mine, **other}]
    mine, other = part.evidence.settings, first.evidence.settings
    compared += [(key, mine.get(key), other.get(key)) for key in {**mine, **other} if key != "model"]
    for key, found, wanted in compared:
        if found != wanted:
            raise UsageError(f"{part.file}: {key} is {found}, and in {first.file} it is {wanted}")
    if mine.get("model") != other.get("model"):
        raise UsageError(
            f"{part.file}: {part.result.get('target')} is not the model of {first.file}, {first.result.get('target')}: "
            "weights, tokenizer, device, dtype or flatq's own code differ"
        )
    for name in ("windows", "pairs", "tasks", "groups"):
        if getattr(part.evidence, name).keys() != getattr(first.evidence, name).keys():
            raise UsageError(f"{part.file}: has other {name} than {first.file}")


def _identity(value: Any) -> Any:
    """What tells a file of questions from another, wherever it lies."""
    return value.get("sha256") if isinstance(value, Mapping) else value


def _windows(parts: Sequence[WindowEvidence]) -> WindowEvidence:
    order = _order(parts)
    return WindowEvidence(
        indices=_in_order([part.indices for part in parts], order),
        losses=_in_order([part.losses for part in parts], order),
        tokens=sum(part.tokens for part in parts),
        seqlen=parts[0].seqlen,
    )


def _pair(parts: Sequence[Evidence], name: str) -> PairEvidence:
    order = _order([part.windows[name] for part in parts])
    return PairEvidence(
        kl=_in_order([part.pairs[name].kl for part in parts], order),
        agreement=_in_order([part.pairs[name].agreement for part in parts], order),
    )


def _order(parts: Sequence[WindowEvidence]) -> list[int]:
    """Where the windows of a text are, in their order, in what its parts have one after the other."""
    indices = [index for part in parts for index in part.indices]
    return sorted(range(len(indices)), key=indices.__getitem__)


def _in_order(parts: Sequence[tuple[Any, ...]], order: Sequence[int]) -> tuple[Any, ...]:
    values = [value for part in parts for value in part]
    return tuple(values[place] for place in order)


def _task(parts: Sequence[TaskEvidence]) -> TaskEvidence:
    """A task's questions in their order; what is said of the task is said by every part that asked any."""
    merged: dict[str, Any] = {}
    for name in ("choices", "hashes"):
        found = {number: value for part in parts for number, value in getattr(part, name).items()}
        merged[name] = dict(sorted(found.items()))
    for name in ("values", "others"):
        metrics = dict.fromkeys(metric for part in parts for metric in getattr(part, name))
        by_metric = {
            metric: {number: value for part in parts for number, value in getattr(part, name).get(metric, {}).items()}
            for metric in metrics
        }
        merged[name] = {metric: dict(sorted(found.items())) for metric, found in by_metric.items()}
    for name in ("higher_is_better", "aggregations"):
        merged[name] = {metric: value for part in parts for metric, value in getattr(part, name).items()}
    asked = next((part for part in parts if part.hashes), parts[0])
    rest = {field.name: getattr(asked, field.name) for field in fields(TaskEvidence) if field.name not in merged}
    return TaskEvidence(**merged, **rest)


def _check_whole(evidence: Evidence, parts: Sequence[_Part]) -> None:
    """Every window and every question is there once."""
    names = ", ".join(str(part.file) for part in parts)
    for name, windows in evidence.windows.items():
        if windows.indices != tuple(range(evidence.settings["windows"][name])):
            raise UsageError(f"the windows of {name} are not all there, or are there twice, in {names}")
    limit = evidence.settings["limit"]
    for name, task in evidence.tasks.items():
        asked = task.questions if limit is None else min(limit, task.questions)
        found = sum(len(part.evidence.tasks[name].hashes) for part in parts)
        if list(task.hashes) != list(range(asked)) or found != asked:
            raise UsageError(f"the questions of {name} are not all there, or are there twice, in {names}")


def _largest_peak(parts: Sequence[_Part]) -> Peak:
    peak = Peak()
    for part in parts:
        peak = peak.or_larger(Peak(part.result.get("peak_memory_bytes"), part.result.get("peak_gpu_memory_bytes")))
    return peak
