"""The tasks that lm-eval can ask, found and loaded.

Three kinds of task: any that lm-eval knows by name (its questions come from the Hugging Face hub), four of them on the
files of a folder (`evaluation/local_tasks.py`), and `lastword:TEXT`: last-word prediction on any text
(`configs/tasks/lastword.yaml`, `evaluation/lastword.py`). The last two need no network. Other YAML tasks in
`configs/tasks/`, and those in a folder of the user's own, are found by name too. A task's questions are loaded before
the model is asked anything, so that a wrong name or a missing network shows in seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import yaml

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.validation import nearest
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.lastword import MIN_WORDS, passages
from flatq_cli.evaluation.local_tasks import Questions, read_questions, task_file
from flatq_cli.evaluation.silence import quiet

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from flatq_cli.data.texts import Text

LASTWORD = "lastword"
_PREFIX = f"{LASTWORD}:"

_PROBE_SECONDS = 3.0
"""How long to wait for the hub's first answer before going on with what is cached."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their questions, ready to be asked, any number of times: from `load_tasks` for `run_tasks`.

    Attributes:
        tasks: tasks and groups of tasks. manager: what found them, for the harness.
        data: the questions that were read from a folder, by the names of their tasks.
    """

    tasks: tuple[Task | Group, ...]
    manager: TaskManager
    data: Mapping[str, Questions] = field(default_factory=dict)

    def single(self) -> dict[str, Task]:
        """Every task by its name, those inside groups too."""
        found: dict[str, Task] = {}
        for item in self.tasks:
            inside = item.get_all_tasks() if _is_group(item) else [item]
            found.update({task.task_name: task for task in inside})
        return found

    def groups(self) -> dict[str, Group]:
        """Every group by its name, those inside others before them."""
        found: dict[str, Group] = {}
        for item in self.tasks:
            if _is_group(item):
                found.update({group.name: group for group in reversed([item, *item.get_all_groups()])})
        return found


def load_tasks(
    names: Sequence[str],
    read_text: Callable[[str], Text],
    data_dir: Path | None = None,
    include_path: Path | None = None,
) -> TaskSet:
    """Find tasks and load their questions.

    Args:
        names: names of lm-eval tasks, groups or tags, and `lastword:TEXT`.
        read_text: reads the TEXT of a last-word task (`data.texts.load_text`).
        data_dir: the folder with the questions of all tasks but last-word ones; None: the hub has them.
        include_path: a folder with YAML files of tasks, found before those of the same name elsewhere.
    Raises:
        UsageError: a task that does not exist (with the nearest name), runs code that a model wrote, needs a package
            that is not installed, or whose questions cannot be had; a text that holds no passage for `lastword`; a
            folder that there is not.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(names))
    folders = [str(configs_dir() / "tasks"), *([] if include_path is None else [_task_folder(include_path)])]
    data = {} if data_dir is None else local_questions(names, data_dir)
    local = all(name in data or _is_lastword(name) for name in names)
    with quiet():
        # Reading the harness's 14,000 tasks takes seconds, and local tasks need none of them.
        manager = TaskManager(include_path=folders, include_defaults=not local)
        for name in names:
            if name not in data and not name.startswith(_PREFIX):
                _check_name(name, manager)
        tasks: list[Task | Group] = []
        with contextlib.nullcontext() if local else _offline_unless_reachable():
            for name in names:
                if name in data:
                    tasks.append(_local_task(data[name], manager))
                elif name.startswith(_PREFIX):
                    tasks.append(_lastword_task(name, read_text, manager))
                else:
                    tasks += _named_tasks(name, manager)
    _check_distinct(tasks)
    return TaskSet(tuple(tasks), manager, data)


def local_questions(names: Sequence[str], data_dir: Path) -> dict[str, Questions]:
    """The questions in a folder of all tasks but last-word ones, by their names; imports neither torch nor lm-eval.

    Raises:
        UsageError: as `read_questions`.
    """
    asked = [name for name in dict.fromkeys(names) if not _is_lastword(name)]
    return {questions.task: questions for questions in read_questions(asked, data_dir)}


