from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.targets import open_target
from flatq_cli.store.progress import SilentProgress


def test_a_model_directory_is_float_and_streams_the_logits_of_the_loaded_model(tiny):
    target = open_target(str(tiny.directory), "cpu")
    windows = torch.randint(0, len(tiny.tokenizer), (2, 16))
    streamed = torch.stack(list(target.logits(windows, SilentProgress())))
    assert (target.kind, target.recipe, target.dtype) == ("float", None, torch.float32)
    torch.testing.assert_close(streamed, tiny.model(input_ids=windows).logits)
    torch.testing.assert_close(target.model()(input_ids=windows).logits, streamed)
    assert target.model() is target.model()


def test_a_family_that_flatq_does_not_know_is_loaded_whole(tiny, tmp_path: Path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny.tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    windows = torch.randint(0, len(tiny.tokenizer), (2, 16))
    target = open_target(str(tmp_path), "cpu")
    assert (target.kind, target.source) == ("float", None)
    torch.testing.assert_close(torch.stack(list(target.logits(windows, SilentProgress()))), model(windows).logits)


@pytest.mark.parametrize("spec", ["./nowhere", "smollm2-135n"])
def test_what_does_not_exist_is_neither_a_run_nor_a_model(spec: str):
    with pytest.raises(UsageError, match=rf"^{spec}: there is no run; nor a model: (?!--model)"):
        open_target(spec, "cpu")


def test_a_config_that_is_not_json_is_named(tiny, tmp_path: Path):
    broken = tmp_path / "model"
    shutil.copytree(tiny.directory, broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: not a JSON object"):
        open_target(str(broken), "cpu")


def test_an_export_of_another_method_is_packed_and_has_no_recipe(tiny, tmp_path: Path):
    other = tmp_path / "model"
    shutil.copytree(tiny.directory, other)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    target = open_target(str(other), "cpu")
    assert (target.kind, target.recipe, target.source) == ("packed", None, None)
