"""The run that this folder used last, so that `flatq fuse` needs no argument after `flatq calibrate`.

It is one line of text in `runs/.last` under the current folder: the run's path, relative to that folder where it lies
inside it, absolute where it does not.
"""

from __future__ import annotations

from pathlib import Path

from flatq_cli.errors import FlatqError, UsageError
from flatq_cli.store import atomic

RUNS = "runs"
_LAST = ".last"


def remember_run(path: Path) -> None:
    """Remember `path` as the run that the current folder used last; a folder not writable remembers none."""
    folder = Path.cwd()
    absolute = (folder / path).resolve()
    try:
        line = absolute.relative_to(folder.resolve())
    except ValueError:
        line = absolute
    try:
        atomic.make_directory(folder / RUNS)
        atomic.write_text(folder / RUNS / _LAST, f"{line}\n")
    except FlatqError:
        return  # a convenience: the work itself must not fail over it


def last_run() -> Path:
    """The run that the current folder used last, as it was remembered (relative to the folder, or absolute).

    Raises:
        UsageError: none was used here, or it is gone.
    """
    note = Path(RUNS) / _LAST
    try:
        line = note.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        line = ""
    if not line:
        raise UsageError("no run was used in this folder yet: name one, or make one with `flatq calibrate --model M`")
    run = Path(line)
    if not run.is_dir():
        raise UsageError(f"{run}, the run this folder used last, is gone: name another (it is noted in {note})")
    return run
