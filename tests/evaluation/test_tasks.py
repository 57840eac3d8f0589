from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flatq_cli.data.texts import load_text
from flatq_cli.errors import UsageError, WorkError
from flatq_cli.evaluation.aggregate import aggregate, plain_figures
from flatq_cli.evaluation.harness import TaskSet, load_tasks
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.scoring import SharingLM
from flatq_cli.evaluation.shard import Shard
from flatq_cli.evaluation.silence import quiet
from tests.evaluation.asking import ask
from tests.evaluation.local_data import TASKS, local_rows, write_mirror
from tests.evaluation.own_tasks import COUNT, GROUP, NAMES, write_own_tasks


def no_text(spec: str) -> Any:
    raise AssertionError(spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture
def own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TaskSet:
    """All tasks of the folder, without those of the harness, which take seconds to list."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: TaskManager(**{**options, "include_defaults": False})
    )
    return load_tasks(NAMES, no_text, include_path=folder)


def of_the_harness(tiny: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval alone says of the same files."""
    with quiet():
        results = simple_evaluate(
            model=HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, softmax_dtype="float32"),
            tasks=list(NAMES),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=100,
            **options,
        )
    assert results is not None
    return results


@pytest.mark.parametrize(
    ("prompting", "options"),
    [
        (Prompting(), {}),
        (Prompting(num_fewshot=1), {"num_fewshot": 1}),
        (Prompting(chat_template=True), {"apply_chat_template": True}),
        (
            Prompting(2, True, "Be brief.", False),
            {
                "num_fewshot": 2,
                "apply_chat_template": True,
                "system_instruction": "Be brief.",
                "fewshot_as_multiturn": False,
            },
        ),
    ],
    ids=["plain", "few-shot", "chat", "chat with a system instruction in one turn"],
)
def test_every_kind_of_task_has_the_figures_and_hashes_that_lm_eval_gives_it(tiny, own, folder, prompting, options):
    found = ask(own, tiny, prompting=prompting)
    wanted = of_the_harness(tiny, folder, **options)
    figures = {name: plain_figures(values) for name, values in wanted["results"].items()}
    assert found.figures.keys() == figures.keys()
    for name, values in figures.items():
        assert found.figures[name] == pytest.approx(values, rel=1e-5, nan_ok=True), name
    for name, evidence in found.evidence.items():
        samples = wanted["samples"][name]
        hashed = {
            sample["doc_id"]: sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples
        }
        assert evidence.hashes == hashed
        assert (evidence.num_fewshot, evidence.version) == (wanted["n-shot"][name], wanted["versions"][name])


def test_evidence_has_every_question_by_its_number(tiny, own):
    evidence = ask(own, tiny).evidence
    choice = evidence["own_choice"]
    assert list(choice.values["acc"]) == list(range(COUNT))
    assert set(choice.values["acc"].values()) <= {0, 1}
    assert choice.choices == dict.fromkeys(range(COUNT), 4)
    assert choice.higher_is_better == {"acc": True, "acc_norm": True, "acc_mutual_info": True}
    assert set(choice.aggregations.values()) == {"mean"}
    assert (choice.n, choice.questions, choice.version) == (COUNT, COUNT, 2.0)
    generated = evidence["own_generate"]
    assert generated.values.keys() == {"exact_match,strict", "exact_match,loose"}
    assert (generated.choices, generated.filters) == ({}, 2)
    assert evidence["own_rolling"].values == {}
    assert all(len(pair) == 2 for pair in evidence["own_rolling"].others["word_perplexity"].values())
    assert evidence["own_rolling"].higher_is_better == {"word_perplexity": False}


def test_the_figures_are_the_aggregates_of_the_evidence_bit_for_bit(tiny, own):
    """Of every kind of metric: a mean, a bootstrap, pairs of numbers, filters, and groups by both weights."""
    found = ask(own, tiny)
    assert found.groups.keys() == {GROUP}
    again = aggregate(found.evidence, found.groups)
    assert again.keys() == found.figures.keys()
    for name, figures in found.figures.items():
        assert again[name] == pytest.approx(figures, rel=0, abs=0, nan_ok=True), name


