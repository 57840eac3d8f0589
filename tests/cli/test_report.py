"""`flatq report` as it is typed: where the page goes, what is said, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatq_cli.cli.app import app
from flatq_cli.store.run import Run
from tests.tiny import calibrated_run, tiny_model_dir, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    return calibrated_run(tiny_model_dir(folder, "llama"), tiny_recipe(folder), folder / "run")


def flatq(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_page_lies_in_the_run_and_its_place_is_printed(run: Run):
    said = flatq("report", run.path, "--quiet")
    assert (said.exit_code, said.stdout.strip()) == (0, str(run.path / "report.html"))
    assert (run.path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(("format", "start"), [("md", "# run\n"), ("json", "{")])
def test_other_formats_go_where_they_are_told(run: Run, format: str, start: str, tmp_path: Path):
    place = tmp_path / "new" / "page"
    assert flatq("report", run.path, "--format", format, "--out", place).exit_code == 0
    assert place.read_text(encoding="utf-8").startswith(start)


def test_compared_runs_are_in_the_table(run: Run, tmp_path: Path):
    place = tmp_path / "page.json"
    flatq("report", run.path, "--compare", run.path, "--compare", run.path, "--format", "json", "--out", place)
    assert len(json.loads(place.read_text())["comparison"]) == 3


@pytest.mark.parametrize("place", ["", "gone"])
def test_what_is_no_run_is_refused_in_one_line(place: str, tmp_path: Path):
    said = flatq("report", tmp_path / place)
    assert said.exit_code == 2
    assert said.stderr.startswith("flatq: ")
    assert len(said.stderr.splitlines()) == 1


def test_the_command_needs_no_torch_to_be_known():
    code = "import sys, flatq_cli.cli.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
