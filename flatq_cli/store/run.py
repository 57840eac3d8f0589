"""A run: one directory that holds everything a quantization produced, stage by stage.

    RUN/run.yaml                what decides the result: recipe, model, data, seed, package versions
    RUN/<stage>/manifest.json   what the stage has finished: each item's file, SHA-256 and figures
    RUN/<stage>/…               the items' files

A file is complete and synced before the manifest names it, and the manifest is replaced atomically. So a stage that is
killed goes on where it was, and what a manifest names is whole. A stage records what it was made from (`inputs`,
usually another stage's digest); when that differs, its items are stale and it starts over. Whatever depends on time is
in the manifests only, so that two runs of one recipe give the same files bit for bit.

One process at a time writes to a run (an advisory lock on RUN/.lock, held until the process ends); reading needs none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from flatq_cli.config.recipe import Frozen, Recipe
from flatq_cli.errors import UsageError
from flatq_cli.store import atomic
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor

RUN_SCHEMA: Literal["flatq.run/1"] = "flatq.run/1"
MANIFEST_SCHEMA: Literal["flatq.manifest/1"] = "flatq.manifest/1"
Metrics = dict[str, float | int | str | None]

# Locks this process holds: run directory → descriptor of its .lock. A process keeps a run until it ends, so that its
# stages, one after the other, are one owner.
_held: dict[Path, int] = {}


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


def _inside(name: str) -> str:
    """Refuse a file name that leaves the stage's directory: items' files are deleted when a stage starts over."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("must be a path inside the stage's directory")
    return name


class Item(Frozen):
    """One finished artifact of a stage."""

    # a figure may be NaN (it is written as null); an item must not be lost over it
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)

    file: Annotated[str, AfterValidator(_inside)] = Field(description="path in the stage's directory")
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


class Run:
    """An opened run directory: `path`, `config` and its stages."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        """Use `Run.create`, `Run.open` or `open_or_create`."""
        self.path = path
        self.config = config

    @staticmethod
    def create(path: Path, config: RunConfig) -> Run:
        """Make a run directory with its `run.yaml`, and lock it.

        Raises:
            UsageError: there is a run already, or stages of a run that lost its `run.yaml`; another process is at work.
        """
        path = Path(path)
        atomic.make_directory(path)
        lock_run(path)
        if (path / "run.yaml").exists():
            raise UsageError(f"{path} is a run already; use another --run")
        if orphans := sorted(manifest.parent.name for manifest in path.glob("*/manifest.json")):
            stages = ", ".join(orphans)
            raise UsageError(f"{path} has stages ({stages}) but no run.yaml; use another --run, or empty it")
        _write_config(path, config)
        return Run(path, config)

    @staticmethod
    def open(path: Path) -> Run:
        """Open an existing run, for reading or writing (writing locks it, in `Stage.begin`).

        Raises:
            UsageError: no run there, a `run.yaml` of a newer flatq, or one that is broken.
        """
        path = Path(path)
        file = path / "run.yaml"
        remedy = "restore it, or start again with another --run"
        if not path.is_dir():
            raise UsageError(f"there is no run at {path}: `flatq calibrate --model M --run {path}` makes one")
        if not file.is_file():
            raise UsageError(f"{path} is not a run: it has no run.yaml; `flatq calibrate --model M` makes a run")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is broken{_yaml_place(error)}; {remedy}") from error
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from error
        return Run(path, _validate(RunConfig, content, file, RUN_SCHEMA, remedy))

    def stage(self, name: str) -> Stage:
        """The stage `name`, as it is on disk now."""
        return Stage(self.path, name)


def open_or_create(path: Path, config: RunConfig) -> Run:
    """Open the run at `path` if it was made by the same recipe, model and data; create it if there is none. Locks it.

    The same model found elsewhere is the same model: the run then notes the new place, so that later stages find it.

    Raises:
        UsageError: the run was made with another recipe, model or data (each difference is shown), or is in use.
    """
    path = Path(path)
    if not (path / "run.yaml").exists():
        return Run.create(path, config)
    run = Run.open(path)
    if differences := config_differences(run.config, config):
        raise UsageError(
            f"{path} was made with other settings: {'; '.join(differences)}; use another --run, or the same settings"
        )
    lock_run(path)
    if run.config.model != config.model:
        run = Run(path, run.config.model_copy(update={"model": config.model}))
        _write_config(path, run.config)
    return run


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What makes `new` another quantization than `old`, one line a key, as `weights.bits: run has 4, asked 3`.

    Not counted: package versions, the recipe's description, where and under which name the model or the text was found.
    """
    have, want = _deciding_values(old), _deciding_values(new)
    if old.data is not None and new.data is not None:
        for values in (have, want):  # the text's hash says more than the name or path it was asked for by
            del values["calibration.data"]
    nothing = (None, "none")
    return [
        f"{key}: run has {have.get(key, nothing)[1]}, asked {want.get(key, nothing)[1]}"
        for key in dict.fromkeys([*have, *want])
        if have.get(key, nothing)[0] != want.get(key, nothing)[0]
    ]


