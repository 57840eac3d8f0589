"""Everything that can go wrong, provoked through the real command line on real stages: one line, and the exit code.

2 for wrong usage, configuration or input, 1 for what fails while working, 130 for an interrupt. Nothing that was
computed before is lost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import flatq_cli
from flatq_cli.cli.app import app
from flatq_cli.models.families import supported_model_types
from flatq_cli.stages import calibrate as calibrate_stage
from flatq_cli.store.lock import unlock_run
from tests.tiny import tiny_model_dir, tiny_text

CHECKOUT = Path(flatq_cli.__file__).parents[1]
RUN = "runs/made"
CALIBRATE = ("calibrate", "--model", "tiny", "--recipe", "balanced")
SMALL = ("--set", "calibration.data=text.txt", "--set", "calibration.samples=4", "--set", "calibration.seqlen=16")
BLOCK = "block-00001.safetensors"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a text, and a run that is calibrated, fused and exported."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model_dir(folder, "llama").rename(folder / "tiny")
    tiny_text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ((*CALIBRATE, *SMALL, "--run", RUN), ("fuse", RUN), ("export", RUN)):
            result = CliRunner().invoke(app, [*command, "--quiet"])
            assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, to do damage in; no network."""
    place = tmp_path / "here"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield place
    for run in (place / "runs").glob("*"):
        unlock_run(run)


def works(*arguments: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.stderr


def error_of(code: int, *arguments: str) -> str:
    """Type a command that must fail with `code`; the one line it says."""
    quiet = ["--quiet"] if arguments[0] in ("calibrate", "fuse", "export", "eval", "run") else []
    result = CliRunner().invoke(app, [*arguments, *quiet])
    assert result.stdout == ""
    assert result.exit_code == code, result.stderr
    return the_line(result.stderr)


def the_line(stderr: str) -> str:
    """The only line of stderr, without what every error begins with."""
    assert stderr.startswith("flatq: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    return stderr.removeprefix("flatq: ").strip()


def says(line: str, *words: str) -> None:
    assert [word for word in words if word not in line] == [], line


def in_a_process(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own in `folder`, that SIGINT interrupts however the tests were started."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def items(run: str, stage: str) -> dict[str, dict]:
    return json.loads(Path(run, stage, "manifest.json").read_text(encoding="utf-8"))["items"]


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fuse", "--no"], ["No such option: --no", "`flatq fuse --help`"]),
        (["calibrate"], ["Missing option '--model'", "`flatq calibrate --help`"]),
        (["fuse", "--device", "tpu"], ["--device", "'tpu' is not one of", "cuda"]),
        (["eval", "--limit", "0"], ["--limit", "greater than or equal to 1"]),
        (["fus"], ["No such command 'fus'", "`flatq --help`"]),
    ],
)
def test_wrong_usage(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["flatq", *arguments])
    with pytest.raises(SystemExit) as caught:
        flatq_cli.cli.app.main()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    says(the_line(said.err), *words)


def test_an_unknown_preset(folder):
    line = error_of(2, "calibrate", "--model", "lama-3-8b")
    says(line, "no preset 'lama-3-8b'", "did you mean 'llama-3-8b'?", "`flatq models`", "hub id", ".gguf")


def test_an_unknown_recipe(folder):
    line = error_of(2, "calibrate", "--model", "tiny", "--recipe", "flatqant")
    says(line, "no recipe 'flatqant'", "did you mean 'flatquant'?", "rtn", "w4a8kv8")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("weights:\n  bits: 4\nactivations:\n  bit: 8\n", [":4: activations.bit: unknown key 'bit'", "mean 'bits'?"]),
        ("weights: {bits: 4}\nsamples: 8\n", [":2: samples: unknown key", "calibration.samples"]),
        ("activations:\n  clip: learn\n", [":2: activations.clip: 'learn' is not one of none, learned", "'learned'?"]),
        ("weights:\n  bits: 7\n", [":2: weights.bits: 7 is not one of 2, 3, 4, 5, 6, 8, 16"]),
        ("calibration:\n\n  samples: 0\n", [":3: calibration.samples: 0 should be greater than or equal to 1"]),
        ("calibration: {samples: 4, samples: 5}\n", [":1: calibration.samples: this key is there twice"]),
        ("weights: [\n", [":2: not valid YAML"]),
        ("4\n", [":1: a recipe is a list of `key: value` lines"]),
    ],
)
def test_a_recipe_file_with_an_error(folder, yaml, words):
    Path("mine.yaml").write_text(yaml, encoding="utf-8")
    line = error_of(2, "calibrate", "--model", "tiny", "--recipe", "mine.yaml")
    says(line, *(f"mine.yaml{word}" if word.startswith(":") else word for word in words))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("weights.bit=4", ["--set weights.bit: unknown key 'bit'", "'bits'?"]),
        ("calibration.epochs=-1", ["--set calibration.epochs: -1 should be greater than or equal to 0"]),
        ("weights.bits", ["--set weights.bits: expected KEY=VALUE"]),
    ],
)
def test_a_wrong_set_option(folder, option, words):
    says(error_of(2, *CALIBRATE, "--set", option), *words)


