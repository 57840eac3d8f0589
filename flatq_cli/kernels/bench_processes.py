"""What the benchmark runs in processes of its own, so that a kernel that hangs or faults costs a row and not the run.

An illegal access ends a CUDA context: everything behind it in the same process fails. So the rows are measured by a
child that says each on a line; where it dies or falls silent, the next child goes on behind that row. Commands are
ended with all that they started (compute-sanitizer's target is a process of its own); their output until then is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatq_cli.kernels.bench_report import Row
from flatq_cli.kernels.bench_timing import Budget
from flatq_cli.kernels.bench_work import Work
from flatq_cli.kernels.compiler import cache_dir

CHECKOUT = Path(__file__).resolve().parents[2]
NO_TIME = "no time left"
SILENCE_SECONDS = 60.0  # a child that says nothing for so long hangs
_START_SECONDS = 12.0  # until a child measures
_MOST_FAULTS = 2  # of an op, before its other rows are left out


def run_command(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code (None: it took too long and was ended) and output of a command that shares the cache of kernels."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = _start(command, output.fileno(), subprocess.STDOUT, environment)
        except OSError as error:
            return 1, str(error)
        code: int | None = None
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        output.seek(0)
        return code, output.read()


def rows_apart(
    works: Sequence[Work],
    command: Sequence[str],
    budget: Budget,
    tell: Callable[[Row, Sequence[str]], None],
    silence: float = SILENCE_SECONDS,
) -> None:
    """Have every work measured by children, and tell each row with its notes.

    Args:
        command: starts a child. It is given `--rows 3,4,5` (positions in `works`) and `--seconds`, and prints
            `{"row": {...}, "notes": [...]}` for each of them in that order.
    """
    waiting, faults = list(range(len(works))), Counter[str]()
    while waiting and budget.left > 0:
        rows = ",".join(map(str, waiting))
        child = _Child([*command, "--rows", rows, "--seconds", f"{max(1.0, budget.left - _START_SECONDS):.1f}"])
        last, told = works[waiting[0]], False
        try:
            for line in child.lines(min(silence, budget.left + _START_SECONDS)):
                last, told = works[waiting.pop(0)], True
                found = json.loads(line)
                tell(Row(**found["row"]), found["notes"])
                if not waiting:
                    return
        finally:
            child.end()
        if child.code != LOST_CONTEXT or not told:  # it died in the middle of the next work
            last = works[waiting.pop(0)]
            tell(_not_measured(last, f"took its process down ({child.ending})"), ())
        faults[last.op] += 1
        if faults[last.op] >= _MOST_FAULTS:
            for position in [one for one in waiting if works[one].op == last.op]:
                waiting.remove(position)
                tell(_not_measured(works[position], "left out: works of this op took their processes down"), ())
    for position in waiting:
        tell(_not_measured(works[position], NO_TIME), ())


LOST_CONTEXT = 3
"""Exit code of a child that has told its last row and can measure no other: its CUDA context is gone."""


def _not_measured(work: Work, why: str) -> Row:
    return Row(work.op, work.size, work.tokens, work.bytes, work.operations, work.unit, error=why)


class _Child:
    """A process whose lines are read as they come."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = _start(command, subprocess.PIPE, None, None)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.code: int | None = None
        self.ending = ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def lines(self, silence: float) -> Iterator[str]:
        """The rows that it says, until it ends or says nothing for `silence` seconds."""
        while True:
            try:
                line = self._lines.get(timeout=silence)
            except queue.Empty:
                self.end()
                self.ending = f"nothing for {silence:g} s"
                return
            if line is None:
                self.code = self._process.wait()
                self.ending = f"exit code {self.code}"
                return
            if line.startswith('{"row"'):
                yield line

    def end(self) -> None:
        """End it, whatever it does."""
        _end(self._process)


def _start(
    command: Sequence[str], output: int, errors: int | None, environment: Mapping[str, str] | None
) -> subprocess.Popen[str]:
    # A group of its own, to be ended with its children; not a session, which would outlive the run where that is ended.
    group: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
    return subprocess.Popen(
        command,
        cwd=CHECKOUT if (CHECKOUT / "tests").is_dir() else None,
        env={**os.environ, "FLATQ_CACHE_DIR": str(cache_dir().parent.resolve()), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        encoding="utf-8",
        errors="replace",
        **group,
    )


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; one that has ended may have left others."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", module, *arguments]
