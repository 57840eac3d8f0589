"""Runs of the real command that are killed and started again, as a user would."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flatq_cli
from flatq_cli.store.atomic import file_sha256
from tests.tiny import TEXT, tiny_model_dir

BLOCKS = 8
STAGES = ("calibrate", "fuse", "export/flatq")
SETTINGS = ("calibration.samples=16", "calibration.seqlen=16", "calibration.epochs=6", "calibration.batch=4")
EVAL = ("--seqlen", "16", "--limit", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several blocks and a text."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_model_dir(folder, "llama", num_hidden_layers=BLOCKS)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def start(folder: Path, command: str, run: Path) -> subprocess.Popen[str]:
    arguments = ["--model", "tiny llama", "--run", str(run), "--device", "cpu", "--set", "calibration.data=text.txt"]
    for setting in SETTINGS:
        arguments += ["--set", setting]
    if command == "run":
        arguments += ["--ppl", "text.txt", *EVAL]
    root = str(Path(flatq_cli.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "flatq_cli", command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool], delay: float) -> None:
    """SIGKILL `delay` seconds after `ready` is true for the first time."""
    while not ready():
        assert process.poll() is None, "it ended before the moment it was to be killed at"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out + err


def manifest(run: Path, stage: str) -> dict[str, Any]:
    """A stage's manifest, {} where there is none; always whole, because it is replaced in one step."""
    try:
        content: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def finished(run: Path, stage: str) -> int:
    return len(manifest(run, stage).get("items", {}))


def hashes(run: Path, *stages: str) -> dict[str, str]:
    """Every file of the stages but the manifests, which hold times."""
    return {
        str(file.relative_to(run)): file_sha256(file)
        for stage in stages
        for file in sorted((run / stage).rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    run = folder / "uninterrupted"
    finish(start(folder, "run", run))
    assert all(manifest(run, stage)["status"] == "done" for stage in STAGES)
    return run


def test_calibrate_killed_three_times_gives_the_same_bits(folder: Path, uninterrupted: Path):
    run, rng = folder / "calibrate", random.Random(1)
    block = manifest(uninterrupted, "calibrate")["seconds"] / BLOCKS
    seen = [0]
    for low, high in ((0, 2), (2, 4), (4, 6)):
        after, delay = rng.randint(low, high), rng.random() * block
        kill_when(start(folder, "calibrate", run), lambda after=after: finished(run, "calibrate") >= after, delay)
        seen.append(finished(run, "calibrate"))
        assert manifest(run, "calibrate").get("status", "running") == "running"
    assert seen == sorted(seen)
    assert 0 < seen[-1] < BLOCKS
    finish(start(folder, "calibrate", run))
    assert hashes(run, "calibrate") == hashes(uninterrupted, "calibrate")
    assert len(hashes(run, "calibrate")) == BLOCKS
    assert [item["sha256"] for item in manifest(run, "calibrate")["items"].values()] == [
        item["sha256"] for item in manifest(uninterrupted, "calibrate")["items"].values()
    ]


def test_run_killed_once_in_every_stage_gives_the_same_bits(folder: Path, uninterrupted: Path):
    run, rng = folder / "run", random.Random(2)
    for stage in STAGES:
        least = rng.randint(1, 4)
        whole = manifest(uninterrupted, stage)
        # within the time of one item: the stage is not over then
        delay = rng.random() * whole["seconds"] / len(whole["items"]) / 2
        kill_when(start(folder, "run", run), lambda s=stage, n=least: finished(run, s) >= n, delay)
        assert finished(run, stage) >= least
    finish(start(folder, "run", run))
    assert all(manifest(run, stage)["status"] == "done" for stage in STAGES)
    assert hashes(run, *STAGES) == hashes(uninterrupted, *STAGES)
    results = [json.loads(next((path / "eval").glob("*.json")).read_text()) for path in (run, uninterrupted)]
    assert results[0]["perplexity"] == results[1]["perplexity"]


def test_a_finished_block_that_was_cut_off_is_made_again_by_the_next_call(folder: Path, uninterrupted: Path):
    run = Path(shutil.copytree(uninterrupted, folder / "cut off"))
    before = hashes(run, "calibrate")
    file = run / "calibrate/block-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    finish(start(folder, "calibrate", run))
    assert hashes(run, "calibrate") == before
