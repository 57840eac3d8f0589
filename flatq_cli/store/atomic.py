"""Files that are whole or not there: every write goes to a staging folder beside its target and is renamed into place.

A write is: stage, fsync the file, rename over the target, fsync the directory. A process killed at any point leaves
either the old file or the new one, and at most a staging folder (`.partial-*`), which `clean_stale` removes; a failed
write leaves the old file and no folder. The staging place is a folder, not a name, because safetensors itself writes to
a temporary name of its own choosing beside its target: in a folder, that one is found and removed too.

Safetensors files are made deterministic: the library orders tensors by dtype and name, but writes the metadata of the
header in random order, so that order is put right before the file is hashed and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.errors import FlatqError, UsageError, WorkError

if TYPE_CHECKING:
    from torch import Tensor

STAGING_PREFIX = ".partial-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
_HASH_CHUNK = 1 << 20


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically.

    Raises:
        WorkError: the disk is full, or the write failed otherwise.
        UsageError: the place does not allow writing.
    """
    with _staged(path, len(content)) as staged:
        staged.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by `content` in UTF-8, atomically. Raises as `write_bytes`."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON, atomically. Raises as `write_bytes`, and ValueError for NaN."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors to a safetensors file, atomically and deterministically: equal input gives equal bytes.

    Args:
        tensors: any dtype, device and strides; tensors that share memory are written one by one.
        metadata: text for the file's header.
    Returns:
        The file's SHA-256.
    Raises:
        WorkError, UsageError: as `write_bytes`.
    """
    from safetensors.torch import save_file

    plain = _separate(tensors)
    size = sum(tensor.nbytes for tensor in plain.values())
    with _staged(path, size) as staged:
        save_file(plain, staged, metadata=metadata)
        if metadata and len(metadata) > 1:
            _sort_metadata(staged)
        digest = file_sha256(staged)
    return digest


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file onto `device`.

    Raises:
        UsageError: the file is missing, truncated or corrupt; names the file, and the tensor where it is cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device=device))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file's header, without its tensors. Raises as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Make what was written to a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems do not sync directories
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents. Raises as `write_bytes`; UsageError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{path} is a file; a directory is needed there") from error
    except OSError as error:
        raise _write_error(path, 0, error) from error


def clean_stale(directory: Path, below: bool = False) -> None:
    """Remove the staging folders that killed processes left in `directory` (`below`: and in those inside it).

    Only for who holds the run's lock: a folder of a process still at work looks the same.
    """
    pattern = f"{STAGING_PREFIX}*"
    for stale in list(directory.rglob(pattern) if below else directory.glob(pattern)):
        shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def _staged(path: Path, size: int) -> Iterator[Path]:
    """Give a name to write to; on success sync it and move it to `path`, on failure remove it."""
    staging: Path | None = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=path.parent))
        staged = staging / path.name
        yield staged
        staged.chmod(_default_mode(staging))  # safetensors makes its files private; ours follow the umask
        fsync_path(staged)
        os.replace(staged, path)
        fsync_path(path.parent)
    except FlatqError:
        raise
    except OSError as error:
        raise _write_error(path, size, error) from error
    except Exception as error:
        # safetensors reports a failed write as its own error, with the number only in the text
        if (code := _errno_of(error)) is None:
            raise
        raise _write_error(path, size, OSError(code, os.strerror(code))) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _default_mode(staging: Path) -> int:
    """The mode that a new file gets here (the umask cannot be read without setting it)."""
    probe = staging / "mode"
    probe.touch()
    return probe.stat().st_mode & 0o777


def _errno_of(error: Exception) -> int | None:
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match.group(1)) if match else None


def _write_error(path: Path, size: int, error: OSError) -> FlatqError:
    if error.errno in _FULL:
        mebibytes = max(1, round(size / 2**20))
        return WorkError(
            f"disk full: could not write {path} ({mebibytes} MiB); "
            "free space and run the same command again: it goes on where it was"
        )
    reason = error.strerror or str(error)
    if error.errno in _REFUSED:
        return UsageError(f"cannot write {path}: {reason}; give a place you may write to")
    return WorkError(f"cannot write {path}: {reason}; run the same command again: it goes on where it was")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory with another (safetensors refuses those)."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensor = tensor.clone()
        seen.add(address)
        separate[name] = tensor
    return separate


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in sorted order, in place: the same entries, so the same length."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        if len(text) > length:
            raise WorkError(f"{path}: the safetensors header could not be put in order; please report this")
        file.seek(8)
        file.write(text.ljust(length))


def _unreadable(path: Path, error: Exception) -> UsageError:
    if isinstance(error, FileNotFoundError):
        return UsageError(f"{path} is missing")
    if isinstance(error, IsADirectoryError) or path.is_dir():
        return UsageError(f"{path} is a directory; a safetensors file is needed there")
    if isinstance(error, PermissionError):
        return UsageError(f"cannot read {path}: permission denied")
    return UsageError(f"{path} is damaged: {_damage(path, error)}; delete it and make it again, or copy it again")


def _damage(path: Path, error: Exception) -> str:
    """Say where a safetensors file breaks. Source: the format, https://github.com/huggingface/safetensors#format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or 8 + length > size:
            return f"its header is cut off or overwritten ({size:,} bytes in the file)"
        try:
            header = json.loads(file.read(length))
            ends = sorted((int(v["data_offsets"][1]), k) for k, v in header.items() if k != "__metadata__")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is not a safetensors header"
    available = size - 8 - length
    for end, name in ends:
        if end > available:
            return f"it is cut off in tensor {name} ({size:,} of {8 + length + ends[-1][0]:,} bytes)"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
