"""lm-eval tasks, asked by the harness itself (`lm_eval.simple_evaluate`), and what it made of the answers, question by
question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flatq_cli.errors import FlatqError, UsageError, WorkError, out_of_memory
from flatq_cli.evaluation.aggregate import (
    BOOTSTRAP,
    Figures,
    aggregate,
    aggregation_name,
    group_evidence,
    metric_name,
    own_aggregations,
    plain_figures,
)
from flatq_cli.evaluation.evidence import GroupEvidence, TaskEvidence
from flatq_cli.evaluation.harness import TaskSet, one_line
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.shard import WHOLE
from flatq_cli.evaluation.silence import quiet

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from flatq_cli.evaluation.answering import AnsweringLM

Sample = dict[str, Any]
"""What the harness logs of a question: document, prompts, answers and the value of each metric."""


@dataclass(frozen=True)
class TaskResults:
    """What came of tasks.

    Attributes:
        figures: for each task and group its metrics as the harness names them, without the filter's name where that is
            "none": `acc`, `acc_stderr`; but `exact_match,strict-match`. Of a shard: over its own questions.
        evidence: by task, what they are made of. groups: by group, what its figures are made of.
    """

    figures: Figures
    evidence: dict[str, TaskEvidence] = field(default_factory=dict)
    groups: dict[str, GroupEvidence] = field(default_factory=dict)


def run_tasks(
    tasks: TaskSet,
    model: AnsweringLM,
    *,
    limit: int | None = None,
    prompting: Prompting = Prompting(),
    log_sample: Callable[[str, Sample], None] | None = None,
) -> TaskResults:
    """Ask a model the questions of tasks.

    Args:
        tasks: from `load_tasks`. model: who answers; its shard decides which questions.
        limit: questions of each task.
        log_sample: gets the name of the task and what the harness logs, for each question and filter.
    Raises:
        UsageError: a chat template is asked for that the tokenizer does not have; a shard of a task whose figures
            cannot be joined.
        WorkError: the harness failed while asking.
    """
    single = tasks.single()
    _check(prompting, model, list(single.values()))
    results = _evaluate(tasks, model, limit, prompting)
    samples = {
        name: [sample for sample in logged if sample["doc_id"] in model.shard]
        for name, logged in results["samples"].items()
    }
    if log_sample is not None:
        for name, logged in samples.items():
            for sample in logged:
                log_sample(name, sample)
    evidence = {
        name: _evidence(task, samples[name], results["n-shot"].get(name), results["n-samples"][name]["original"])
        for name, task in single.items()
    }
    groups = {name: group_evidence(group) for name, group in tasks.groups().items()}
    if model.shard != WHOLE:
        return TaskResults(aggregate(evidence, groups, of_a_part=True), evidence, groups)
    figures = {name: plain_figures(values) for name, values in results["results"].items()}
    return TaskResults(figures, evidence, groups)


def _check(prompting: Prompting, model: AnsweringLM, tasks: Sequence[Task]) -> None:
    if prompting.chat_template and not model.tokenizer.chat_template:
        raise UsageError("--apply-chat-template: the model's tokenizer has no chat template; leave it out")
    if model.shard != WHOLE and (own := own_aggregations(tasks)):
        raise UsageError(
            f"--shard: the figures of '{own[0]}' are made by a function of its own and cannot be joined; ask it whole"
        )


def _evaluate(tasks: TaskSet, model: AnsweringLM, limit: int | None, prompting: Prompting) -> dict[str, Any]:
    """What the harness returns; its errors in one line."""
    from lm_eval import simple_evaluate

    multiturn = prompting.fewshot_as_multiturn
    with quiet():
        try:
            results: dict[str, Any] | None = simple_evaluate(
                model=model,
                tasks=list(tasks.tasks),
                task_manager=tasks.manager,
                num_fewshot=prompting.num_fewshot,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
                apply_chat_template=prompting.chat_template,
                system_instruction=prompting.system_instruction,
                fewshot_as_multiturn=True if multiturn is None else multiturn,
            )
        except FlatqError:
            raise
        except Exception as error:  # any of thousands of tasks, each with code of its own
            if out_of_memory(error):
                raise  # the command line knows what to lower
            raise WorkError(f"lm-eval failed while asking: {one_line(error)}") from error
    assert results is not None  # None is what the other ranks of a distributed run get
    return results


def _evidence(task: Task, samples: Sequence[Sample], num_fewshot: int | None, questions: int) -> TaskEvidence:
    """What the harness logged of a task's questions, as plain data."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    others: dict[str, dict[int, Any]] = defaultdict(dict)
    better: dict[str, bool | None] = {}
    aggregations: dict[str, str | None] = {}
    hashes: dict[int, str] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = metric_name(metric, sample["filter"])
            value = _plain(sample[metric])
            is_number = isinstance(value, int | float)
            (values if is_number else others)[name][sample["doc_id"]] = value
            better[name] = task.higher_is_better().get(metric)
            aggregations[name] = aggregation_name(task, metric)
        hashes[sample["doc_id"]] = "".join(sample[part] for part in ("doc_hash", "prompt_hash", "target_hash"))
    return TaskEvidence(
        values=dict(values),
        choices=_choices(task, samples),
        higher_is_better=better,
        others=dict(others),
        aggregations=aggregations,
        version=task.VERSION,
        num_fewshot=num_fewshot or 0,
        hashes={
            sample["doc_id"]: sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples
        },
        filters=len({sample["filter"] for sample in samples}) or 1,
        questions=questions,
    )


def _plain(value: Any) -> Any:
    """A metric's value of one question without numpy and torch, of whose numbers the harness's tasks return some."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value


def _choices(task: Task, samples: Iterable[Sample]) -> Mapping[int, int]:
    """How many answers each question has to choose from, where it has any."""
    listed = getattr(task, "doc_to_choice", None)
    if task.OUTPUT_TYPE != "multiple_choice" or listed is None:
        return {}
    return {sample["doc_id"]: len(listed(sample["doc"])) for sample in samples}
