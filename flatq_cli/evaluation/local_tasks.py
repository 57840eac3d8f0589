"""lm-eval tasks whose questions lie in a folder of JSON lines: `flatq eval --data-dir DIR`, which needs no network.

`configs/tasks/local/TASK.yaml` is the harness's own task (prompts, delimiter, metrics) on the fields of such a file.
What is here finds the file of a task, checks every line of it, and says what is wrong in one line; it needs neither
torch nor the harness, so that a command can look at the questions before it works for an hour. The questions that are
checked here are those that are asked: the harness gets them from memory (`evaluation/harness.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.validation import nearest
from flatq_cli.errors import UsageError


@dataclass(frozen=True)
class _Fields:
    """The fields of a task's lines: texts, a list of choices, and the number of the right choice.

    Attributes:
        filled: texts that must not be empty. prefix: what the first text begins with, as the task's prompt has it.
    """

    texts: tuple[str, ...]
    choices: str
    answer: str
    filled: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.texts, self.choices, self.answer)


_QUESTION = _Fields(("query",), "choices", "gold", prefix="Question: ")
_FIELDS = {
    "arc_easy": _QUESTION,
    "piqa": _QUESTION,
    "winogrande": _Fields(("continuation",), "context_options", "gold", filled=("continuation",)),
    "hellaswag": _Fields(("activity_label", "ctx_a", "ctx_b"), "endings", "label"),
}
LOCAL_TASKS = tuple(_FIELDS)


@dataclass(frozen=True)
class Questions:
    """The questions of one task.

    Attributes:
        task: its name, one of `LOCAL_TASKS`. file: where they were read. sha256: of that file's bytes.
        rows: for each question the fields that the task reads, and no other.
    """

    task: str
    file: Path
    sha256: str
    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """What a result says about them."""
        return {"file": str(self.file), "sha256": self.sha256, "questions": len(self.rows)}


def task_file(task: str) -> Path:
    """The lm-eval YAML of a local task: all of it but its name and the place of its questions."""
    return configs_dir() / "tasks" / "local" / f"{task}.yaml"


def read_questions(tasks: Sequence[str], folder: Path) -> list[Questions]:
    """Read the questions of tasks from `TASK.jsonl` or `TASK_….jsonl` in a folder.

    Raises:
        UsageError: a task that is not one of `LOCAL_TASKS`; no folder, no file or several; a file that cannot be read
            or holds no question; a line that is not JSON, lacks a field or has a wrong one (named with file and line).
    """
    for task in tasks:
        if task not in _FIELDS:
            raise UsageError(
                f"--data-dir has no task '{task}'{nearest(task, LOCAL_TASKS)}; it knows {', '.join(LOCAL_TASKS)}"
            )
    if not folder.is_dir():
        raise UsageError(f"--data-dir {folder}: there is no such folder")
    return [_read(task, _find(task, folder)) for task in tasks]


def _find(task: str, folder: Path) -> Path:
    exact = folder / f"{task}.jsonl"
    found = [exact] if exact.exists() else sorted(folder.glob(f"{task}_*.jsonl"))
    if not found:
        raise UsageError(f"--data-dir {folder}: there is neither {task}.jsonl nor {task}_….jsonl for the task '{task}'")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UsageError(f"--data-dir {folder}: several files for the task '{task}': {names}; call one {task}.jsonl")
    return found[0]


def _read(task: str, file: Path) -> Questions:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    # Not str.splitlines: a JSON string may hold U+2028 and its like, which that takes for ends of lines.
    lines = enumerate(content.split(b"\n"), 1)
    rows = tuple(_row(task, line, f"{file}:{number}") for number, line in lines if line.strip())
    if not rows:
        raise UsageError(f"{file}: holds no questions")
    return Questions(task, file, hashlib.sha256(content).hexdigest(), rows)


def _row(task: str, line: bytes, where: str) -> dict[str, Any]:
    """The fields of one line, checked; `where` begins the errors."""
    fields = _FIELDS[task]
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where}: not a JSON object with {', '.join(fields.names)}")
    missing = next((name for name in fields.names if name not in data), None)
    if missing is not None:
        raise UsageError(f"{where}: no field '{missing}'; a question of {task} has {', '.join(fields.names)}")
    for name in fields.texts:
        _check_text(data[name], name, where, filled=name in fields.filled)
    if not data[fields.texts[0]].startswith(fields.prefix):
        raise UsageError(
            f"{where}: '{fields.texts[0]}' does not begin with '{fields.prefix}', as the prompt of {task} does"
        )
    choices = data[fields.choices]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UsageError(f"{where}: '{fields.choices}' is not a list of two texts or more")
    for index, choice in enumerate(choices):
        _check_text(choice, f"{fields.choices}[{index}]", where, filled=True)
    return {name: data[name] for name in fields.names} | {
        fields.answer: _answer(data[fields.answer], len(choices), f"{where}: '{fields.answer}'")
    }


def _check_text(value: Any, name: str, where: str, filled: bool) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{where}: '{name}' is not a text")
    if filled and not value.strip():
        raise UsageError(f"{where}: '{name}' is empty")


def _answer(value: Any, choices: int, what: str) -> int:
    """The number of the right choice; the hub's HellaSwag writes it as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < choices:
        raise UsageError(f"{what} is {json.dumps(value)}, not the number of a choice, 0 to {choices - 1}")
    return number
