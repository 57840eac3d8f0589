"""What an export brings for programs that know transformers alone, each a process that does not import flatq itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flatq_cli
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from tests.tiny import FAMILIES, fused_run

CHECKOUT = Path(flatq_cli.__file__).parents[1]
LOAD = """
import sys
import torch, transformers
assert not [name for name in sys.modules if name.startswith("flatq_cli")]
tokens = torch.tensor([[5, 17, 2, 40]])
trusted = {"trust_remote_code": True, "dtype": torch.float32}
for directory in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **trusted)
    stock = getattr(transformers, type(model).__name__)
    assert isinstance(model, stock) and type(model) is not stock and stock._auto_class is None
    assert type(model.config) is stock.config_class and type(model.config)._auto_class is None
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
    logits = model(tokens).logits
    model.save_pretrained(directory + " saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(directory + " saved", **trusted)
    assert type(again).__name__ == type(model).__name__ and torch.equal(again(tokens).logits, logits)
    torch.save(logits, directory + ".pt")
"""
TASK = """\
task: four
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fused_run(tmp_path_factory.mktemp("run"), "llama")
    return Path(export(run, "flatq", None, SilentProgress())["path"])


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that finds flatq and the network nowhere but in the checkout; its caches are in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_trust_remote_code_loads_and_saves_every_family_without_importing_flatq(tmp_path):
    directories = [
        export(fused_run(tmp_path, family), "flatq", tmp_path / family, SilentProgress())["path"] for family in FAMILIES
    ]
    done = python(tmp_path, "-c", LOAD, *directories)
    assert done.returncode == 0, done.stderr
    for directory in directories:
        here = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        there = torch.load(f"{directory}.pt")
        torch.testing.assert_close(here(torch.tensor([[5, 17, 2, 40]])).logits, there)


def test_without_flatq_it_says_what_to_install(exported, tmp_path):
    code = (
        "import sys; sys.modules['flatq_cli'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    done = python(tmp_path, "-c", code, str(exported))
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: a model in flatq's format needs flatq")
    assert done.stderr.strip().endswith("pip install flatq")


def test_after_importing_flatq_nobody_asks_and_nothing_in_the_directory_runs(exported, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(exported, tmp_path / "copy"))
    (directory / "modeling_flatq.py").write_text("raise RuntimeError('was run')\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked"))
    for options in ({}, {"trust_remote_code": False}):
        assert type(AutoConfig.from_pretrained(directory, **options)) is LlamaConfig
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
        assert type(model) is LlamaForCausalLM
        assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_a_copy_saved_without_the_module_does_not_name_it(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_flatq.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def log_likelihood(directory: Path, context: str, continuation: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    before = tokenizer(context, return_tensors="pt")["input_ids"]
    whole = tokenizer(f"{context} {continuation}", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logs = model(whole).logits[0, :-1].log_softmax(-1)
    picked = logs.gather(1, whole[0, 1:, None])[before.shape[1] - 1 :]
    return float(picked.sum())


def test_the_stock_lm_eval_gives_an_export_s_likelihoods(exported, tmp_path):
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w3", "w7 w2"], "answer": i % 2} for i in range(4)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "four.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    done = python(
        tmp_path, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={exported},trust_remote_code=True",
        "--tasks", "four", "--include_path", str(tmp_path), "--device", "cpu",
        "--output_path", str(tmp_path / "out.json"), "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (samples,) = tmp_path.glob("samples_four*.jsonl")
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(written) == len(rows)
    for sample in written:
        row = rows[sample["doc_id"]]
        for choice, ((said, _),) in zip(row["choices"], sample["resps"], strict=True):
            assert float(said) == pytest.approx(log_likelihood(exported, row["question"], choice), rel=1e-3)
