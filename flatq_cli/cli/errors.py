"""Exceptions to one line on stderr and an exit code (design: 0 done, 1 failed while working, 2 wrong usage, 3 gate)."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from flatq_cli.errors import FlatqError, UsageError, WorkError, out_of_memory

_INTERRUPTED = 130
"""What a shell gives for a process that SIGINT ended."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_GO_ON = "the same command goes on where it was"
_WRONG_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError, of the click that this version of Typer depends on or brings with it."""

_LOWER = (
    "lower calibration.batch, .samples or .seqlen (such as --set calibration.batch=1, with another --run), or --batch "
    "in eval; with more memory"
)


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


@contextmanager
def usage_errors() -> Iterator[None]:
    """Run the command line itself: an unknown option or command, or a value of the wrong type, is one line too.

    Raises:
        SystemExit: with exit code 2, in place of what Typer would print in a box.
    """
    try:
        yield
    except _WRONG_USAGE as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
            _say(_usage_line(error))
        sys.exit(UsageError.exit_code)
    except typer.Abort:
        sys.exit(_INTERRUPTED)


def _usage_line(error: Any) -> str:
    """What click says of a command line, and which help to read."""
    command = error.ctx.command_path if error.ctx is not None else "flatq"
    return f"{one_line(error.format_message()).rstrip('.')} (see `{command} --help`)"


def explain(error: Exception) -> tuple[str, int]:
    """The line that says what happened and what to do, and the exit code."""
    message = one_line(str(error))
    if isinstance(error, FlatqError):
        return message, error.exit_code
    if _disk_full(error):
        name = getattr(error, "filename", None)
        return f"the disk is full{f' ({name})' if name else ''}: free some space; {_GO_ON}", WorkError.exit_code
    if out_of_memory(error):
        return f"out of memory: {_LOWER} {_GO_ON}", WorkError.exit_code
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is corrupt or truncated: {message}", UsageError.exit_code
    if type(error).__name__ == "KernelError":
        return message, UsageError.exit_code
    name = type(error).__name__
    what = f"{name}: {message}" if message else name
    return f"{what} (use --debug for the traceback)", WorkError.exit_code


def one_line(text: str) -> str:
    """Text with its line breaks made spaces."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _disk_full(error: Exception) -> bool:
    """No space, a spent quota or a file over the limit, also where safetensors wraps it in an error of its own."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(f"os error {code}" in str(error) for code in _FULL)


def _say(line: str) -> None:
    print(f"flatq: {line}", file=sys.stderr, flush=True)
