"""Where output goes: results to stdout, progress and logs to stderr.

On a terminal, progress is a bar for each `track`; elsewhere it is plain lines, one for each item that has something to
say and not more than one every few seconds for the rest. Colour and bars are for terminals only; `NO_COLOR` is heeded.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from flatq_cli.store.progress import Progress, SilentProgress

T = TypeVar("T")

_PLAIN_WIDTH = 500
"""Off a terminal a table is as wide as it needs to be, and nothing is wrapped or cut."""

_SECONDS_BETWEEN_LINES = 5.0


def console_for(stream: TextIO) -> Console:
    """A console that prints text as it is (no markup), plain and unwrapped where `stream` is not a terminal."""
    terminal = is_terminal(stream)
    return Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else _PLAIN_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is looking, at something that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def log(message: str) -> None:
    """Print one line to stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def open_progress(quiet: bool) -> Iterator[Progress]:
    """The progress that fits stderr; bars are gone when the block ends, however it ends."""
    terminal = is_terminal(sys.stderr)
    _hush_libraries(bars=terminal and not quiet)
    if quiet:
        yield SilentProgress()
    elif terminal:
        with BarProgress(console_for(sys.stderr)) as progress:
            yield progress
    else:
        yield LineProgress(log)


class BarProgress:
    """Rich bars: what is worked on, items done, time gone and left, and the last note."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=3600,  # a block may take minutes; rich forgets after 30 s otherwise
        )
        self._stack: list[TaskID] = []

    def __enter__(self) -> BarProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def log(self, message: str) -> None:
        self._bars.console.print(message)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        task = self._bars.add_task(description, total=len(items), note="")
        self._stack.append(task)
        self._bars.start()
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._stack.remove(task)
            if not self._stack:
                self._bars.stop()  # leaves the finished bar on the screen
            self._bars.remove_task(task)

    def note(self, text: str) -> None:
        if self._stack:
            self._bars.update(self._stack[-1], note=text)


class LineProgress:
    """Plain lines: `calibrate 3/30  loss 0.0123 → 0.0045  2m10s left`."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._notes: list[str] = []

    def log(self, message: str) -> None:
        self._write(message)

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        total, depth = len(items), len(self._notes)
        started = written = self._clock()
        self._notes.append("")
        try:
            for done, item in enumerate(items, start=1):
                self._notes[depth] = ""
                yield item
                now, note = self._clock(), self._notes[depth]
                if note or done == total or now - written >= _SECONDS_BETWEEN_LINES:
                    left = (now - started) / done * (total - done)
                    parts = [f"{description} {done}/{total}", note, f"{duration(left)} left" if done < total else ""]
                    self._write("  ".join(part for part in parts if part))
                    written = now
        finally:
            del self._notes[depth:]

    def note(self, text: str) -> None:
        if self._notes:
            self._notes[-1] = text


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `45s`, `2m10s`, `3h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _hush_libraries(bars: bool) -> None:
    """Keep the libraries' chatter off stderr; a user's own setting of a variable wins. Call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
