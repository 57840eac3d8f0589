"""An evaluation in a process of its own, killed in the middle: the same command goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flatq_cli.stages.eval_request import EvalRequest
from flatq_cli.stages.evaluate import evaluate
from flatq_cli.store.progress import SilentProgress
from tests.evaluation.local_data import local_rows, write_mirror
from tests.tiny import TEXT, fused_run

SEQLEN, COUNT = 16, 24
OF_THE_MACHINE = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")

SLOW_FLATQ = """
import json, sys, time
LOG = sys.argv[1]
from flatq_cli.evaluation import answers, perplexity, scoring, windows

def note(what, *things):
    with open(LOG, "a") as file:
        file.write("".join(json.dumps([what, thing]) + "\\n" for thing in things))

def read_window(logits, tokens, real=perplexity.window_loss):
    note("asked", tokens.tolist())
    time.sleep(0.02)
    return real(logits, tokens)

def read_questions(lm, requests, disable_tqdm, real=scoring.SharingLM.loglikelihood):
    note("asked", *{f"{request.task_name} {request.doc_id}": 0 for request in requests})
    time.sleep(0.1)
    return real(lm, requests, disable_tqdm)

def keep(self, kind, pairs, real=answers.Answers.keep):
    pairs = list(pairs)
    real(self, kind, pairs)
    note("kept", *[question for question, answer in pairs])

windows.window_loss = read_window
scoring.SharingLM.loglikelihood = read_questions
answers.Answers.keep = keep
from flatq_cli.cli.app import main
sys.argv[:2] = ["flatq"]
main()
"""


def start(log: Path, arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_FLATQ, str(log), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def notes(log: Path, what: str) -> list[Any]:
    lines = log.read_text().splitlines() if log.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("]")]
    return [thing for kind, thing in whole if kind == what]


def kill_after(log: Path, arguments: list[str], kept: int) -> None:
    """Start an evaluation and send SIGKILL once so much is kept."""
    process = start(log, arguments)
    while len(notes(log, "kept")) < kept:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_an_evaluation_killed_twice_asks_nothing_again_and_has_the_figures_of_an_unbroken_one(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    text = tmp_path / "words.txt"
    text.write_text(TEXT[:900], encoding="utf-8")
    mirror = write_mirror(tmp_path / "mirror", {"piqa": local_rows("piqa", COUNT)})
    request = EvalRequest(str(run.path), tasks=("piqa",), ppl=(str(text),), seqlen=SEQLEN, data_dir=mirror, cache=False)
    unbroken = evaluate(request, SilentProgress()).to_json()
    windows = unbroken["perplexity"]["words"]["tokens"] // SEQLEN
    assert windows > 15
    result = tmp_path / "result.json"
    arguments = [
        "eval", str(run.path), "--tasks", "piqa", "--ppl", str(text), "--seqlen", str(SEQLEN),
        "--data-dir", str(mirror), "--json", str(result), "--device", "cpu",
    ]  # fmt: skip

    logs = [tmp_path / f"{number}.log" for number in range(3)]
    kill_after(logs[0], arguments, kept=4)  # among the windows
    kill_after(logs[1], arguments, kept=windows - len(notes(logs[0], "kept")) + 8)  # among the questions
    last = start(logs[2], arguments)
    assert last.wait(120) == 0, last.communicate()[0]

    asked, kept = ([notes(log, what) for log in logs] for what in ("asked", "kept"))
    assert 4 <= len(kept[0]) < windows
    assert 8 <= len(kept[0]) + len(kept[1]) - windows < COUNT
    assert sum(map(len, kept)) == windows + COUNT
    assert len({json.dumps(question) for part in kept for question in part}) == windows + COUNT
    # What a kill interrupts is asked again: a window, or the slice of questions in work; and nothing else.
    assert len(asked[0]) - len(kept[0]) in (0, 1)
    assert len(asked[1]) - len(kept[1]) in (0, 8)
    assert asked[2] == [f"piqa {number}" for number in range(len(kept[0]) + len(kept[1]) - windows, COUNT)]

    found = json.loads(result.read_text())
    for key in OF_THE_MACHINE:
        found.pop(key), unbroken.pop(key)
    assert found == json.loads(json.dumps(unbroken))


def test_an_evaluation_that_is_all_kept_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = fused_run(tmp_path, "llama")
    text = tmp_path / "text.txt"
    mirror = write_mirror(tmp_path / "mirror", {"piqa": local_rows("piqa", 4)})
    request = EvalRequest(
        str(run.path), tasks=("piqa",), ppl=(str(text),), seqlen=SEQLEN, limit=4, data_dir=mirror,
        baseline=run.config.model.location,
    )  # fmt: skip
    first = evaluate(request, SilentProgress())

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("flatq_cli.models.checkpoint.SafetensorsCheckpoint.read", refuse)
    again = evaluate(request, SilentProgress())
    assert (again.perplexity, again.tasks, again.evidence) == (first.perplexity, first.tasks, first.evidence)
    assert again.baseline is not None
    assert first.baseline is not None
    assert again.baseline.evidence == first.baseline.evidence
    assert (run.path / "eval" / "answers.sqlite").is_file()
    with pytest.raises(AssertionError, match="weights were read"):
        evaluate(EvalRequest(**{**vars(request), "cache": False}), SilentProgress())
