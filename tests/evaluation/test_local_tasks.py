from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from flatq_cli.config.locations import configs_dir
from flatq_cli.data.texts import load_text
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.harness import load_tasks
from flatq_cli.evaluation.local_tasks import LOCAL_TASKS, read_questions
from tests.evaluation.asking import ask
from tests.evaluation.local_data import (
    TASKS,
    hub_row,
    local_rows,
    own_task,
    requests_of,
    scores_of_the_harness,
    write_mirror,
)

ARC = {"query": "Question: Why?", "choices": ["this", "that"], "gold": 1}
WINOGRANDE = {"context_options": ["the dog", "the cat"], "continuation": "sees.", "gold": 0}
HELLASWAG = {"activity_label": "Dogs", "ctx_a": "A dog.", "ctx_b": "", "endings": ["runs.", "sits."], "label": 1}


def local_task(task: str, folder: Path):
    (loaded,) = load_tasks([task], no_text, folder).tasks
    return loaded


def no_text(spec: str):
    raise AssertionError(f"{spec} was read")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return write_mirror(tmp_path / "mirror", {task: local_rows(task) for task in TASKS})


# What is asked


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_choices_are_those_of_the_harness_byte_for_byte(task: str, tmp_path: Path):
    rows = local_rows(task, count=40)
    ours, own = local_task(task, write_mirror(tmp_path, {task: rows})), own_task(task, rows)
    assert requests_of(ours) == requests_of(own)
    for doc, own_doc in zip(ours.eval_docs, own.eval_docs, strict=True):
        assert ours.doc_to_text(doc) == own.doc_to_text(own_doc)
        assert ours.doc_to_target(doc) == own.doc_to_target(own_doc)
        assert ours.doc_to_choice(doc) == own.doc_to_choice(own_doc)


@pytest.mark.parametrize(
    ("task", "row", "asked"),
    [
        ("arc_easy", ARC, [("Question: Why?\nAnswer:", " this"), ("Question: Why?\nAnswer:", " that")]),
        ("piqa", ARC, [("Question: Why?\nAnswer:", " this"), ("Question: Why?\nAnswer:", " that")]),
        ("winogrande", WINOGRANDE, [("the dog", " sees."), ("the cat", " sees.")]),
        ("hellaswag", HELLASWAG | {"ctx_b": "it"}, [("Dogs: A dog. It", " runs."), ("Dogs: A dog. It", " sits.")]),
    ],
)  # fmt: skip
def test_a_question_written_by_hand_is_asked_as_the_harness_documents_it(task, row, asked, tmp_path: Path):
    assert requests_of(local_task(task, write_mirror(tmp_path, {task: [row]}))) == asked


@pytest.mark.parametrize("task", TASKS)
def test_metrics_delimiter_and_version_are_those_of_the_harness(task: str, tmp_path: Path):
    rows = local_rows(task)
    ours, own = local_task(task, write_mirror(tmp_path, {task: rows})), own_task(task, rows)
    for key in (
        "output_type",
        "target_delimiter",
        "metric_list",
        "filter_list",
        "repeats",
        "description",
        "num_fewshot",
    ):
        assert getattr(ours.config, key) == getattr(own.config, key), key
    assert ours.VERSION == own.VERSION
    assert ours.aggregation() == own.aggregation()


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_equal_those_of_lm_eval_itself(tiny, mirror: Path, tmp_path: Path, batch: int):
    ours = ask(load_tasks(TASKS, no_text, mirror), tiny, batch).figures
    assert ours == scores_of_the_harness(tiny.model, tiny.tokenizer, mirror, tmp_path / "yaml", batch)
    assert all(0 < ours[task]["acc"] < 1 for task in TASKS), ours
    assert ours["hellaswag"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}


def test_the_order_of_choices_decides_nothing_but_the_answer(tiny, tmp_path: Path):
    """The right choices moved to the front, and the numbers with them: a task that ignored `gold` would show."""
    rows = local_rows("arc_easy", count=20)
    for row in rows:
        row["choices"].insert(0, row["choices"].pop(row["gold"]))
    scores = {}
    for gold in (0, 1, 2, 3):
        folder = write_mirror(tmp_path / str(gold), {"arc_easy": [{**row, "gold": gold} for row in rows]})
        tasks = load_tasks(["arc_easy"], no_text, folder)
        scores[gold] = ask(tasks, tiny, batch=8).figures["arc_easy"]["acc"]
    assert sum(scores.values()) == pytest.approx(1)


