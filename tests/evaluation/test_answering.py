from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flatq_cli.data.texts import load_text
from flatq_cli.evaluation.answering import AnsweringLM
from flatq_cli.evaluation.answers import Answers
from flatq_cli.evaluation.harness import load_tasks
from flatq_cli.evaluation.scoring import SharingLM
from flatq_cli.evaluation.shard import Shard
from flatq_cli.store.progress import SilentProgress
from tests.evaluation.asking import answering, ask
from tests.evaluation.local_data import TASKS, local_rows, write_mirror

QUESTIONS = 20


def question(number: int, context: str, *choices: str, task: str = "t") -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, choice), index, (task, number, 1))
        for index, choice in enumerate(choices)
    ]


def questions(count: int = QUESTIONS) -> list[Instance]:
    nouns = ["dog", "cat", "river"]
    return [
        request
        for number in range(count)
        for request in question(number, f"The {nouns[number % 3]} sees {number}", " the old dog.", " the", " a window")
    ]


def generation(number: int, context: str, **settings: Any) -> Instance:
    return Instance(
        "generate_until", {}, (context, {"until": ["."], "max_gen_toks": 4, **settings}), 0, ("t", number, 1)
    )


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "answers.sqlite", "tiny", pytest.fail)


class Reader:
    """Counts what the model is asked, by watching `SharingLM`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[int]] = []
        self.batches: list[int] = []
        real = SharingLM.loglikelihood

        def loglikelihood(lm: SharingLM, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
            self.asked.append([request.doc_id for request in requests])
            self.batches.append(lm.batch_size)
            return real(lm, requests, disable_tqdm)

        monkeypatch.setattr(SharingLM, "loglikelihood", loglikelihood)

    @property
    def questions(self) -> list[int]:
        return [number for part in self.asked for number in dict.fromkeys(part)]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


def no_model() -> Any:
    raise AssertionError("the model was loaded")


def test_answers_are_those_of_the_harness_own_model(tiny):
    theirs = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer).loglikelihood(questions(), disable_tqdm=True)
    ours = answering(tiny).loglikelihood(questions())
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)


def test_what_is_kept_is_answered_without_a_model(tiny, answers: Answers):
    first = answering(tiny, answers=answers).loglikelihood(questions())
    again = AnsweringLM(no_model, tiny.tokenizer, answers, SilentProgress())
    assert again.loglikelihood(questions()) == first
    assert again.generate_until([]) == []


def test_only_new_questions_are_asked_and_each_whole(tiny, answers: Answers, reader: Reader):
    answering(tiny, answers=answers).loglikelihood(questions(5))
    answering(tiny, answers=answers).loglikelihood(questions(12))
    assert reader.questions == [*range(5), *range(5, 12)]
    more = [*questions(1), *question(0, "The dog sees 0", " another", task="u")]
    assert len(answering(tiny, answers=answers).loglikelihood(more)) == 4
    assert [len(part) for part in reader.asked][-1] == 1


def test_at_one_question_a_pass_an_answer_does_not_depend_on_what_else_is_asked(tiny):
    """To the last bit: that is what lets shards join to the figures of a whole."""
    alone = [answering(tiny).loglikelihood(part) for part in _by_question(questions())]
    assert [answer for part in alone for answer in part] == answering(tiny).loglikelihood(questions())


def test_answers_found_in_batches_are_for_batches_and_those_found_alone_for_all(tiny, answers: Answers, reader: Reader):
    alone = answering(tiny).loglikelihood(questions())
    answering(tiny, batch=4, answers=answers).loglikelihood(questions())
    reader.asked.clear()
    assert answering(tiny, answers=answers).loglikelihood(questions()) == alone
    assert reader.questions == list(range(QUESTIONS))
    reader.asked.clear()
    assert answering(tiny, batch="auto", answers=answers).loglikelihood(questions()) == alone
    assert reader.asked == []


def _by_question(requests: Sequence[Instance]) -> list[list[Instance]]:
    return [[request for request in requests if request.doc_id == number] for number in range(QUESTIONS)]


def test_a_killed_evaluation_has_kept_all_slices_before_the_one_in_work(tiny, answers: Answers, monkeypatch):
    asked: list[int] = []
    real = SharingLM.loglikelihood

    def dying(lm: SharingLM, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return real(lm, requests, disable_tqdm)

    whole = answering(tiny).loglikelihood(questions())
    monkeypatch.setattr(SharingLM, "loglikelihood", dying)
    with pytest.raises(KeyboardInterrupt):
        answering(tiny, answers=answers).loglikelihood(questions())
    monkeypatch.setattr(SharingLM, "loglikelihood", real)
    reader = Reader(monkeypatch)
    assert answering(tiny, answers=answers).loglikelihood(questions()) == whole
    assert reader.questions == list(range(16, QUESTIONS))


def test_a_shard_answers_its_own_questions_alone(tiny, reader: Reader):
    whole = answering(tiny).loglikelihood(questions())
    reader.asked.clear()
    part = answering(tiny, shard=Shard(2, 3)).loglikelihood(questions())
    own = [place for place, request in enumerate(questions()) if request.doc_id % 3 == 1]
    assert reader.questions == list(range(1, QUESTIONS, 3))
    assert [part[place] for place in own] == [whole[place] for place in own]


def test_texts_and_generations_are_kept_too_but_not_those_that_are_drawn(tiny, answers: Answers, monkeypatch):
    rolling = [Instance("loglikelihood_rolling", {}, ("The old dog.",), 0, ("t", 0, 1))]
    greedy = [generation(number, f"The dog {number}") for number in range(2)]
    lm = answering(tiny, answers=answers)
    first = (lm.loglikelihood_rolling(rolling), lm.generate_until(greedy))
    assert isinstance(first[0][0], float)
    assert all(isinstance(text, str) for text in first[1])
    again = AnsweringLM(no_model, tiny.tokenizer, answers, SilentProgress())
    assert (again.loglikelihood_rolling(rolling), again.generate_until(greedy)) == first

    drawn = [generation(0, "The dog", do_sample=True, temperature=1.0)]
    lm.generate_until(drawn)
    with pytest.raises(AssertionError, match="the model was loaded"):
        again.generate_until(drawn)


class Small:
    """A model without memory for more than so many questions at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int, error: type[BaseException]) -> None:
        self.tried: list[int] = []
        real = SharingLM._score

        def score(lm: SharingLM, trees: Sequence[Any]) -> Any:
            self.tried.append(len(trees))
            if len(trees) > fits:
                raise error("no memory")
            return real(lm, trees)

        monkeypatch.setattr(SharingLM, "_score", score)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_batch_auto_halves_until_it_fits_and_stays_there(tiny, monkeypatch: pytest.MonkeyPatch, error):
    whole = answering(tiny).loglikelihood(questions())
    small = Small(monkeypatch, 3, error)
    found = answering(tiny, batch="auto").loglikelihood(questions())
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-4)
    assert small.tried[:3] == [8, 4, 2]
    assert max(small.tried[3:]) == 2


