from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flatq_cli.evaluation.answers import Answers

ANSWER = [-1.25, True]


def opened(file: Path | None, identity: str = "a model", warnings: list[str] | None = None) -> Answers:
    return Answers(file, identity, (warnings if warnings is not None else []).append)


def test_what_is_kept_is_found_again_by_its_place_among_the_questions(tmp_path: Path):
    file = tmp_path / "deep" / "answers.sqlite"
    opened(file).keep("loglikelihood", [(["a", " b"], ANSWER), (["a", " c"], [-2.0, False])])
    questions = [["x"], ["a", " c"], ["a", " b"], ["a", " b"]]
    assert opened(file).find("loglikelihood", questions) == {1: [-2.0, False], 2: ANSWER, 3: ANSWER}


@pytest.mark.parametrize(
    ("identity", "kind", "question"),
    [
        ("another", "loglikelihood", ["a"]),
        ("a model", "generate_until", ["a"]),
        ("a model", "loglikelihood", ["a", ""]),
    ],
)
def test_another_model_kind_or_question_has_no_answer(tmp_path: Path, identity: str, kind: str, question: list[str]):
    file = tmp_path / "answers.sqlite"
    opened(file).keep("log", [(["a"], ANSWER)])
    assert opened(file, identity).find(kind, [question]) == {}


def test_numbers_come_back_to_the_last_bit_and_those_that_are_not_finite_too(tmp_path: Path):
    values = [0.1 + 0.2, -math.pi * 1e-9, math.inf, 5e-324]
    file = tmp_path / "answers.sqlite"
    opened(file).keep("loss", [([number], value) for number, value in enumerate([*values, math.nan])])
    found = opened(file).find("loss", [[number] for number in range(5)])
    assert [found[number] for number in range(4)] == values
    assert math.isnan(found[4])


def test_thousands_of_questions_are_looked_up_at_once(tmp_path: Path):
    answers = opened(tmp_path / "answers.sqlite")
    answers.keep("kind", [([number], number) for number in range(0, 5000, 2)])
    assert answers.find("kind", [[number] for number in range(5000)]) == {
        number: number for number in range(0, 5000, 2)
    }


def test_a_question_whose_answer_is_drawn_is_neither_kept_nor_found(tmp_path: Path):
    answers = opened(tmp_path / "answers.sqlite")
    answers.keep("generate_until", [(None, "text")])
    assert answers.find("generate_until", [None, None]) == {}


def test_without_a_file_nothing_is_kept():
    answers = opened(None)
    answers.keep("kind", [(["a"], 1)])
    assert answers.find("kind", [["a"]]) == {}


def test_two_users_of_a_file_see_what_the_other_keeps(tmp_path: Path):
    one, other = (opened(tmp_path / "answers.sqlite") for _ in range(2))
    one.keep("kind", [(["a"], 1)])
    other.keep("kind", [(["b"], 2)])
    assert one.find("kind", [["a"], ["b"]]) == other.find("kind", [["a"], ["b"]]) == {0: 1, 1: 2}


KEEPER = """
import sys
from pathlib import Path
from flatq_cli.evaluation.answers import Answers
answers = Answers(Path(sys.argv[1]), "a model", print)
for number in range(100_000):
    answers.keep("kind", [([sys.argv[2], number], number)])
    print(number, flush=True)
"""


def test_what_keep_returned_from_survives_a_kill_of_processes_that_write_at_once(tmp_path: Path):
    file, warnings = tmp_path / "answers.sqlite", []
    opened(file, warnings=warnings)
    keepers = [
        subprocess.Popen([sys.executable, "-c", KEEPER, str(file), name], stdout=subprocess.PIPE, text=True)
        for name in ("one", "other")
    ]
    for keeper in keepers:  # both are at work
        assert keeper.stdout is not None
        for _ in range(25):
            keeper.stdout.readline()
    for keeper in keepers:
        os.kill(keeper.pid, signal.SIGKILL)
    answers = opened(file, warnings=warnings)
    for keeper, name in zip(keepers, ("one", "other"), strict=True):
        kept = 25 + len(keeper.communicate()[0].splitlines())
        asked = [[name, number] for number in range(kept)]
        assert answers.find("kind", asked) == {number: number for number in range(kept)}
    assert warnings == []


def overwritten(file: Path, start: int, end: int) -> None:
    content = bytearray(file.read_bytes())
    content[start:end] = os.urandom(len(content[start:end]))
    file.write_bytes(content)


@pytest.mark.parametrize(("start", "end"), [(0, 4096), (5000, 60_000)], ids=["header", "middle"])
def test_a_damaged_file_is_named_moved_aside_and_replaced(tmp_path: Path, start: int, end: int):
    file, warnings = tmp_path / "answers.sqlite", []
    questions = [[number] for number in range(2000)]
    first = opened(file)
    first.keep("kind", [(question, "x" * 40) for question in questions])
    first.close()
    overwritten(file, start, end)

    answers = opened(file, warnings=warnings)
    assert len(answers.find("kind", questions)) < 2000
    answers.keep("kind", [(["new"], 1)])
    assert opened(file).find("kind", [["new"]]) == {0: 1}
    assert len(warnings) == 1
    assert f"{file} is damaged" in warnings[0]
    assert (tmp_path / "answers.sqlite.damaged").exists()


def test_answers_lost_to_damage_that_only_writing_finds_are_written_again(tmp_path: Path):
    file, warnings = tmp_path / "answers.sqlite", []
    answers = opened(file, warnings=warnings)
    answers.keep("kind", [([number], "x" * 40) for number in range(2000)])
    answers.close()
    answers = opened(file, warnings=warnings)
    overwritten(file, 4096, file.stat().st_size)
    answers.keep("kind", [(["new"], 1)])
    assert answers.find("kind", [["new"]]) == {0: 1}
    assert len(warnings) == 1


def test_an_answer_that_is_no_json_is_damage_too(tmp_path: Path):
    file, warnings = tmp_path / "answers.sqlite", []
    opened(file).keep("kind", [(["a"], 1)])
    with sqlite3.connect(file) as store:
        store.execute("UPDATE answers SET answer = '{'")
    assert opened(file, warnings=warnings).find("kind", [["a"]]) == {}
    assert "is damaged" in warnings[0]


def test_a_file_of_another_layout_is_moved_aside(tmp_path: Path):
    file, warnings = tmp_path / "answers.sqlite", []
    opened(file)
    with sqlite3.connect(file) as store:
        store.execute("PRAGMA user_version = 2")
    opened(file, warnings=warnings).keep("kind", [(["a"], 1)])
    assert opened(file).find("kind", [["a"]]) == {0: 1}
    assert "its layout is 2" in warnings[0]


def test_a_place_that_cannot_be_written_is_said_once_and_nothing_fails(tmp_path: Path):
    (tmp_path / "file").touch()
    warnings: list[str] = []
    answers = opened(tmp_path / "file" / "answers.sqlite", warnings=warnings)
    answers.keep("kind", [(["a"], 1)])
    assert answers.find("kind", [["a"]]) == {}
    assert len(warnings) == 1
    assert warnings[0].startswith("answers are not kept: ")
