"""What a stage says while it works.

A stage reports through this small protocol and knows nothing of terminals: the command line passes an implementation
that draws bars or prints lines (`cli/console.py`), tests and library users pass `SilentProgress`.

    for block in progress.track(run.pending(blocks), "calibrating"):
        loss = fit(block)
        progress.note(f"loss {loss.before:.4f} → {loss.after:.4f}")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Where a stage's messages and its progress through a sequence go."""

    def log(self, message: str) -> None:
        """Say one line."""

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Yield the items in order, and show how many are done and how long the rest will take. May be nested."""

    def note(self, text: str) -> None:
        """Add to what is shown of the item in work (of the innermost `track`), such as its loss before and after."""


class SilentProgress:
    """A `Progress` that shows nothing."""

    def log(self, message: str) -> None: ...

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None: ...