def test_a_group_that_does_not_divide_the_weights(folder):
    line = error_of(2, *CALIBRATE, *SMALL, "--set", "weights.group=5", "--run", "runs/new")
    says(line, "weights.group", "5", "32")


def test_training_a_recipe_that_has_nothing_to_learn_is_no_error(folder):
    works(
        "calibrate", "--model", "tiny", "--recipe", "rtn", *SMALL, "--set", "calibration.epochs=2", "--run", "runs/new"
    )


def test_cuda_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ((*CALIBRATE, *SMALL), ("fuse", RUN), ("eval", RUN, "--ppl", "text.txt")):
        says(error_of(2, *command, "--device", "cuda"), "--device cuda", torch.__version__, "install", "--device cpu")


def test_an_export_format_that_there_is_not(folder):
    says(error_of(2, "export", RUN, "--format", "ggml"), "--format ggml", "not one of", "flatq")


def test_nothing_to_evaluate(folder):
    says(error_of(2, "eval", RUN), "nothing to evaluate", "--ppl", "--tasks")


def test_questions_that_are_not_in_their_folder(folder):
    Path("mirror").mkdir()
    Path("mirror/piqa.jsonl").write_text('{"query": "Question: x", "gold": 0}\n', encoding="utf-8")
    asked = ("--data-dir", "mirror", "--tasks")
    for command in (("eval", RUN), ("run", *CALIBRATE[1:], *SMALL)):
        says(error_of(2, *command, *asked, "piqa"), "mirror/piqa.jsonl:1: no field 'choices'", "query, choices, gold")
        says(error_of(2, *command, *asked, "arc_easy"), "--data-dir mirror", "arc_easy.jsonl")
        says(error_of(2, *command, *asked, "mmlu"), "no task 'mmlu'", "arc_easy, piqa, winogrande, hellaswag")
    says(error_of(2, "eval", RUN, "--data-dir", "nowhere", "--tasks", "piqa"), "--data-dir nowhere", "no such folder")


# The model


def test_an_architecture_that_is_not_supported(folder):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48)).save_pretrained("other")
    shutil.copy("tiny/tokenizer.json", "other")
    for extra in ((), ("--dry-run",)):
        line = error_of(2, "calibrate", "--model", "other", *SMALL, *extra)
        says(line, "unsupported architecture 'gpt2'", *supported_model_types(), "docs/adding-a-family.md")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", ["missing config.json"]),
        ("tokenizer.json", ["missing a tokenizer", "tokenizer.json"]),
        ("model.safetensors", ["missing weights", "model.safetensors"]),
    ],
)
def test_a_model_directory_that_lacks_a_file(folder, name, words):
    Path("tiny", name).unlink()
    for command in ((*CALIBRATE, *SMALL), ("eval", "tiny", "--ppl", "text.txt")):
        says(error_of(2, *command), "tiny: not a whole model", *words)


def test_a_model_that_is_nowhere(folder):
    says(error_of(2, "calibrate", "--model", "./nowhere", *SMALL), "./nowhere", "no such file or directory")
    says(error_of(2, "eval", "runs/nowhere", "--ppl", "text.txt"), "runs/nowhere: there is no run; nor a model")
    assert error_of(2, "inspect", "nowhere").startswith("there is no preset 'nowhere'")


