"""What figures are made of: the loss of every window of a text, the value of every question of a task.

A figure alone can be printed. What it is made of can be compared pair by pair with that of another model, judged
against its noise, and joined with the evidence of another part of the same evaluation. All of it is plain data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WindowEvidence:
    """The windows of a text.

    Attributes:
        indices: of the windows in the text, ascending; 0, 1, 2, … but for a shard.
        losses: of each window the mean of -log p(next token), in nats; not finite where the model is broken.
        tokens: tokens read, windows · seqlen. seqlen: tokens in a window.
    """

    indices: tuple[int, ...]
    losses: tuple[float, ...]
    tokens: int
    seqlen: int


@dataclass(frozen=True)
class PairEvidence:
    """Two models on the same windows, in the order of their `WindowEvidence`: what the baseline says, and the target.

    Attributes:
        kl: of each window the mean over its positions of KL(baseline ‖ target) of the next token, in nats.
        agreement: of each window the share of its positions where both find the same token the likeliest.
    """

    kl: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class TaskEvidence:
    """The questions of a task.

    Attributes:
        values: by metric (as in the result: `acc`; `exact_match,strict-match`) and the question's number in the task,
            what the harness aggregates: 0 or 1 for `acc`; for a `perplexity` the log-likelihood in nats.
        others: the same of metrics whose values are no numbers but pairs or texts (`word_perplexity`, `bleu`).
        choices: how many answers a question has; of multiple-choice tasks alone.
        higher_is_better: by metric; None where the harness does not know.
        aggregations: by metric, the name of the function that makes the figure from `values` ("mean"); None for a
            function of the task's own.
        version: of the task, as its author counts. num_fewshot: examples before each question.
        hashes: by question, what lm-eval hashes for `task_hashes`: its document, its prompt and its answer.
        filters: how many filters the harness passes answers through; each hashes the questions once more.
        questions: how many the task has, asked or not.
    """

    values: Mapping[str, Mapping[int, float]]
    choices: Mapping[int, int] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool | None] = field(default_factory=dict)
    others: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    aggregations: Mapping[str, str | None] = field(default_factory=dict)
    version: str | float | None = None
    num_fewshot: int = 0
    hashes: Mapping[int, str] = field(default_factory=dict)
    filters: int = 1
    questions: int = 0

    @property
    def hash(self) -> str:
        """What lm-eval's own result files call the task's hash: it differs where documents, prompts or answers do."""
        return hashlib.sha256("".join(list(self.hashes.values()) * self.filters).encode()).hexdigest()

    @property
    def n(self) -> int:
        """Questions asked, as the harness counts them: of a metric that some lack, those of the others."""
        return max((len(values) for values in (*self.values.values(), *self.others.values())), default=0)


@dataclass(frozen=True)
class GroupEvidence:
    """A group of tasks, whose figures the harness makes of those of its tasks.

    Attributes:
        tasks: the names of all tasks below it. metrics: what is made of them, as in the harness's `AggMetricConfig`.
    """

    tasks: tuple[str, ...]
    metrics: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the figures of one model are made of.

    Attributes:
        windows: by text. pairs: by text, against the baseline; empty without one, and for the baseline itself.
        tasks: by task. groups: by group of tasks.
        settings: what decides the figures, by name: equal in all shards of one evaluation.
    """

    windows: Mapping[str, WindowEvidence] = field(default_factory=dict)
    pairs: Mapping[str, PairEvidence] = field(default_factory=dict)
    tasks: Mapping[str, TaskEvidence] = field(default_factory=dict)
    groups: Mapping[str, GroupEvidence] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