def test_no_network_is_touched_and_the_harness_tasks_are_not_read(mirror: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **options: object):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tasks = load_tasks(TASKS, no_text, mirror)
    assert [task.task_name for task in tasks.tasks] == list(TASKS)
    assert len(tasks.manager.all_tasks) < 10


def test_a_last_word_task_can_stand_beside_local_ones(tiny, mirror: Path):
    tasks = load_tasks([f"lastword:{tiny.text}", "piqa", "piqa"], load_text, mirror)
    assert [task.task_name for task in tasks.tasks] == [f"lastword:{tiny.text}", "piqa"]
    assert list(tasks.data) == ["piqa"]


def test_without_a_data_dir_the_tasks_are_the_harness_own():
    """The files in configs/tasks/local are no tasks by themselves: they must not stand in for those of the hub."""
    found = TaskManager(include_path=str(configs_dir() / "tasks"), include_defaults=False).all_tasks
    assert not set(TASKS) & set(found)


# Files


def test_questions_carry_the_file_they_came_from_and_its_hash(mirror: Path):
    (questions,) = read_questions(["piqa"], mirror)
    digest = hashlib.sha256((mirror / "piqa.jsonl").read_bytes()).hexdigest()
    assert questions.to_json() == {"file": str(mirror / "piqa.jsonl"), "sha256": digest, "questions": 12}


def test_a_file_is_found_by_its_task_with_or_without_more_of_a_name(tmp_path: Path):
    write_mirror(
        tmp_path, {"hellaswag_val1000": local_rows("hellaswag", 3), "arc_easy_test": local_rows("arc_easy", 2)}
    )
    found = {questions.task: questions.file.name for questions in read_questions(["hellaswag", "arc_easy"], tmp_path)}
    assert found == {"hellaswag": "hellaswag_val1000.jsonl", "arc_easy": "arc_easy_test.jsonl"}
    write_mirror(tmp_path, {"hellaswag": local_rows("hellaswag", 4)})
    assert len(read_questions(["hellaswag"], tmp_path)[0].rows) == 4


def test_lines_end_at_newlines_only_and_empty_ones_are_passed_over(tmp_path: Path):
    lines = [json.dumps({**ARC, "query": f"Question: a\u2028b\x85c {end}"}, ensure_ascii=False) for end in "xy"]
    (tmp_path / "piqa.jsonl").write_bytes(("\r\n".join(lines) + "\n\n").encode())
    (questions,) = read_questions(["piqa"], tmp_path)
    assert [row["query"][-1] for row in questions.rows] == ["x", "y"]


def test_an_answer_may_be_written_as_text_as_the_hub_does(tmp_path: Path):
    write_mirror(tmp_path, {"hellaswag": [{**HELLASWAG, "label": "1"}]})
    assert read_questions(["hellaswag"], tmp_path)[0].rows[0]["label"] == 1


# Errors