def test_batch_auto_gives_up_where_not_even_one_question_fits(tiny, monkeypatch: pytest.MonkeyPatch):
    small = Small(monkeypatch, 0, MemoryError)
    with pytest.raises(MemoryError):
        answering(tiny, batch="auto").loglikelihood(questions())
    assert small.tried == [8, 4, 2, 1]


def test_a_batch_that_was_asked_for_is_not_changed(tiny, monkeypatch: pytest.MonkeyPatch):
    Small(monkeypatch, 2, MemoryError)
    with pytest.raises(MemoryError):
        answering(tiny, batch=4).loglikelihood(questions())


def test_another_error_is_not_taken_for_too_large_a_batch(tiny, monkeypatch: pytest.MonkeyPatch):
    small = Small(monkeypatch, 2, ValueError)
    with pytest.raises(ValueError, match="no memory"):
        answering(tiny, batch="auto").loglikelihood(questions())
    assert len(small.tried) == 1


@pytest.mark.parametrize("batch", [1, 3, "auto"])
def test_a_second_evaluation_has_the_figures_of_the_first(tiny, tmp_path: Path, answers: Answers, batch: Any):
    mirror = write_mirror(tmp_path / "mirror", {task: local_rows(task) for task in TASKS})
    names = [*TASKS, f"lastword:{tiny.text}"]
    first = ask(load_tasks(names, load_text, mirror), tiny, batch, answers=answers)
    again = AnsweringLM(no_model, tiny.tokenizer, answers, SilentProgress(), batch)
    assert ask(load_tasks(names, load_text, mirror), tiny, lm=again) == first
