"""One process at a time writes to a run: an advisory lock on RUN/.lock, held until the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from flatq_cli.errors import UsageError

# Locks this process holds: run directory → descriptor of its .lock. A process keeps a run until it ends, so that its
# stages, one after the other, are one owner.
_held: dict[Path, int] = {}


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
