"""A run: one directory that holds everything a quantization produced, stage by stage.

    RUN/run.yaml                what decides the result: recipe, model, data, seed, package versions
    RUN/<stage>/manifest.json   what the stage has finished: each item's file, SHA-256 and figures
    RUN/<stage>/…               the items' files

What the files say is in `records.py`, how a stage writes its items in `stage.py`. One process at a time writes to a run
(`lock.py`); reading needs no lock.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flatq_cli.errors import UsageError
from flatq_cli.store import atomic
from flatq_cli.store.lock import lock_run
from flatq_cli.store.records import RUN_SCHEMA, RunConfig, read_record, show
from flatq_cli.store.stage import Stage
from flatq_cli.store.versions import package_versions


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
        return Run(path, read_record(RunConfig, content, file, RUN_SCHEMA, remedy))

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


def _write_config(path: Path, config: RunConfig) -> None:
    content = config.model_dump(mode="json", by_alias=True)
    atomic.write_text(path / "run.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))


def _yaml_place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark is not None else ""


def _deciding_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """What decides a run's artifacts: dotted key → (what is compared, how it is shown)."""
    recipe = _flatten(config.recipe.model_dump(mode="json"))
    values = {key: (value, show(value)) for key, value in recipe.items() if key != "description"}
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
