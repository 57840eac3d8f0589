"""lm-eval tasks, run by the harness itself (`lm_eval.simple_evaluate`) on a model that is already loaded.

Three kinds of task: any that lm-eval knows by name (its questions come from the Hugging Face hub), four of them on the
files of a folder (`evaluation/local_tasks.py`), and `lastword:TEXT`: last-word prediction on any text
(`configs/tasks/lastword.yaml`, `evaluation/lastword.py`). The last two need no network. Other YAML tasks in
`configs/tasks/` are found by name too. A task's questions are loaded before the model is asked anything, so that a
wrong name or a missing network shows in seconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import yaml

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.validation import nearest
from flatq_cli.errors import UsageError, WorkError
from flatq_cli.evaluation.lastword import MIN_WORDS, passages
from flatq_cli.evaluation.local_tasks import Questions, read_questions, task_file

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flatq_cli.data.texts import Text
    from flatq_cli.store.progress import Progress

LASTWORD = "lastword"
_PREFIX = f"{LASTWORD}:"

_BOOTSTRAP = 100
"""Resamples for the standard error of a metric that has no closed form (perplexity): right to 7 %, in no time."""

_SLICE = 64
"""Batches between two steps of the progress bar; the harness sorts and batches questions inside a slice."""

_PROBE_SECONDS = 3.0
"""How long to wait for the hub's first answer before going on with what is cached."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks with their questions, ready to be asked, any number of times: from `load_tasks` for `run_tasks`.

    Attributes:
        data: the questions that were read from a folder, by the names of their tasks.
    """

    tasks: tuple[Task | Group, ...]
    manager: TaskManager
    data: Mapping[str, Questions] = field(default_factory=dict)


def load_tasks(names: Sequence[str], read_text: Callable[[str], Text], data_dir: Path | None = None) -> TaskSet:
    """Find tasks and load their questions.

    Args:
        names: names of lm-eval tasks, groups or tags, and `lastword:TEXT`.
        read_text: reads the TEXT of a last-word task (`data.texts.load_text`).
        data_dir: the folder with the questions of all tasks but last-word ones; None: the hub has them.
    Raises:
        UsageError: a task that does not exist (with the nearest name), runs code that a model wrote, needs a package
            that is not installed, or whose questions cannot be had; a text that holds no passage for `lastword`.
    """
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(names))
    data = {} if data_dir is None else local_questions(names, data_dir)
    local = all(name in data or _is_lastword(name) for name in names)
    with _quiet():
        # Reading the harness's 14,000 tasks takes seconds, and local tasks need none of them.
        manager = TaskManager(include_path=str(configs_dir() / "tasks"), include_defaults=not local)
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


def run_tasks(
    tasks: TaskSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    *,
    batch: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Ask a model the questions of tasks.

    Args:
        tasks: from `load_tasks`.
        model: a loaded causal language model; it stays on its device and in its dtype.
        batch: questions in a forward pass. limit: questions of each task.
        num_fewshot: examples before a question, where the task does not fix their number itself.
    Returns:
        For each task and group, its metrics as the harness names them, without the filter's name where that is "none":
        `acc`, `acc_stderr`; but `exact_match,strict-match`.
    Raises:
        WorkError: the harness failed while asking.
    """
    import torch
    from lm_eval import simple_evaluate

    from flatq_cli.evaluation.scoring import SharingLM

    with _quiet():
        # Log-softmax in float32: a bfloat16 near -4 is a multiple of 1/64, coarser than what quantization changes.
        lm = SharingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")
        for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, method, _tracked(getattr(lm, method), progress, _SLICE * batch))
        try:
            results = simple_evaluate(
                model=lm,
                tasks=list(tasks.tasks),
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # any of thousands of tasks, each with code of its own
            raise WorkError(f"lm-eval failed while asking: {_one_line(error)}") from error
    assert results is not None  # None is what the other ranks of a distributed run get
    return {name: _metrics(values) for name, values in results["results"].items()}


def _tracked(ask: Callable[..., list[Any]], progress: Progress, size: int) -> Callable[..., list[Any]]:
    """One of the harness's request methods, asked slice by slice so that `progress` sees it."""

    def ask_in_slices(requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        slices = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [answer for part in progress.track(slices, "lm-eval: questions") for answer in ask(part, disable_tqdm)]

    return ask_in_slices


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a result; the harness mixes them with its names and with "N/A"."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and "," in key}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


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
    """Results are kept by name; two texts of one name would overwrite each other."""
    names = [task.task_name for task in tasks if hasattr(task, "task_name")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--tasks: two tasks are called '{twice}'; leave one out, or give its text another file name")


def _named_tasks(name: str, manager: TaskManager) -> list[Task | Group]:
    """A task, a group, or the tasks of a tag, with their questions."""
    try:
        loaded = manager.load([name])
    except ModuleNotFoundError as error:
        raise UsageError(f"--tasks: '{name}' needs the Python package '{error.name}'; pip install it") from error
    except Exception as error:  # data sets, their scripts and their hosts fail in every way there is
        raise UsageError(
            f"--tasks: the questions of '{name}' could not be loaded: {_one_line(error)}; they come from "
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
        raise UsageError(f"{questions.file}: lm-eval cannot ask its first question: {_one_line(error)}") from error


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness to errors: no bars of its own, no warnings about how it was called, nothing on stdout.

    It has no switch for its bars, and prints to stdout, which carries results alone.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    start = tqdm.__init__

    def start_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with (
            mock.patch.object(tqdm, "__init__", start_disabled),
            # The bootstrap would fork the process, model and all, once for each core.
            mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}),
            contextlib.redirect_stdout(io.StringIO()),
            # It asks git, pip and nvidia-smi about the machine, aloud; flatq records versions itself.
            mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
            mock.patch("lm_eval.evaluator.add_env_info", return_value=None),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