def test_a_model_of_the_hub_offline(folder):
    for model, repository in (("llama-3-8b", "meta-llama/Meta-Llama-3-8B"), ("some-org/model", "some-org/model")):
        line = error_of(2, "calibrate", "--model", model)
        says(line, f"{repository}: HF_HUB_OFFLINE is set", "not in the local cache", "local directory")


def test_a_hub_that_cannot_be_reached(folder):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub")}
    process = in_a_process(folder, "-m", "flatq_cli", "calibrate", "--model", "llama-3-8b", **nobody)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    says(the_line(stderr), "meta-llama/Meta-Llama-3-8B: the hub cannot be reached", "local directory")


# The text


@pytest.mark.parametrize("command", [(*CALIBRATE, "--set", "calibration.data={}"), ("eval", RUN, "--ppl", "{}")])
def test_a_text_that_cannot_be_used(folder, command):
    Path("latin.txt").write_bytes("café ".encode("latin-1") * 50)
    Path("empty.txt").write_text("\n")

    def line(text: str) -> str:
        return error_of(2, *(part.format(text) for part in command))

    says(line("txet.txt"), "no text 'txet.txt'", "did you mean text.txt")
    says(line("latin.txt"), "latin.txt is not UTF-8 text: byte 3 is 0xe9", "convert it")
    says(line("empty.txt"), "empty.txt is empty")
    says(line("tiny"), "tiny is a directory")


def test_a_text_that_is_too_short(folder):
    line = error_of(2, *CALIBRATE, "--set", "calibration.data=text.txt", "--run", "runs/new")
    says(line, "text.txt has 1,200 tokens", "128 samples of 2,048 need 262,144", "lower calibration.samples")
    line = error_of(2, "eval", RUN, "--ppl", "text.txt", "--seqlen", "4096")
    says(line, "text has 1,200 tokens", "one window of 4,096", "lower seqlen")


def test_the_advice_for_a_text_that_is_too_short_can_be_followed(folder):
    error_of(2, *CALIBRATE, "--set", "calibration.data=text.txt", "--run", "runs/new")
    works(*CALIBRATE, *SMALL, "--run", "runs/new")


def test_a_text_of_the_hub_offline(folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    says(error_of(2, "eval", RUN, "--ppl", "wikitext2"), "Salesforce/wikitext", "HF_HUB_OFFLINE", "UTF-8 text file")


# Files that are damaged


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def break_the_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:16] = b"\xff" * 8
    file.write_bytes(content)


