from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from flatq_cli.errors import UsageError
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.transformers_plugin import FlatqConfig
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import FAMILIES, fused_run

TOKENS = torch.tensor([[5, 17, 2, 40, 33, 17, 8, 21]])
FLOAT32 = ("weight_scale", ".left", ".right", ".clip", ".bias")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run = fused_run(tmp_path_factory.mktemp("run"), request.param, epochs=1, dtype=torch.bfloat16)
    return run, Path(export(run, "flatq", None, SilentProgress())["path"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fused_run(tmp_path_factory.mktemp("run"), "llama", weights={"symmetric": False, "group": 8})
    return Path(export(run, "flatq", None, SilentProgress())["path"])


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_greedy_generation_is_that_of_the_fused_model(exported):
    run, directory = exported
    fused = open_fused(run).assemble()
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    expected = fused.generate(TOKENS, **options)
    assert torch.equal(loaded.generate(TOKENS, **options), expected)
    assert expected.shape == (1, 20)


def test_the_default_dtype_is_the_model_s_own_and_what_must_be_float32_is(exported):
    model = AutoModelForCausalLM.from_pretrained(exported[1])
    assert model.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    kept = {name: tensor.dtype for name, tensor in model.named_buffers() if name.endswith(FLOAT32)}
    assert len(kept) > 20
    assert set(kept.values()) == {torch.float32}


def test_bfloat16_gives_the_logits_of_the_fused_model_in_bfloat16(exported):
    run, directory = exported
    fused = open_fused(run).assemble(dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(fused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_and_reload_is_bit_equal(exported, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(exported[1], dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    assert torch.equal(logits(model), logits(again))


def test_the_tokenizer_comes_along(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    assert len(tokenizer("w1 w22 w3")["input_ids"]) >= 3
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1 "


@pytest.mark.parametrize(
    "imports",
    [
        "import flatq_cli; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import flatq_cli",
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import flatq_cli, flatq_cli",
    ],
)
def test_an_export_loads_whichever_is_imported_first(llama, imports):
    code = f"""
{imports}
model = AutoModelForCausalLM.from_pretrained({str(llama)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "PackedLinear", done.stderr


def test_importing_flatq_imports_neither_torch_nor_transformers():
    code = "import flatq_cli, sys; print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_model_without_its_head_loads_too(llama):
    whole, base = AutoModelForCausalLM.from_pretrained(llama), AutoModel.from_pretrained(llama)
    with torch.no_grad():
        assert torch.equal(whole.model(TOKENS).last_hidden_state, base(TOKENS).last_hidden_state)


def test_another_attention_implementation_is_not_used(llama):
    plain = AutoModelForCausalLM.from_pretrained(llama)
    eager = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    assert eager.config._attn_implementation == "flatq"
    assert torch.equal(logits(eager), logits(plain))


def test_a_float_model_is_not_quantized_on_the_fly(llama):
    source = llama.parents[2] / "tiny llama"
    config = json.loads((llama / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=FlatqConfig(**config))


SHARD = "model-00001-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), f"tensor {Q}.weight_scale is missing"),
        (lambda t: t.pop("model.layers.0.sites.key.right"), "tensor model.layers.0.sites.key.right is missing"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(32, 1)}), rf"{Q}.weight_scale is \[32, 1\].*\[32, 4\]"),
        (lambda t: t.update({f"{Q}.weight_packed": torch.ones(32, 16)}), f"{Q}.weight_packed is F32, not U8"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), f"{Q}.weight has no place"),
    ],
)
def test_a_tensor_that_is_not_right_is_named(copied, change, message):
    edit(copied / SHARD, change)
    with pytest.raises(UsageError, match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_truncated_file_is_named(copied):
    data = (copied / SHARD).read_bytes()
    (copied / SHARD).write_bytes(data[:-10])
    with pytest.raises(UsageError, match=rf"{SHARD}: truncated or corrupt"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "flatq/2", "flatq_version": "9.0"}, "format 'flatq/2' .*flatq 9.0.* reads flatq/1"),
        ({"recipe": {"weights": {}}}, "recipe lacks activations, kv_cache, transform"),
        ({"speed": 3}, "unknown keys: speed"),
    ],
)
def test_a_config_of_another_format_is_refused(copied, change, message):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= change
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_wrong_value_in_the_recipe_is_named(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["recipe"]["weights"]["bits"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"recipe\.weights\.bits"):
        AutoModelForCausalLM.from_pretrained(copied)
