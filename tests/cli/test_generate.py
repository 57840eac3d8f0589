"""`flatq generate` as it is typed: what goes where, where the prompt comes from, and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import flatq_cli
from flatq_cli.cli.app import app
from flatq_cli.cli.generate import figures
from flatq_cli.stages import generate as stage
from flatq_cli.stages.generate import GenerateRequest, GenerateResult
from flatq_cli.store.last import remember_run
from flatq_cli.store.memory import Peak
from tests.tiny import tiny_model_dir

RESULT = GenerateResult(
    target="x",
    kind="packed",
    prompt_tokens=10,
    new_tokens=21,
    text="one two",
    prefill_seconds=0.5,
    decode_seconds=2.0,
    device="cpu",
    dtype="float32",
    backend="cpu",
    peak=Peak(3 * 2**20),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GenerateRequest]:
    """A stage that says `one two`, in a folder of its own; the requests it got."""
    monkeypatch.chdir(tmp_path)
    requests = []

    def say(request, write, progress):
        requests.append(request)
        write("one ")
        write("two")
        progress.log("said")
        return RESULT

    monkeypatch.setattr(stage, "generate", say)
    return requests


def flatq(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments], input=stdin)


def test_the_text_is_on_stdout_and_the_figures_on_stderr(asked):
    result = flatq("x", "hello", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, "one two\n")
    assert result.stderr == (
        "said\nprompt 10 tokens at 20.0/s · new 21 tokens at 10.0/s · 2s · memory 3.0 MiB · "
        "packed, float32 on cpu, backend cpu\n"
    )
    assert asked == [GenerateRequest("x", "hello")]


def test_every_option_reaches_the_stage(asked):
    flatq(
        "x", "hello", "-n", "7", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--chat", "--device", "cpu",
        "--backend", "reference", "--dtype", "bfloat16", "--trust-remote-code",
    )  # fmt: skip
    assert asked == [
        GenerateRequest("x", "hello", 7, 0.5, 0.9, 3, True, "cpu", "reference", "bfloat16", trust_remote_code=True)
    ]


def test_quiet_is_the_text_alone(asked):
    result = flatq("x", "hello", "--quiet")
    assert (result.stdout, result.stderr) == ("one two\n", "")


def test_the_json_goes_to_a_file_or_alone_to_stdout(asked, tmp_path):
    flatq("x", "hello", "--json", "some/where.json")
    written = json.loads((tmp_path / "some/where.json").read_text())
    assert (written["schema"], written["text"]) == ("flatq.generate/1", "one two")
    assert json.loads(flatq("x", "hello", "--json", "-", "--quiet").stdout) == written
    count = len(asked)
    result = flatq("x", "hello", "--json", ".")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--json .: cannot write a file there" in result.stderr
    assert len(asked) == count  # refused before anything is generated


@pytest.mark.parametrize("arguments", [("x",), ("x", "-")])
def test_the_prompt_comes_from_a_pipe_without_its_last_line_break(asked, arguments):
    assert flatq(*arguments, stdin="two\nlines\n").exit_code == 0
    assert asked[0].prompt == "two\nlines"


def test_no_prompt_is_an_error_and_not_an_empty_one(asked):
    result = flatq("x", stdin="")
    assert result.exit_code == 2
    assert 'no prompt: `flatq generate TARGET "PROMPT"`' in result.stderr
    assert "is not UTF-8" in flatq("x", stdin=b"\xff\xfe").stderr
    assert asked == []


def test_without_a_target_it_is_the_run_used_last(asked, tmp_path):
    assert "no run was used in this folder yet" in flatq(stdin="hello").stderr
    (tmp_path / "runs/mine").mkdir(parents=True)
    remember_run(Path("runs/mine"))
    result = flatq(stdin="hello")
    assert result.stderr.startswith("run: runs/mine\n")
    assert asked[0].target == "runs/mine"


def test_an_interrupt_ends_with_130_and_the_figures_so_far(asked, monkeypatch):
    result = GenerateResult(**{**vars(RESULT), "interrupted": True})
    monkeypatch.setattr(stage, "generate", lambda request, write, progress: (write("one"), result)[1])
    said = flatq("x", "hello")
    assert (said.exit_code, said.stdout) == (130, "one\n")
    assert said.stderr.endswith("interrupted\n")


def test_figures_that_are_not_known_are_left_out():
    result = GenerateResult(
        **{**vars(RESULT), "new_tokens": 0, "kind": "float", "backend": None, "peak": Peak(None, 2**31)}
    )
    assert figures(result) == "prompt 10 tokens · new 0 tokens · 2s · GPU memory 2.0 GiB · float, float32 on cpu"


def test_a_process_streams_and_ends_cleanly_on_ctrl_c(tmp_path):
    """For real: what was said stays, and one line follows."""
    tiny_model_dir(tmp_path, "llama", max_position_embeddings=100_000).rename(tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    weights["lm_head.weight"][1] = 0  # the token that ends a text is never the likeliest
    save_file(weights, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flatq_cli.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "flatq_cli", "generate", "./tiny", "w1 w2", "-n", "90000", "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None
    first = process.stdout.read(5)  # it streams: this is long before the end
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert len(first) == 5
    assert rest.endswith("\n")
    (line,) = stderr.splitlines()
    assert line.startswith("prompt ")
    assert line.endswith("interrupted")