def error_of(task: str, folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_tasks([task], no_text, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_task_that_the_mirror_does_not_know_lists_those_that_it_does(mirror: Path):
    line = error_of("arc_eazy", mirror)
    assert "no task 'arc_eazy' (did you mean 'arc_easy'?)" in line
    assert all(task in line for task in LOCAL_TASKS)


def test_a_missing_folder_or_file_is_named(tmp_path: Path):
    assert f"--data-dir {tmp_path / 'no'}: there is no such folder" in error_of("piqa", tmp_path / "no")
    line = error_of("piqa", tmp_path)
    assert f"--data-dir {tmp_path}: there is neither piqa.jsonl nor piqa_….jsonl" in line


def test_two_files_for_one_task_are_refused(tmp_path: Path):
    write_mirror(tmp_path, {"piqa_a": [ARC], "piqa_b": [ARC]})
    assert "piqa_a.jsonl, piqa_b.jsonl; call one piqa.jsonl" in error_of("piqa", tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "piqa.jsonl").mkdir()
    assert f"cannot read {tmp_path / 'piqa.jsonl'}" in error_of("piqa", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "piqa.jsonl").write_bytes(content)
    assert error_of("piqa", tmp_path) == f"{tmp_path / 'piqa.jsonl'}: holds no questions"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"query": "Question: x', "not JSON"),
        (b'{"query": "\xff"}', "not UTF-8 (byte 11 of the line is 0xff)"),
        (b"[1, 2]", "not a JSON object with query, choices, gold"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: str):
    (tmp_path / "piqa.jsonl").write_bytes(json.dumps(ARC).encode() + b"\n" + line + b"\n")
    assert error_of("piqa", tmp_path).startswith(f"{tmp_path / 'piqa.jsonl'}:2: {words}")


@pytest.mark.parametrize(
    ("task", "good", "change", "words"),
    [
        ("arc_easy", ARC, {"gold": None}, "'gold' is null, not the number of a choice, 0 to 1"),
        ("arc_easy", ARC, {"gold": 2}, "'gold' is 2, not the number of a choice, 0 to 1"),
        ("arc_easy", ARC, {"gold": -1}, "'gold' is -1"),
        ("arc_easy", ARC, {"gold": True}, "'gold' is true"),
        ("arc_easy", ARC, {"gold": 1.0}, "'gold' is 1.0"),
        ("piqa", ARC, {"query": 5}, "'query' is not a text"),
        ("piqa", ARC, {"query": "Why?"}, "'query' does not begin with 'Question: '"),
        ("piqa", ARC, {"choices": ["one"]}, "'choices' is not a list of two texts or more"),
        ("piqa", ARC, {"choices": "text"}, "'choices' is not a list"),
        ("piqa", ARC, {"choices": ["one", None]}, "'choices[1]' is not a text"),
        ("piqa", ARC, {"choices": ["one", " "]}, "'choices[1]' is empty"),
        ("winogrande", WINOGRANDE, {"continuation": ""}, "'continuation' is empty"),
        ("winogrande", WINOGRANDE, {"context_options": ["", "x"]}, "'context_options[0]' is empty"),
        ("hellaswag", HELLASWAG, {"ctx_b": None}, "'ctx_b' is not a text"),
        ("hellaswag", HELLASWAG, {"label": "two"}, "'label' is \"two\", not the number of a choice"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_file_and_line(task, good, change, words, tmp_path: Path):
    write_mirror(tmp_path, {task: [good, {**good, **change}]})
    assert error_of(task, tmp_path).startswith(f"{tmp_path / task}.jsonl:2: {words}")


@pytest.mark.parametrize(
    ("task", "good"), [("arc_easy", ARC), ("piqa", ARC), ("winogrande", WINOGRANDE), ("hellaswag", HELLASWAG)]
)
def test_a_missing_field_is_named_with_those_that_there_should_be(task, good, tmp_path: Path):
    for field in good:
        write_mirror(tmp_path, {task: [{name: value for name, value in good.items() if name != field}]})
        line = error_of(task, tmp_path)
        assert line.startswith(f"{tmp_path / task}.jsonl:1: no field '{field}'; a question of {task} has ")
        assert all(name in line for name in good)


def test_a_question_that_the_harness_cannot_ask_is_one_line(tmp_path: Path):
    write_mirror(tmp_path, {"hellaswag": [{**HELLASWAG, "endings": ["[header]", "sits."]}]})
    assert "lm-eval cannot ask its first question" in error_of("hellaswag", tmp_path)


# Real data


@pytest.mark.data
@pytest.mark.parametrize("task", TASKS)
def test_all_real_questions_are_asked_as_the_harness_asks_them(task: str):
    folder = os.environ.get("FLATQ_DATA")
    if not folder:
        pytest.skip("FLATQ_DATA does not name the folder of evaluation data")
    (questions,) = read_questions([task], Path(folder))
    rows = [row for row in questions.rows if task != "winogrande" or hub_row(task, row)["sentence"].count("_") == 1]
    assert len(rows) > 900
    own, ours = requests_of(own_task(task, rows)), requests_of(local_task(task, Path(folder)))
    # A sentence with another underscore than its blank cannot be made again from its parts.
    assert own == [asked for asked in ours if asked in set(own)] if task == "winogrande" else own == ours
