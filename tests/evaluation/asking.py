"""Tasks asked of a tiny model, and what came of them."""

from __future__ import annotations

from typing import Any

from flatq_cli.evaluation.answering import AnsweringLM
from flatq_cli.evaluation.answers import Answers
from flatq_cli.evaluation.harness import TaskSet
from flatq_cli.evaluation.shard import WHOLE, Shard
from flatq_cli.evaluation.tasks import TaskResults, run_tasks
from flatq_cli.store.progress import SilentProgress

NOT_KEPT = Answers(None, "", print)


def answering(tiny: Any, batch: Any = 1, shard: Shard = WHOLE, answers: Answers = NOT_KEPT) -> AnsweringLM:
    """The tiny model as the harness sees it."""
    return AnsweringLM(lambda: tiny.model, tiny.tokenizer, answers, SilentProgress(), batch, shard)


def ask(
    tasks: TaskSet,
    tiny: Any,
    batch: Any = 1,
    shard: Shard = WHOLE,
    answers: Answers = NOT_KEPT,
    lm: AnsweringLM | None = None,
    **options: Any,
) -> TaskResults:
    """What `run_tasks` gives of a model (`lm`, or the tiny one); `options` are its own."""
    return run_tasks(tasks, lm or answering(tiny, batch, shard, answers), **options)