def last_tensor(file: Path) -> str:
    """The tensor whose data ends the file."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])


def test_a_model_whose_weights_are_cut_off(folder):
    file = Path("tiny/model.safetensors")
    tensor = last_tensor(file)
    cut_off(file)
    for command in ((*CALIBRATE, *SMALL, "--run", "runs/new"), ("eval", "tiny", "--ppl", "text.txt")):
        says(error_of(2, *command), "tiny/model.safetensors", "cut off in tensor", tensor, "fetch it again")


def test_a_model_whose_header_is_broken(folder):
    break_the_header(Path("tiny/model.safetensors"))
    says(error_of(2, *CALIBRATE, *SMALL, "--run", "runs/new"), "tiny/model.safetensors", "corrupt", "header")


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, break_the_header])
def test_a_damaged_file_of_calibrate_is_made_again(folder, damage: Callable[[Path], None]):
    shutil.rmtree(Path(RUN, "fuse"))
    file, whole = Path(RUN, "calibrate", BLOCK), Path(RUN, "calibrate", BLOCK).read_bytes()
    damage(file)
    says(error_of(2, "fuse", RUN), str(file), "run `flatq calibrate")
    assert Path(RUN, "calibrate", "block-00000.safetensors").is_file()
    file.unlink()
    works(*CALIBRATE, *SMALL, "--run", RUN)
    assert file.read_bytes() == whole
    works("fuse", RUN)


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, break_the_header])
def test_a_damaged_file_of_fuse_is_made_again(folder, damage: Callable[[Path], None]):
    shutil.rmtree(Path(RUN, "export"))
    file, whole = Path(RUN, "fuse", SHARD), Path(RUN, "fuse", SHARD).read_bytes()
    damage(file)
    says(error_of(2, "export", RUN), str(file))
    if damage is not flip_a_bit:  # eval reads what is as long as it should be
        says(error_of(2, "eval", RUN, "--ppl", "text.txt", "--seqlen", "32"), str(file))
    file.unlink()
    says(error_of(2, "export", RUN), str(file), "run `flatq fuse")
    works("fuse", RUN)
    assert file.read_bytes() == whole
    works("export", RUN)


@pytest.mark.parametrize("damage", [cut_off, break_the_header])
def test_a_damaged_export_is_made_again(folder, damage: Callable[[Path], None]):
    export = f"{RUN}/export/flatq"
    file, whole = Path(export, SHARD), Path(export, SHARD).read_bytes()
    tensor = last_tensor(file)
    damage(file)
    line = error_of(2, "eval", export, "--ppl", "text.txt", "--seqlen", "32")
    says(line, str(file), f"cut off in tensor {tensor}" if damage is cut_off else "header")
    says(error_of(2, "inspect", export), str(file))
    works("export", RUN)
    assert file.read_bytes() == whole
    works("eval", export, "--ppl", "text.txt", "--seqlen", "32")


def test_a_run_whose_record_is_broken(folder):
    Path(RUN, "fuse", "manifest.json").write_text("{", encoding="utf-8")
    says(error_of(2, "export", RUN), f"{RUN}/fuse/manifest.json is broken", "delete it")
    Path(RUN, "run.yaml").write_text("recipe: [", encoding="utf-8")
    says(error_of(2, "fuse", RUN), f"{RUN}/run.yaml is broken", "line 1")


# Runs


def test_a_run_that_was_made_with_another_recipe_model_or_text(folder):
    line = error_of(2, *CALIBRATE, *SMALL, "--set", "weights.bits=3", "--run", RUN)
    says(line, RUN, "weights.bits: run has 4, asked 3", "another --run")
    line = error_of(2, "calibrate", "--model", "tiny", "--recipe", "hadamard", *SMALL, "--run", RUN)
    says(line, "transform.init: run has balanced, asked hadamard")
    tiny_model_dir(folder, "qwen2").rename("second")
    line = error_of(2, "calibrate", "--model", "second", "--recipe", "balanced", *SMALL, "--run", RUN)
    says(line, "model: run has tiny (llama, 2 blocks", "asked second (qwen2, 2 blocks")
    Path("text.txt").write_text("w1 w2 " * 500, encoding="utf-8")
    says(error_of(2, *CALIBRATE, *SMALL, "--run", RUN), "data: run has text.txt (", "asked text.txt (")


def test_stages_out_of_order(folder):
    Path("runs/.last").unlink()
    says(error_of(2, "fuse"), "no run was used in this folder", "`flatq calibrate --model M`")
    says(
        error_of(2, "fuse", "runs/none"), "there is no run at runs/none", "`flatq calibrate --model M --run runs/none`"
    )
    shutil.rmtree(Path(RUN, "fuse"))
    says(error_of(2, "export", RUN), "no finished fuse stage", "`flatq export` needs", "run `flatq fuse")
    says(
        error_of(2, "eval", RUN, "--ppl", "text.txt"), "no finished fuse stage", "`flatq eval` needs", "run `flatq fuse"
    )
    shutil.rmtree(Path(RUN, "calibrate"))
    says(error_of(2, "fuse", RUN), "no finished calibrate stage", "`flatq fuse` needs", "run `flatq calibrate")


def test_a_second_process_and_an_interrupt(folder):
    """One process at work: a second is refused, SIGINT ends the first, and the same command goes on where it was."""
    command = ("calibrate", "--model", "tiny", *SMALL, "--set", "calibration.epochs=400", "--run", "runs/busy")
    first = in_a_process(folder, "-m", "flatq_cli", *command)
    manifest = Path("runs/busy/calibrate/manifest.json")
    while first.poll() is None and not (manifest.is_file() and items("runs/busy", "calibrate")):
        time.sleep(0.02)
    line = error_of(2, *command)
    says(line, "runs/busy is in use by another flatq process", f"process {first.pid} on", "another --run")
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate()
    assert (first.returncode, stdout) == (130, "")
    assert stderr.endswith("\nflatq: interrupted; the same command goes on where it was\n")
    assert "Traceback" not in stderr
    assert list(items("runs/busy", "calibrate")) == ["block-00000"]
    saved = Path("runs/busy/calibrate/block-00000.safetensors").stat().st_mtime_ns
    works(*command)
    assert list(items("runs/busy", "calibrate")) == ["block-00000", "block-00001"]
    assert Path("runs/busy/calibrate/block-00000.safetensors").stat().st_mtime_ns == saved


# The machine


LIMITED = (
    "import resource, sys; from flatq_cli.cli.app import main;"
    "limit = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); main()"
)
"""flatq with a limit on the size of a file it writes, which the system reports in the same way as a full disk."""


def test_a_full_disk(folder):
    process = in_a_process(folder, "-c", LIMITED, "4000", *CALIBRATE, *SMALL, "--run", "runs/new", "--quiet")
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (1, "")
    says(
        the_line(stderr),
        "disk full: could not write runs/new/calibrate/block-00000.safetensors",
        "free space and run the same command again: it goes on where it was",
    )
    assert [file.name for file in Path("runs/new/calibrate").iterdir()] == ["manifest.json"]
    works(*CALIBRATE, *SMALL, "--run", "runs/new")
    written, known = Path("runs/new/calibrate", BLOCK), Path(RUN, "calibrate", BLOCK)
    assert written.read_bytes() == known.read_bytes()


def out_of_memory(after: int, real: Callable) -> Callable:
    """`real` for the first calls, then what Python raises when there is no memory."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > after:
            raise MemoryError
        return real(*arguments, **options)

    return call