def version_differences(run: Run) -> list[str]:
    """Packages whose version is not the run's, as `torch: run has 2.9.0, this is 2.10.0`: to note, not an error."""
    now, then = package_versions(), run.config.versions
    return [
        f"{name}: run has {then.get(name, 'none')}, this is {now.get(name, 'none')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


class Stage:
    """One stage's directory and manifest. `begin`, then `save` each item not yet `complete`, then `finish`."""

    def __init__(self, run_path: Path, name: str) -> None:
        """Use `Run.stage`."""
        self.run_path = run_path
        self.name = name
        self.path = run_path / name
        self._manifest = self._read()

    @property
    def manifest(self) -> Manifest:
        """What the stage has finished; empty where it has not begun."""
        return self._manifest or Manifest(stage=self.name)

    @property
    def done(self) -> bool:
        """Whether the stage finished."""
        return self.manifest.status == "done"

    def begin(self, inputs: dict[str, str] | None = None) -> list[str]:
        """Lock the run and make the stage ready to save items; what is finished already stays.

        Args:
            inputs: what the stage is made from, as hashes (an earlier stage's `digest`, …).
        Returns:
            Names of the items that were dropped because the stage was made from other inputs; usually none.
        Raises:
            UsageError: another process is at work on this run.
        """
        inputs = dict(inputs or {})
        atomic.make_directory(self.path)
        lock_run(self.run_path)
        atomic.clean_stale(self.run_path)
        atomic.clean_stale(self.path, below=True)
        self._manifest = self._read()
        stale: dict[str, Item] = {}
        if self._manifest is not None and self._manifest.inputs != inputs:
            stale = self._manifest.items
            # Not done from here on, and the manifest goes last: killed in between, the next `begin` starts over again.
            self._write(self._manifest.model_copy(update={"status": "running"}))
            for item in stale.values():
                (self.path / item.file).unlink(missing_ok=True)
            self._manifest = None
        if self._manifest is None:
            self._write(Manifest(stage=self.name, inputs=inputs))
        return sorted(stale)

    def complete(self, name: str, verify: bool = False) -> bool:
        """Whether item `name` is finished: in the manifest, and its file there in full size (`verify`: and hash)."""
        item = self.manifest.items.get(name)
        if item is None:
            return False
        file = self.path / item.file
        if not file.is_file() or file.stat().st_size != item.bytes:
            return False
        return not verify or atomic.file_sha256(file) == item.sha256

    def save(
        self,
        name: str,
        filename: str,
        tensors: dict[str, Tensor],
        metrics: Metrics | None = None,
        seconds: float = 0.0,
        metadata: dict[str, str] | None = None,
    ) -> Item:
        """Write tensors to `filename` and then add item `name` to the manifest, each atomically.

        Raises:
            WorkError: disk full or another failed write; nothing finished before is lost.
        """
        self._forget(name)
        file = self.path / _inside(filename)
        atomic.make_directory(file.parent)
        digest = atomic.save_tensors(file, tensors, metadata)
        item = Item(
            file=filename, sha256=digest, bytes=file.stat().st_size, metrics=dict(metrics or {}), seconds=seconds
        )
        self._add(name, item)
        return item

    def add_file(self, name: str, path: Path, metrics: Metrics | None = None, seconds: float = 0.0) -> Item:
        """Add a file that was written into the stage's directory by other means (a config, an index) as item `name`.

        Raises:
            ValueError: the file is not inside the stage's directory.
        """
        filename = path.resolve().relative_to(self.path.resolve()).as_posix()
        self._forget(name)
        atomic.fsync_path(path)
        atomic.fsync_path(path.parent)
        item = Item(
            file=filename,
            sha256=atomic.file_sha256(path),
            bytes=path.stat().st_size,
            metrics=dict(metrics or {}),
            seconds=seconds,
        )
        self._add(name, item)
        return item

    def verify(self) -> None:
        """Check every item's file against its SHA-256.

        Raises:
            UsageError: a file is missing or damaged; says what to do.
        """
        for name, item in self.manifest.items.items():
            if not self.complete(name, verify=True):
                raise UsageError(
                    f"{self.path / item.file} is missing or damaged (its SHA-256 is not the manifest's); delete it and "
                    f"run `flatq {self.name}` again, which makes it anew"
                )

    def load(self, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """Read the tensors of item `name`, after checking the file against the manifest.

        Raises:
            UsageError: not in the manifest, missing, or damaged; says what to do.
        """
        item = self.manifest.items.get(name)
        again = f"run `flatq {self.name}` again, which makes it anew"
        if item is None:
            raise UsageError(f"{self.path} has no {name}; run `flatq {self.name}` first")
        file = self.path / item.file
        if not file.is_file():
            raise UsageError(f"{file} is missing; {again}")
        if atomic.file_sha256(file) == item.sha256:
            return atomic.load_tensors(file, device)
        reason = "its SHA-256 is not the manifest's"
        try:
            atomic.load_tensors(file)
        except UsageError as error:  # a truncated file: that one says where
            reason = str(error).removeprefix(f"{file} is damaged: ").split("; delete")[0]
        raise UsageError(f"{file} is damaged: {reason}; delete it and {again}")

    def finish(self, metrics: dict[str, Any] | None = None, seconds: float = 0.0) -> None:
        """Mark the stage as done."""
        self._write(
            self._begun().model_copy(update={"status": "done", "metrics": dict(metrics or {}), "seconds": seconds})
        )

    def digest(self) -> str:
        """A hash over the names and hashes of the items: the input of the next stage. Equal for equal artifacts."""
        items = {name: item.sha256 for name, item in self.manifest.items.items()}
        return hashlib.sha256(json.dumps(items, sort_keys=True).encode("utf-8")).hexdigest()

    def require_done(self, next: str) -> None:
        """Check that the stage finished and its files are there, before `next` (`flatq fuse`) uses them.

        Raises:
            UsageError: it did not finish, or a file is gone; says what to run.
        """
        again = f"run `flatq {self.name} …` first"
        if not self.done:
            begun = f" ({len(self.manifest.items)} items so far)" if self.manifest.items else ""
            raise UsageError(f"{self.run_path} has no finished {self.name} stage{begun}, which `{next}` needs; {again}")
        for name, item in self.manifest.items.items():
            if not self.complete(name):
                raise UsageError(f"{self.path / item.file}, which `{next}` needs, is missing or cut off; {again}")

    def _begun(self) -> Manifest:
        if self._manifest is None:
            raise ValueError(f"stage {self.name} was not begun")
        return self._manifest

    def _add(self, name: str, item: Item) -> None:
        manifest = self._begun()
        items = {**manifest.items, name: item}
        self._write(manifest.model_copy(update={"items": items, "status": "running"}))

    def _forget(self, name: str) -> None:
        """Take an item out of the manifest before its file is replaced, so that no entry ever names another's bytes."""
        manifest = self._begun()
        if name in manifest.items:
            items = {key: item for key, item in manifest.items.items() if key != name}
            self._write(manifest.model_copy(update={"items": items, "status": "running"}))

    def _read(self) -> Manifest | None:
        file = self.path / "manifest.json"
        remedy = f"delete it: the {self.name} stage then starts over"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, OSError) as error:
            raise UsageError(f"{file} is broken ({error}); {remedy}") from error
        return _validate(Manifest, content, file, MANIFEST_SCHEMA, remedy)

    def _write(self, manifest: Manifest) -> None:
        # pydantic writes a figure that is not a number as null: JSON has no NaN
        atomic.write_text(self.path / "manifest.json", manifest.model_dump_json(indent=2, by_alias=True) + "\n")
        self._manifest = manifest


def lock_run(path: Path) -> None:
    """Take a run for this process until it ends (or `unlock_run`); at once if this process has it already.

    Raises:
        UsageError: another process has it.
    """
    file = path / ".lock"
    key = path.resolve()
    if key in _held:
        if file.exists() and os.path.samestat(file.stat(), os.fstat(_held[key])):
            return
        unlock_run(path)  # the directory was removed and made again
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; give a --run you may write to") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        os.close(descriptor)
        raise UsageError(
            f"{path} is in use by another flatq process ({owner or 'unknown'}): wait for it, or use another --run"
        ) from error
    except OSError:
        pass  # a file system without locks (some network ones): go on without
    with contextlib.suppress(OSError):  # only a note for whoever comes second; a full disk must not stop us here
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[key] = descriptor


def unlock_run(path: Path) -> None:
    """Give a run back before the process ends."""
    descriptor = _held.pop(path.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


_Model = TypeVar("_Model", bound=BaseModel)


def _validate(model: type[_Model], content: Any, file: Path, schema: str, remedy: str) -> _Model:
    """Build `model` from a file's content; UsageError for another schema or a wrong key."""
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        family, _, version = schema.partition("/")
        match = re.fullmatch(rf"{re.escape(family)}/(\d+)", found) if isinstance(found, str) else None
        if match and int(match.group(1)) > int(version):
            raise UsageError(f"{file} was made by a newer flatq ({found}; this one reads {schema}): upgrade flatq")
        raise UsageError(f"{file} is broken: its schema is {_show(found)}, not {schema}; {remedy}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{file} is broken: {key}: {first['msg']}; {remedy}") from error


def _write_config(path: Path, config: RunConfig) -> None:
    content = config.model_dump(mode="json", by_alias=True)
    atomic.write_text(path / "run.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _yaml_place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark is not None else ""


def _deciding_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """What decides a run's artifacts: dotted key → (what is compared, how it is shown)."""
    recipe = _flatten(config.recipe.model_dump(mode="json"))
    values = {key: (value, _show(value)) for key, value in recipe.items() if key != "description"}
    model, data = config.model, config.data
    blocks = f"{model.model_type}, {model.num_blocks} blocks, {model.fingerprint[:12]}"
    values["model"] = (model.fingerprint, f"{model.name} ({blocks})")
    if data is not None:
        values["data"] = (data.sha256, f"{data.name} ({data.characters:,} characters, {data.sha256[:12]})")
    return values


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
