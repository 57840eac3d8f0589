"""Who answers: everything that decides what a target says to a question, as one hash.

    a run       the SHA-256 of each fused shard, the recipe, the files of config and tokenizer
    an export   the digests of its tensors, the files of config and tokenizer
    a model     names, sizes and times of change of its weights, the files of config and tokenizer; of a hub snapshot
                its commit

with the dtype, the device, the backend, the versions of the packages that compute, and flatq's own sources. Weights are
not read whole: a question should not cost what hashing a model costs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.config.locations import PACKAGE, kernels_dir
from flatq_cli.models.locate import TOKENIZER_FILES, ModelLocation, fingerprint, weight_files
from flatq_cli.runtime.backends import REFERENCE, choose_exact
from flatq_cli.runtime.integrity import stored_tensor_digests
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from flatq_cli.evaluation.targets import Target

_SETTINGS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_PACKAGES = ("flatq", "torch", "transformers")
_ROOMS = ("models", "quantization", "runtime", "transforms", "kernels")
_MODULES = ("evaluation/perplexity.py", "evaluation/scoring.py")
"""The code that an answer passes through: rooms of the package, and modules of this one."""


def identity(target: Target, by_content: bool = False) -> str:
    """SHA-256 in hexadecimal of what decides a target's answers.

    Args:
        by_content: tell a model's weights by samples of their content, the same on every machine, and not by the time
            of their last change.
    Raises:
        UsageError: a damaged index of weights.
    """
    versions = package_versions()
    parts: dict[str, Any] = {
        "weights": _weights(target, by_content),
        "files": _contents(target.location),
        "dtype": str(target.dtype),
        "device": _device_kind(target.device),
        "backend": _arithmetic(target),
        "versions": {name: versions.get(name) for name in _PACKAGES},
        "lm_eval": importlib.metadata.version("lm_eval"),
        "sources": _sources(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _arithmetic(target: Target) -> str | None:
    """The backend, where it makes a difference: None for `reference` and for one that gives the same bits."""
    if target.backend in (REFERENCE.name, choose_exact(target.device, target.dtype)):
        return None
    return target.backend


def _weights(target: Target, by_content: bool) -> Any:
    location = target.location
    if target.run is not None:
        items = target.run.stage("fuse").manifest.items
        shards = {name: item.sha256 for name, item in items.items()}
        return {"fused": shards, "recipe": target.run.config.recipe.model_dump(mode="json")}
    if location.kind == "directory":
        if location.path.parent.name == "snapshots":  # the cache of the hub: snapshots/COMMIT
            return {"repository": location.path.parent.parent.name, "commit": location.path.name}
        if (digests := stored_tensor_digests(location.path)) is not None:
            return digests
    if by_content:
        return fingerprint(location)
    return _stamps([location.path] if location.kind == "gguf" else weight_files(location.path))


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _contents(location: ModelLocation) -> dict[str, str]:
    """The digest of each file that says what the weights mean; a GGUF has all of it inside."""
    if location.kind == "gguf":
        return {}
    code = sorted(file.name for file in location.path.glob("*.py"))
    files = [location.path / name for name in (*_SETTINGS, *code)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _device_kind(device: str) -> str:
    """The name of the GPU; of a processor only that it is one."""
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=1)
def _sources() -> str:
    """SHA-256 of the code an answer passes through: a version number does not change while flatq is worked on."""
    digest = hashlib.sha256()
    for file in sorted(_source_files()):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for room in _ROOMS:
        yield from (PACKAGE / room).rglob("*.py")
    yield from (PACKAGE / module for module in _MODULES)
    yield from (file for file in kernels_dir().rglob("*.cu*") if file.is_file())
