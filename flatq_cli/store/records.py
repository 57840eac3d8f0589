"""What a run writes about itself: `run.yaml` and the stages' manifests, as closed models with a schema version."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from flatq_cli.config.recipe import Frozen, Recipe
from flatq_cli.errors import UsageError

RUN_SCHEMA: Literal["flatq.run/1"] = "flatq.run/1"
MANIFEST_SCHEMA: Literal["flatq.manifest/1"] = "flatq.manifest/1"
Metrics = dict[str, float | int | str | None]


class ModelIdentity(Frozen):
    """Which model a run quantizes. `fingerprint` decides; the rest says where it was found and what it is."""

    spec: str = Field(description="what the user typed")
    location: str = Field(description="the path it was read from")
    kind: Literal["directory", "gguf"]
    name: str
    revision: str | None = None
    fingerprint: str
    model_type: str
    num_blocks: int


class DataIdentity(Frozen):
    """Which calibration text a run used. `sha256` decides."""

    name: str
    sha256: str
    characters: int


class RunConfig(Frozen):
    """Everything that decides what a run's artifacts are: the content of `run.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["flatq.run/1"] = Field(default=RUN_SCHEMA, alias="schema")
    recipe_name: str | None = Field(default=None, description="the bundled recipe or the file it came from")
    recipe: Recipe
    model: ModelIdentity
    data: DataIdentity | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def inside_stage(name: str) -> str:
    """Refuse a file name that leaves the stage's directory: items' files are deleted when a stage starts over."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("must be a path inside the stage's directory")
    return name


class Item(Frozen):
    """One finished artifact of a stage."""

    # a figure may be NaN (it is written as null); an item must not be lost over it
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)

    file: Annotated[str, AfterValidator(inside_stage)] = Field(description="path in the stage's directory")
    sha256: str
    bytes: int
    metrics: Metrics = Field(default_factory=dict)
    seconds: float = 0.0


class Manifest(Frozen):
    """What a stage has finished so far."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_: Literal["flatq.manifest/1"] = Field(default=MANIFEST_SCHEMA, alias="schema")
    stage: str
    status: Literal["running", "done"] = "running"
    inputs: dict[str, str] = Field(default_factory=dict, description="what it was made from, as hashes")
    items: dict[str, Item] = Field(default_factory=dict)
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int | None = Field(default=None, description="resident at most while it was made; of its parts")
    peak_gpu_memory_bytes: int | None = Field(default=None, description="the same of what torch had on a GPU")


_Model = TypeVar("_Model", bound=BaseModel)


def read_record(model: type[_Model], content: Any, file: Path, schema: str, remedy: str) -> _Model:
    """Build `model` from a file's content; UsageError for another schema or a wrong key."""
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        family, _, version = schema.partition("/")
        match = re.fullmatch(rf"{re.escape(family)}/(\d+)", found) if isinstance(found, str) else None
        if match and int(match.group(1)) > int(version):
            raise UsageError(f"{file} was made by a newer flatq ({found}; this one reads {schema}): upgrade flatq")
        raise UsageError(f"{file} is broken: its schema is {show(found)}, not {schema}; {remedy}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{file} is broken: {key}: {first['msg']}; {remedy}") from error


def show(value: Any) -> str:
    """A value as YAML would write it: `none`, `true`, `4`."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
