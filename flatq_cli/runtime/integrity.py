"""Whether an export is still what was written: digests of its tensors and files, compared when it is loaded.

A flipped bit in a scale, one shard of another export or an edited config give a model that loads, answers and is wrong.
So the index holds a digest of every tensor and of every file that says what they mean:

    {"metadata": {"total_size": …, "digests": {"tensors": {name: hex}, "files": {name: hex}}}, "weight_map": …}

They are in the index, and not in the shards, because every loader has it before it reads a tensor, because it tells the
shards of one export from those of another, and because it is written last. `save_pretrained` of transformers replaces
it as a whole: such a copy has no digests, and loads without being compared. So does everything with FLATQ_VERIFY=0.

Digests find damage. They are no signature: who can write the shards can write the index as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq_cli.errors import UsageError
from flatq_cli.models.locate import INDEX, SINGLE

DIGESTS = "digests"
CONFIG = "config.json"
SHARDS = "model-*-of-*.safetensors"
OFF = "FLATQ_VERIFY"
"""Environment variable: 0 loads an export without comparing digests."""

IGNORED = (".safetensors", ".py", ".md")
"""Files without a digest of their own: shards (their tensors have one each), code and the model card (not read)."""

FREE_KEYS = {"_name_or_path", "attn_implementation", "transformers_version"}
"""Keys of config.json that may change: transformers writes the first and the last one anew, and flatq does not follow
the attention that is asked for."""

SIZE = 16
THREADS = 4
_AGAIN = "export the run again or copy the directory again"
_OR_NOT = f"{_AGAIN} ({OFF}=0 loads it as it is)"


@dataclass(frozen=True)
class _Index:
    """What the index of an export says: digest by tensor, digest by file, file by tensor."""

    tensors: dict[str, str]
    files: dict[str, str]
    weight_map: dict[str, str]


def digests(shards: Sequence[Path], files: Iterable[Path]) -> dict[str, dict[str, str]]:
    """What the index of an export holds under `metadata.digests`.

    Args:
        shards: its safetensors files, which are read whole.
        files: its other files; those that mean nothing to a loader are left out.
    """
    named = sorted((file for file in files if not _ignored(file.name)), key=lambda file: file.name)
    tensors: dict[str, str] = {}
    for found in _tensor_digests(shards):
        tensors |= found
    return {"tensors": dict(sorted(tensors.items())), "files": {file.name: file_digest(file) for file in named}}


def check_files(directory: Path) -> None:
    """Compare the files beside the shards (config, tokenizer, …) with their digests.

    In the cache of the Hugging Face hub a file may be missing: it was not downloaded, or not yet.

    Raises:
        UsageError: a file that is missing (the index and shards too) or is not what was exported; names it.
    """
    if not any((directory / name).is_file() for name in (INDEX, SINGLE)) and len(list(directory.glob(SHARDS))) > 1:
        raise UsageError(f"{directory / INDEX} is missing: it names the shards; {_AGAIN}")
    index = _read_index(directory)
    if index is None:
        return
    for name in sorted(set(index.weight_map.values())):
        if not (directory / name).is_file():
            raise UsageError(f"{directory / name}, which {INDEX} names, is missing; {_AGAIN}")
    for name, digest in index.files.items():
        file = directory / name
        if not file.is_file():
            if directory.parent.name == "snapshots":
                continue
            raise UsageError(f"{file} is missing, though {INDEX} has its digest; {_OR_NOT}")
        if file_digest(file) != digest:
            raise UsageError(f"{file} is damaged or was edited: its digest is not the one in {INDEX}; {_OR_NOT}")


def check_shards(shards: Sequence[Path]) -> None:
    """Compare every tensor of the safetensors files of an export with its digest; reads them whole.

    Raises:
        UsageError: a tensor that is not what was exported, or is in another file than it was; names both.
    """
    index = _read_index(shards[0].parent) if shards else None
    if index is None:
        return
    for shard, found in zip(shards, _tensor_digests(shards), strict=True):
        for name, digest in found.items():
            if index.weight_map.get(name) != shard.name:
                raise UsageError(
                    f"{shard}: tensor {name} is not in the file that {INDEX} names; "
                    f"one of the two is damaged or of another export; {_OR_NOT}"
                )
            if index.tensors.get(name) != digest:
                raise UsageError(
                    f"{shard}: tensor {name} is damaged or of another export: "
                    f"its digest is not the one in {INDEX}; {_OR_NOT}"
                )


def home_of(tensor: str, directory: Path) -> Path:
    """The file of an export that should hold a tensor; the directory, where its index does not say."""
    index = _read_index(directory)
    return directory if index is None else directory / index.weight_map.get(tensor, "")


def stored_tensor_digests(directory: Path) -> dict[str, str] | None:
    """Digest by tensor, as the index of an export has them; None where there are none, or they are not compared.

    Raises:
        UsageError: a damaged index.
    """
    index = _read_index(directory)
    return None if index is None else index.tensors


def file_digest(file: Path) -> str:
    """BLAKE2b-128 of a file's bytes, in hexadecimal; of config.json: of its values, as `_settings` writes them.

    Raises:
        UsageError: a config.json that is not a JSON object.
    """
    content = _settings(file) if file.name == CONFIG else file.read_bytes()
    return hashlib.blake2b(content, digest_size=SIZE).hexdigest()


def shard_digests(shard: Path) -> dict[str, str]:
    """Tensor → BLAKE2b-128 of its dtype, shape and bytes, in hexadecimal, for a whole safetensors file.

    What is hashed is a line of text, `F32 [192, 1]` for example, its line feed, and the data as the file has it.

    Raises:
        UsageError: the file cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    try:
        with safe_open(shard, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                part, tensor = handle.get_slice(name), handle.get_tensor(name)
                digest = hashlib.blake2b(f"{part.get_dtype()} {list(part.get_shape())}\n".encode(), digest_size=SIZE)
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                found[name] = digest.hexdigest()
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{shard}: truncated or corrupt safetensors file ({error}); copy or export it again"
        ) from error
    return found


def _tensor_digests(shards: Sequence[Path]) -> list[dict[str, str]]:
    """`shard_digests` of each; hashing lets go of Python's lock."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(shard_digests, shards))


def _ignored(name: str) -> bool:
    return name.endswith(IGNORED) or name == INDEX


def _settings(file: Path) -> bytes:
    """The values of a config.json without `FREE_KEYS`, as JSON with sorted keys and no spaces, in ASCII."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in FREE_KEYS}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{file} is damaged: not a JSON object ({error}); {_AGAIN}") from error
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _read_index(directory: Path) -> _Index | None:
    """The digests of the export in `directory`; None where there are none, or they are not to be compared.

    A `model.safetensors` beside the index is what transformers loads: the index is then that of something else.

    Raises:
        UsageError: a damaged index.
    """
    file = directory / INDEX
    if os.environ.get(OFF) == "0" or (directory / SINGLE).is_file() or not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        stored = index["metadata"].get(DIGESTS)
        if stored is None:
            return None
        return _Index(_texts(stored["tensors"]), _names(stored["files"]), _texts(index["weight_map"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file} is damaged: not the index of a sharded model ({what}); {_OR_NOT}") from error


def _texts(entries: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in entries.items()}


def _names(entries: Any) -> dict[str, str]:
    """Digest by file name; a path that leads elsewhere is none."""
    files = _texts(entries)
    if strange := [name for name in files if Path(name).name != name]:
        raise ValueError(f"'{strange[0]}' is not the name of a file in this directory")
    return files
