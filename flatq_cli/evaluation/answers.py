"""Answers kept: what a model said to a question is looked up before the model is asked again.

One SQLite file holds answers by the SHA-256 of everything that decides them: who is asked (`evaluation/identity.py`),
what kind of question it is, and the question itself. So an evaluation that was killed goes on where it was, another
limit or another task asks only what is new, and nothing has to be cleared when a model, a package or flatq changes.

Keeping answers must never be what an evaluation fails of: where the file cannot be read or written, that is said once,
and the questions are asked. A damaged file is moved aside.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

NAME = "answers.sqlite"
LAYOUT = 1
"""Of the file's table, as its `user_version`; a file of another layout is moved aside."""

_WAIT_SECONDS = 60.0
"""How long to wait for another process that is writing."""

_AT_ONCE = 500
"""Keys in one SELECT; SQLite allows 999 variables in old builds."""


class Answers:
    """The kept answers of one model; safe to use from several processes at once.

    Every `keep` is a transaction of its own, on the disk when it returns: a process may be killed at any time.
    """

    def __init__(self, file: Path | None, identity: str, warn: Callable[[str], None]) -> None:
        """Use the answers in `file` (made with its folder where it is missing; None: nothing is kept).

        Args:
            identity: of the model and of what else decides its answers, in any form.
            warn: is told, in one line, of a file that is damaged or cannot be used.
        """
        self.identity = identity
        self._file = file
        self._warn = warn
        self._store: sqlite3.Connection | None = None
        if file is not None:
            self._attempt(partial(self._open, file))

    def find(self, kind: str, questions: Sequence[Any]) -> dict[int, Any]:
        """The kept answers to questions of one kind, by their places in `questions`; None is never asked for.

        Args:
            kind: what is asked, such as "loglikelihood".
            questions: values that JSON can hold; None for a question whose answer is not to be kept.
        """
        places: dict[bytes, list[int]] = {}
        for place, question in enumerate(questions):
            if question is not None:
                places.setdefault(self._key(kind, question), []).append(place)
        found: dict[int, Any] = {}
        keys = list(places)
        for start in range(0, len(keys), _AT_ONCE):
            for key, answer in self._attempt(partial(self._select, keys[start : start + _AT_ONCE])) or []:
                found.update(dict.fromkeys(places[key], answer))
        return found

    def keep(self, kind: str, answers: Iterable[tuple[Any, Any]]) -> None:
        """Keep (question, answer) pairs of one kind; both are values that JSON can hold, answers with NaN too."""
        rows = [(self._key(kind, question), json.dumps(answer)) for question, answer in answers if question is not None]
        if rows:
            self._attempt(partial(self._insert, rows))

    def close(self) -> None:
        """Let go of the file."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _key(self, kind: str, question: Any) -> bytes:
        text = json.dumps([self.identity, kind, question], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()

    def _open(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._store = sqlite3.connect(file, timeout=_WAIT_SECONDS)
        layout = self._store.execute("PRAGMA user_version").fetchone()[0]
        if layout not in (0, LAYOUT):
            raise sqlite3.DatabaseError(f"its layout is {layout}, this flatq reads {LAYOUT}")
        if layout == LAYOUT:  # nothing to write: others may be reading, and this user may not be allowed to
            return
        with self._store:
            self._store.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
            self._store.execute(f"PRAGMA user_version = {LAYOUT}")

    def _select(self, keys: Sequence[bytes]) -> list[tuple[bytes, Any]]:
        if self._store is None:
            return []
        marks = ",".join("?" * len(keys))
        rows = self._store.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", keys)
        try:
            return [(key, json.loads(answer)) for key, answer in rows]
        except (ValueError, TypeError) as error:  # SQLite has no checksums: what was overwritten may show here
            raise sqlite3.DatabaseError(f"an answer is not JSON: {error}") from error

    def _insert(self, rows: Sequence[tuple[bytes, str]]) -> None:
        if self._store is None:
            return
        with self._store:
            self._store.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Use the file; None where that fails: a damaged one is replaced, any other problem ends keeping."""
        try:
            return action()
        except (sqlite3.Error, OSError) as error:
            self.close()
            # The subclasses of DatabaseError are for what is wrong around the file: it is locked, or the disk is full.
            if type(error) is sqlite3.DatabaseError and self._file is not None and self._move_aside(error):
                self._attempt(partial(self._open, self._file))
                return self._attempt(action)
            self._warn(f"answers are not kept: {self._file}: {error}")
        return None

    def _move_aside(self, error: Exception) -> bool:
        """Rename a damaged file, and say so."""
        assert self._file is not None
        taken = sum(1 for _ in self._file.parent.glob(f"{self._file.name}.damaged*"))
        aside = self._file.with_name(f"{self._file.name}.damaged{f'-{taken}' if taken else ''}")
        try:
            self._file.rename(aside)
        except OSError:
            return False
        self._warn(f"{self._file} is damaged ({error}); it is now {aside.name}, and its questions are asked again")
        return True