def test_the_questions_of_a_shard_have_the_values_that_they_have_among_all(tiny, own):
    """Drawn examples included: a shard draws those of the whole."""
    whole, of = ask(own, tiny).evidence, 3
    parts = [ask(own, tiny, shard=Shard(part, of)).evidence for part in range(1, of + 1)]
    for name, evidence in whole.items():
        for kind in ("values", "others"):
            for metric, values in getattr(evidence, kind).items():
                joined = [getattr(part[name], kind).get(metric, {}) for part in parts]
                assert {number: value for values in joined for number, value in values.items()} == values
                assert all(number % of == place for place, values in enumerate(joined) for number in values)


def test_a_shard_without_questions_of_a_task_has_no_figures_of_it(tiny, own):
    found = ask(own, tiny, shard=Shard(15, 20))
    assert set(map(len, found.figures.values())) == {0}
    assert found.evidence["own_choice"].n == 0


def test_samples_are_logged_with_prompts_answers_and_values(tiny, own):
    logged: list[tuple[str, dict[str, Any]]] = []
    ask(own, tiny, log_sample=lambda task, sample: logged.append((task, sample)), shard=Shard(1, 2))
    of_choice = [sample for task, sample in logged if task == "own_choice"]
    assert [sample["doc_id"] for sample in of_choice] == list(range(0, COUNT, 2))
    assert {"doc", "target", "arguments", "resps", "filtered_resps", "acc", "prompt_hash"} <= of_choice[0].keys()
    assert of_choice[0]["arguments"][0][0].startswith("Question: ")


def test_limit_takes_the_first_questions_of_each_task(tiny, own):
    evidence = ask(own, tiny, limit=4).evidence
    assert {task.n for task in evidence.values()} == {4}
    assert evidence["own_choice"].questions == COUNT


def test_a_tokenizer_without_a_chat_template_is_refused(tiny, own, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="--apply-chat-template: the model's tokenizer has no chat template"):
        ask(own, tiny, prompting=Prompting(chat_template=True))


def test_a_task_with_an_aggregation_of_its_own_is_not_sharded(tiny, own, monkeypatch: pytest.MonkeyPatch):
    task = own.single()["own_choice"]
    monkeypatch.setitem(task._aggregation_list, "acc", lambda items: sum(items))
    with pytest.raises(UsageError, match="--shard: the figures of 'own_choice' are made by a function of its own"):
        ask(own, tiny, shard=Shard(1, 2))
    found = ask(own, tiny)
    assert found.figures["own_choice"]["acc"] == sum(found.evidence["own_choice"].values["acc"].values())


def test_a_task_alone_and_in_a_group_is_refused(own, folder: Path):
    with pytest.raises(UsageError, match="two tasks are called 'own_shots'; leave one out"):
        load_tasks([GROUP, "own_shots"], no_text, include_path=folder)


def test_a_folder_of_tasks_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--include-path .*nowhere: there is no such folder"):
        load_tasks(["piqa"], no_text, include_path=tmp_path / "nowhere")


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(SharingLM, "_score", fail)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_does_not_suffice_inside_lm_eval_is_no_failure_of_lm_eval(tiny, tmp_path, monkeypatch, error):
    mirror = write_mirror(tmp_path, {"piqa": local_rows("piqa")})
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        ask(load_tasks(["piqa"], no_text, mirror), tiny)
    assert caught.value is error


def test_another_error_inside_lm_eval_is_one_line(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mirror = write_mirror(tmp_path, {task: local_rows(task) for task in TASKS})
    failing(monkeypatch, ValueError("two\nlines"))
    with pytest.raises(WorkError, match=r"^lm-eval failed while asking: two lines$"):
        ask(load_tasks(TASKS, no_text, mirror), tiny)


def test_last_words_are_log_likelihoods_that_their_perplexity_is_made_of(tiny):
    found = ask(load_tasks([f"lastword:{tiny.text}"], load_text), tiny)
    (evidence,) = found.evidence.values()
    assert evidence.aggregations == {"perplexity": "perplexity", "acc": "mean"}
    assert evidence.higher_is_better == {"perplexity": False, "acc": True}
    assert all(value < 0 for value in evidence.values["perplexity"].values())
