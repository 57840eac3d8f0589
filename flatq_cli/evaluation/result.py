"""The result of an evaluation: figures for people and scripts, and the evidence they are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.evidence import Evidence, TaskEvidence
from flatq_cli.evaluation.evidence_json import evidence_to_json
from flatq_cli.evaluation.shard import WHOLE, Shard
from flatq_cli.store.memory import Peak

if TYPE_CHECKING:
    from flatq_cli.evaluation.perplexity import Perplexity
    from flatq_cli.evaluation.targets import Kind

SCHEMA = "flatq.eval/1"


def read_result(file: Path) -> dict[str, Any]:
    """A result as `flatq eval --json` wrote it.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error})") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UsageError(f"{file}: not a result of `flatq eval --json` (schema {SCHEMA})")
    return result


@dataclass(frozen=True)
class EvalResult:
    """What was measured; `to_json` gives schema `flatq.eval/1`.

    Attributes:
        data: where the questions of tasks from a folder were read: `file`, `sha256`, `questions`.
        gates: what became of each gate. comparison: how the figures differ from the baseline's; None without one.
        peak: the memory it took.
        evidence: what the figures are made of. shard: the part of the evaluation that this is.
        name: of the whole evaluation, as its file in a run is called.
    """

    target: str
    kind: Kind
    recipe: str | None
    perplexity: dict[str, Perplexity]
    tasks: dict[str, dict[str, float]]
    versions: dict[str, str]
    seconds: float
    gates: tuple[dict[str, Any], ...] = ()
    comparison: dict[str, Any] | None = None
    baseline: EvalResult | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    peak: Peak = field(default_factory=Peak)
    evidence: Evidence = field(default_factory=Evidence)
    shard: Shard = WHOLE
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """The result in schema `flatq.eval/1`, ready for `json.dumps`: a figure that is not finite is None."""
        result = {
            "schema": SCHEMA,
            "target": self.target,
            "kind": self.kind,
            "recipe": self.recipe,
            "perplexity": {
                name: {**asdict(measured), "value": _finite(measured.value)}
                for name, measured in self.perplexity.items()
            },
            "tasks": {
                task: {metric: _finite(value) for metric, value in metrics.items()}
                for task, metrics in self.tasks.items()
            },
            **({"harness": _harness(self.evidence.tasks)} if self.evidence.tasks else {}),
            **({"data": self.data} if self.data else {}),
            **({} if self.comparison is None else {"comparison": self.comparison}),
            "gates": list(self.gates),
            "versions": self.versions,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak.resident,
            "peak_gpu_memory_bytes": self.peak.gpu,
        }
        if self.shard != WHOLE:
            part = {"part": self.shard.part, "of": self.shard.of, "name": self.name}
            result["shard"] = {**part, **evidence_to_json(self.evidence)}
        return result if self.baseline is None else {**result, "baseline": self.baseline.to_json()}


def _harness(tasks: Mapping[str, TaskEvidence]) -> dict[str, Any]:
    """What the harness says of each task beside its figures."""
    return {
        name: {
            "version": evidence.version,
            "hash": evidence.hash,
            "num_fewshot": evidence.num_fewshot,
            "questions": {"asked": evidence.n, "of": evidence.questions},
            "higher_is_better": dict(evidence.higher_is_better),
        }
        for name, evidence in tasks.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