def test_out_of_memory_says_what_to_lower_and_keeps_what_was_done(folder, monkeypatch):
    monkeypatch.setattr(calibrate_stage, "fit_block", out_of_memory(1, calibrate_stage.fit_block))
    line = error_of(1, *CALIBRATE, *SMALL, "--run", "runs/new")
    says(line, "out of memory", "calibration.batch", ".samples", ".seqlen", "the same command goes on where it was")
    assert list(items("runs/new", "calibrate")) == ["block-00000"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    works(*CALIBRATE, *SMALL, "--run", "runs/new")


def test_out_of_memory_in_torch_is_seen_too(folder, monkeypatch):
    def allocate(*arguments, **options):
        return torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(calibrate_stage, "fit_block", allocate)
    says(error_of(1, *CALIBRATE, *SMALL, "--run", "runs/new"), "out of memory", "calibration.batch")


def test_a_loss_that_is_not_a_number(folder):
    rate = ("--set", "calibration.learning_rate=1e30", "--set", "calibration.epochs=3")
    line = error_of(1, "calibrate", "--model", "tiny", *SMALL, *rate, "--run", "runs/new")
    says(line, "the loss is not a number", "lower calibration.learning_rate")
    assert re.match(r"block 0, step \d+: ", line)


@pytest.mark.parametrize("recipe", ["flatq", "balanced", "rtn"])
def test_weights_that_are_not_numbers(folder, recipe):
    file = Path("tiny/model.safetensors")
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, file, {"format": "pt"})
    line = error_of(1, "calibrate", "--model", "tiny", "--recipe", recipe, *SMALL, "--run", "runs/new")
    says(line, "block 1", "not a number")
    assert list(items("runs/new", "calibrate")) == ["block-00000"]


def test_a_place_that_cannot_be_written_to(folder):
    Path("file").write_text("")
    says(error_of(2, *CALIBRATE, *SMALL, "--run", "file/run"), "file/run")
    says(error_of(2, "eval", RUN, "--ppl", "text.txt", "--json", "file/out.json"), "--json file/out.json: cannot write")
    says(error_of(2, "export", RUN, "--out", "tiny"), "--out tiny", "not empty", "empty directory")


# Looking closer


def test_debug_shows_the_traceback_before_the_line(folder):
    result = CliRunner().invoke(app, ["calibrate", "--model", "lama-3-8b", "--debug"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    says(the_line(result.stderr.splitlines(keepends=True)[-1]), "no preset 'lama-3-8b'")


def test_what_nobody_foresaw_points_to_debug(folder, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr(calibrate_stage, "fit_block", fail)
    says(error_of(1, *CALIBRATE, *SMALL, "--run", "runs/new"), "RuntimeError: odd thing", "--debug")
