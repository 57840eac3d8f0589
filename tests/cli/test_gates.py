"""What is told to CI, where, and with which exit code."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from flatq_cli.cli.gates import read_gates, report_gates
from flatq_cli.errors import GateError, UsageError
from tests.evaluation.judged import judged_result

PASSED = {**judged_result(), "gates": judged_result()["gates"][:1]}


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def test_files_are_written_before_the_failure_and_every_failed_gate_is_named(tmp_path: Path, capsys):
    junit, markdown = tmp_path / "junit.xml", tmp_path / "summary.md"
    with pytest.raises(GateError, match=r"^2 of 4 gates failed: piqa\.acc_drop: regression: .*; broken: anomalous: "):
        report_gates(judged_result(), junit, markdown)
    assert len(list(ElementTree.parse(junit).getroot().iter("failure"))) == 2
    assert "**2 of 4 gates failed**" in markdown.read_text(encoding="utf-8")
    assert capsys.readouterr() == ("", "")


def test_where_all_gates_pass_nothing_is_raised(tmp_path: Path):
    report_gates(PASSED, None, None)
    report_gates({**PASSED, "gates": []}, None, None)
    assert list(tmp_path.iterdir()) == []


def test_github_actions_get_annotations_on_stderr_and_a_summary_after_what_is_there(
    tmp_path: Path, capsys, monkeypatch
):
    summary = tmp_path / "summary"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    with pytest.raises(GateError):
        report_gates(judged_result(), None, None)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" ")[0] for line in err.splitlines()] == ["::error", "::warning", "::error"]
    assert summary.read_text(encoding="utf-8").startswith("before\n# runs/mine\n")


def test_a_summary_that_cannot_be_written_is_told_and_fails_nothing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "summary"))
    report_gates(PASSED, None, None)
    assert "the summary is left out" in capsys.readouterr().err


def test_a_junit_file_without_gates_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--junit .*: reports gates, and there are none: add --gates"):
        read_gates([], tmp_path / "junit.xml", None)


@pytest.mark.parametrize(("option", "place"), [("--junit", 1), ("--markdown", 2)])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, option: str, place: int):
    files: list[Path | None] = [None, None]
    files[place - 1] = tmp_path
    with pytest.raises(UsageError, match=f"{option} .*: cannot write a file there"):
        read_gates(["tasks"], *files)
