"""Gate files: limits on what an evaluation measures, as a closed YAML format.

    confidence: 0.95
    gates:
      - {metric: perplexity_ratio, max: 1.25}
      - {metric: arc_easy.acc_drop, max: 0.02, undecided: pass}

What stands at the top of the file holds for every gate that does not say otherwise. `--gates` takes the path of such a
file or the name of a bundled one (`configs/gates/`). What the words mean is in docs/gates.md; what becomes of a limit
and a figure is decided in `evaluation/gates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.recipe import Frozen
from flatq_cli.config.validation import Layer, file_layer, nearest, validate
from flatq_cli.errors import UsageError

Bound = Literal["max", "min", "max_relative", "min_relative"]
Outcome = Literal["pass", "fail"]
Confidence = Annotated[float, Field(ge=0, lt=1)]

_BOUNDS: tuple[Bound, ...] = ("max", "min", "max_relative", "min_relative")


class GateEntry(Frozen):
    """One gate as it is written: a metric and exactly one limit."""

    metric: Annotated[str, Field(min_length=1)] = Field(description="what is limited; * stands for any text or task")
    max: float | None = Field(None, description="the largest figure that passes")
    min: float | None = Field(None, description="the smallest figure that passes")
    max_relative: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the largest figure that passes, as a multiple of the baseline's"
    )
    min_relative: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the smallest figure that passes, as a multiple of the baseline's"
    )
    name: str | None = Field(None, min_length=1, description="what the gate is called in results; else its metric")
    confidence: Confidence | None = Field(None, description="of this gate, instead of the file's")
    undecided: Outcome | None = Field(None, description="of this gate, instead of the file's")
    anomalous: Outcome | None = Field(None, description="of this gate, instead of the file's")

    @model_validator(mode="after")
    def _has_one_limit(self) -> GateEntry:
        given = [bound for bound in _BOUNDS if getattr(self, bound) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PydanticCustomError("one_limit", f"a gate has one limit of {', '.join(_BOUNDS)}; found {found}")
        return self


class GateFile(Frozen):
    """A whole gate file."""

    description: str = Field("", description="one line that says what the gates are for")
    confidence: Confidence = Field(0.95, description="of the intervals that figures are judged by; 0: the bare number")
    undecided: Outcome = Field(
        "fail", description="what becomes of a figure that the sample cannot tell from the limit"
    )
    anomalous: Outcome = Field(
        "fail", description="what becomes of a figure that is too good or no better than guessing"
    )
    gates: list[GateEntry] = Field(description="the gates")

    @field_validator("gates")
    @classmethod
    def _has_gates(cls, gates: list[GateEntry]) -> list[GateEntry]:
        if not gates:
            raise PydanticCustomError("no_gates", "Input has no gate: such a file would let everything pass")
        return gates


@dataclass(frozen=True)
class Gate:
    """One gate with everything settled.

    Attributes:
        name: what it is called in results; of a metric with a `*`, each metric it stands for has a gate of its own.
        metric: the figure it limits. bound, limit: the limit, of the figure or of its ratio to the baseline's.
        confidence: of the interval that the figure is judged by; 0 judges the bare number.
        undecided_passes, anomalous_passes: whether these verdicts are let through.
        where: file and line, for errors.
    """

    name: str
    metric: str
    bound: Bound
    limit: float
    confidence: float = 0.95
    undecided_passes: bool = False
    anomalous_passes: bool = False
    where: str = "gates"

    @property
    def relative(self) -> bool:
        """Whether the limit is a multiple of the baseline's figure."""
        return self.bound in ("max_relative", "min_relative")

    @property
    def is_ceiling(self) -> bool:
        """Whether smaller figures pass, not larger ones."""
        return self.bound in ("max", "max_relative")


def gate_file_names() -> list[str]:
    """The bundled gate files."""
    return sorted(path.stem for path in (configs_dir() / "gates").glob("*.yaml"))


def load_gates(files: Sequence[str]) -> tuple[Gate, ...]:
    """Read gate files, each by its path or as the name of a bundled one; all of their gates, in order.

    Raises:
        UsageError: no such file, a YAML error, an unknown key or a wrong value with its line, or two gates of one name.
    """
    return distinct([gate for file in files for gate in read_gates(file)])


def read_gates(file: str) -> list[Gate]:
    """The gates of one file, by its path or as the name of a bundled one. Raises as `load_gates`."""
    layer = file_layer(_path(file), "gate file")
    return settle(validate(GateFile, [layer]), layer)


def settle(file: GateFile, layer: Layer) -> list[Gate]:
    """Gates with what stands at the top of their file; `layer` is where the list `gates` was written."""
    return [
        _settled(entry, file, layer.where.get(("gates", index), layer.source)) for index, entry in enumerate(file.gates)
    ]


def distinct(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """The gates, if each has a name of its own: results are kept by it. Raises UsageError otherwise."""
    seen: dict[str, Gate] = {}
    for gate in gates:
        if gate.name in seen:
            raise UsageError(
                f"{gate.where}: the gate at {seen[gate.name].where} is called '{gate.name}' too; give one a `name`"
            )
        seen[gate.name] = gate
    return tuple(gates)


def _settled(entry: GateEntry, file: GateFile, where: str) -> Gate:
    bound, limit = next((bound, limit) for bound in _BOUNDS if (limit := getattr(entry, bound)) is not None)
    return Gate(
        name=entry.name or entry.metric,
        metric=entry.metric,
        bound=bound,
        limit=limit,
        confidence=file.confidence if entry.confidence is None else entry.confidence,
        undecided_passes=(entry.undecided or file.undecided) == "pass",
        anomalous_passes=(entry.anomalous or file.anomalous) == "pass",
        where=where,
    )


def _path(file: str) -> Path:
    names = gate_file_names()
    if file in names:
        return configs_dir() / "gates" / f"{file}.yaml"
    path = Path(file)
    if path.is_file() or "/" in file or path.suffix in (".yaml", ".yml"):
        return path
    raise UsageError(
        f"--gates: there are no gates '{file}'{nearest(file, names)}; bundled are {', '.join(names)}, or give the path "
        "of a YAML file"
    )
