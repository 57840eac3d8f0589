"""Exceptions to one line on stderr and an exit code (design: 0 done, 1 failed while working, 2 wrong usage, 3 gate)."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from flatq_cli.errors import FlatqError, UsageError, WorkError

_INTERRUPTED = 130
"""What a shell gives for a process that SIGINT ended."""

_GO_ON = "the same command goes on where it was"
_LOWER = "lower calibration.batch, .samples or .seqlen (such as --set calibration.batch=1), or --batch in eval"


@contextmanager
def command_errors(debug: bool = False) -> Iterator[None]:
    """Run a command: whatever it raises becomes one line and an exit code; the traceback comes before it with `debug`.

    Raises:
        typer.Exit: with the code, in place of every exception but Typer's own and a broken pipe.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _say(f"interrupted; {_GO_ON}")
        raise typer.Exit(_INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = explain(error)
        _say(line)
        raise typer.Exit(code) from error


def explain(error: Exception) -> tuple[str, int]:
    """The line that says what happened and what to do, and the exit code."""
    message = one_line(str(error))
    if isinstance(error, FlatqError):
        return message, error.exit_code
    if _disk_full(error):
        name = getattr(error, "filename", None)
        return f"the disk is full{f' ({name})' if name else ''}: free some space; {_GO_ON}", WorkError.exit_code
    if _out_of_memory(error):
        return f"out of memory: {_LOWER}; {_GO_ON}", WorkError.exit_code
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is corrupt or truncated: {message}", UsageError.exit_code
    name = type(error).__name__
    what = f"{name}: {message}" if message else name
    return f"{what} (use --debug for the traceback)", WorkError.exit_code


def one_line(text: str) -> str:
    """Text with its line breaks made spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _disk_full(error: Exception) -> bool:
    """ENOSPC or a spent quota, also where safetensors wraps it in an error of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and f"os error {errno.ENOSPC}" in str(error)


def _out_of_memory(error: Exception) -> bool:
    """By name and text, so that torch need not be imported to ask. On the CPU torch raises a plain RuntimeError."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def _say(line: str) -> None:
    print(f"flatq: {line}", file=sys.stderr, flush=True)