def _task_folder(folder: Path) -> str:
    if not folder.is_dir():
        raise UsageError(f"--include-path {folder}: there is no such folder")
    return str(folder)


def _is_lastword(name: str) -> bool:
    return name.split(":")[0] == LASTWORD


def _check_name(name: str, manager: TaskManager) -> None:
    if name == LASTWORD:
        raise UsageError(f"--tasks: '{LASTWORD}' needs a text: {_PREFIX}FILE, or {_PREFIX}pydoc")
    if name not in manager.task_index:
        raise UsageError(
            f"--tasks: lm-eval has no task '{name}'{nearest(name, manager.all_tasks)}; `lm-eval ls tasks` lists them, "
            f"and {_PREFIX}FILE makes one from any text"
        )


def _check_distinct(tasks: Sequence[Task | Group]) -> None:
    """Results are kept by name: of two texts of one name, or a task alone and in a group, one would be lost."""
    seen: set[str] = set()
    for item in tasks:
        inside = {task.task_name for task in item.get_all_tasks()} if _is_group(item) else {item.task_name}
        if twice := sorted(seen & inside):
            raise UsageError(
                f"--tasks: two tasks are called '{twice[0]}'; leave one out (one may be in a group), "
                "or give its text another file name"
            )
        seen |= inside


def _is_group(item: Task | Group) -> bool:
    return hasattr(item, "get_all_tasks")


def _named_tasks(name: str, manager: TaskManager) -> list[Task | Group]:
    """A task, a group, or the tasks of a tag, with their questions."""
    try:
        loaded = manager.load([name])
    except ModuleNotFoundError as error:
        raise UsageError(f"--tasks: '{name}' needs the Python package '{error.name}'; pip install it") from error
    except Exception as error:  # data sets, their scripts and their hosts fail in every way there is
        raise UsageError(
            f"--tasks: the questions of '{name}' could not be loaded: {one_line(error)}; they come from "
            f"huggingface.co unless a run before has cached them; {_PREFIX}FILE needs no network"
        ) from error
    unsafe = [task.task_name for task in loaded["tasks"].values() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UsageError(f"--tasks: '{unsafe[0]}' runs code that the model writes; flatq does not do that")
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _lastword_task(name: str, read_text: Callable[[str], Text], manager: TaskManager) -> Task:
    """The last-word task on one text; its results are kept under `lastword:` and the text's name."""
    text = read_text(name.removeprefix(_PREFIX))
    found = passages(text.content)
    if not found:
        raise UsageError(
            f"--tasks: '{name}' holds no passage: {MIN_WORDS} words or a few more that end with a sentence"
        )
    file = configs_dir() / "tasks" / f"{LASTWORD}.yaml"
    return _task_on(f"{_PREFIX}{text.name}", file, [asdict(passage) for passage in found], manager)


def _local_task(questions: Questions, manager: TaskManager) -> Task:
    """A task of the harness on questions from a folder."""
    try:
        return _task_on(questions.task, task_file(questions.task), questions.rows, manager)
    except Exception as error:  # the harness tries its templates on the first question
        raise UsageError(f"{questions.file}: lm-eval cannot ask its first question: {one_line(error)}") from error


def _task_on(name: str, file: Path, rows: Sequence[dict[str, Any]], manager: TaskManager) -> Task:
    """The task of a YAML file on rows in memory: nothing is cached on the disk that could be stale next time."""
    from datasets import Dataset

    questions = Dataset.from_list(list(rows))
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    built = manager.load([{**config, "task": name, "custom_dataset": lambda **_: {"test": questions}}])
    return built["tasks"][name]


@contextlib.contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Go offline where the hub does not answer: what is cached is still found, and what is not fails at once.

    Its client would otherwise try again and again for half a minute.
    """
    import datasets.config
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # whatever it is, the hub cannot be had
        with (
            mock.patch.object(constants, "HF_HUB_OFFLINE", True),
            mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        ):
            yield
    else:
        yield


def one_line(error: BaseException) -> str:
    """What an error of foreign code says, or is, in at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
