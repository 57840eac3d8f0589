"""The errors a user can meet: one clear line each, and the exit code that scripts see.

Code below the command line raises these and nothing else for things a user can act on; the command line prints the line
to stderr and exits with the code (design: 0 done, 1 failed while working, 2 wrong usage/config/input, 3 a gate failed).
"""

from __future__ import annotations


class FlatqError(Exception):
    """An error with a message for the user. The message is one line: what was wrong, where, and what to do."""

    exit_code = 1


class WorkError(FlatqError):
    """Something failed while working (disk full, out of memory, a loss that is not a number, a failed verification)."""

    exit_code = 1


class UsageError(FlatqError):
    """Wrong usage, configuration or input (unknown preset, misspelt key, missing file, corrupt safetensors)."""

    exit_code = 2


class GateError(FlatqError):
    """A quality gate failed."""

    exit_code = 3


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory did not suffice.

    By name and text, so that torch need not be imported to ask. On the CPU torch raises a plain RuntimeError.
    """
    seen: BaseException | None = error
    while seen is not None:
        names = {cls.__name__ for cls in type(seen).__mro__}
        if names & {"MemoryError", "OutOfMemoryError"}:
            return True
        if isinstance(seen, RuntimeError) and "DefaultCPUAllocator" in str(seen):
            return True
        seen = seen.__cause__
    return False
