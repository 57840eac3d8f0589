from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from flatq_cli.data.texts import Text, load_text
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.harness import load_tasks
from flatq_cli.evaluation.lastword import passages
from tests.evaluation.asking import ask


def read_text(spec: str) -> Text:
    text = load_text(spec)
    return Text(Path(spec).stem, text.content, text.sha256)


def by_hand(tiny) -> tuple[float, float]:
    """Accuracy and perplexity of the last-word task, straight from the model."""
    right, total = 0, 0.0
    asked = passages(tiny.text.read_text(encoding="utf-8"))
    for passage in asked:
        context = tiny.tokenizer(passage.context)["input_ids"]
        tokens = torch.tensor([tiny.tokenizer(f"{passage.context} {passage.word}")["input_ids"]])
        log_p = tiny.model(input_ids=tokens).logits[0, len(context) - 1 : -1].log_softmax(-1)
        target = tokens[0, len(context) :]
        right += int(torch.equal(log_p.argmax(-1), target))
        total += log_p.gather(1, target[:, None]).sum().item()
    return right / len(asked), math.exp(-total / len(asked))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_harness_scores_last_words_as_a_computation_by_hand(tiny, batch: int):
    tasks = load_tasks([f"lastword:{tiny.text}"], read_text)
    scores = ask(tasks, tiny, batch).figures
    accuracy, perplexity = by_hand(tiny)
    assert 0 < accuracy < 1
    assert scores["lastword:tiny-prose"]["acc"] == pytest.approx(accuracy)
    assert scores["lastword:tiny-prose"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_the_harness_says_nothing_of_its_own(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)  # outside a repository, where the git that it starts would complain
    tasks = load_tasks([f"lastword:{tiny.text}"], read_text)
    ask(tasks, tiny, limit=2)
    assert capfd.readouterr() == ("", "")


def test_tasks_can_be_asked_again_and_limited(tiny):
    tasks = load_tasks([f"lastword:{tiny.text}"], read_text)
    first, again = (ask(tasks, tiny).figures for _ in range(2))
    limited = ask(tasks, tiny, limit=2).figures
    assert first == again
    assert limited["lastword:tiny-prose"]["acc"] in (0, 0.5, 1)
    assert limited != first


def test_a_text_without_passages_is_refused(tmp_path: Path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UsageError, match="holds no passage"):
        load_tasks([f"lastword:{tmp_path / 'short.txt'}"], read_text)


def test_lastword_without_a_text_says_how_to_give_one():
    with pytest.raises(UsageError, match="lastword:FILE"):
        load_tasks(["lastword"], read_text)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"no task 'arc_eazy' \(did you mean 'arc_easy'\?\)"):
        load_tasks(["arc_eazy"], read_text)


def test_two_texts_of_one_name_are_refused(tiny, tmp_path: Path):
    (tmp_path / "tiny-prose.txt").write_text(tiny.text.read_text(encoding="utf-8"))
    with pytest.raises(UsageError, match="two tasks are called 'lastword:tiny-prose'"):
        load_tasks([f"lastword:{tiny.text}", f"lastword:{tmp_path / 'tiny-prose.txt'}"], read_text)


def test_questions_that_the_hub_does_not_give_are_a_quick_and_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import datasets.config

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UsageError, match=r"questions of 'piqa' could not be loaded: .*lastword:FILE needs no network"):
        load_tasks(["piqa"], read_text)
    assert not constants.HF_HUB_OFFLINE
