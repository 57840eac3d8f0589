from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flatq_cli.errors import UsageError, WorkError
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.stages import export as stage
from flatq_cli.stages.export import export, verify
from flatq_cli.store.atomic import file_sha256
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import FAMILIES, fused_run, tiny_model_dir

SILENT = SilentProgress()
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return fused_run(tmp_path, "qwen2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fused_run(tmp_path_factory.mktemp("run"), "llama")
    export(run, "flatq", None, SILENT)
    return run


@pytest.fixture
def copied(llama: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.path / "export/flatq", tmp_path / "copy"))


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in directory.iterdir() if file.name != "manifest.json"}


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def by_hand(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the even one low; written without flatq's packing."""
    rows = [[(row[j] & 15) | ((row[j + 1] & 15) << 4) for j in range(0, len(row), 2)] for row in codes.tolist()]
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_fuse_stage_with_packed_codes(tmp_path, family):
    run = fused_run(tmp_path, family, epochs=1)
    result = export(run, "flatq", None, SILENT)
    fused, exported = tensors_in(run.path / "fuse"), tensors_in(Path(result["path"]))
    expected = {
        name.replace("weight_codes", "weight_packed"): by_hand(t) if name.endswith("weight_codes") else t
        for name, t in fused.items()
    }
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], t) and exported[name].dtype == t.dtype for name, t in expected.items())
    assert result["verified"]["codes"] == 14
    assert result["verified"]["logits_max_difference"] <= 1e-5


@pytest.mark.parametrize(
    "sections",
    [
        {"weights": {"bits": 8, "symmetric": False, "group": 8}, "activations": {"bits": 8, "symmetric": False}},
        {"weights": {"bits": 3}, "kv_cache": {"bits": 16}},
        {"weights": {"bits": 16}, "activations": {"bits": 16}},
        {"transform": {"kind": "none", "diagonal": "none"}, "weights": {"bits": 2}},
        {"transform": {"kind": "none", "diagonal": "smooth"}, "weights": {"clip": "none"}},
        {
            "transform": {"parametrization": "orthogonal", "init": "hadamard", "diagonal": "none"},
            "weights": {"rounding": "gptq"},
            "activations": {"clip": "none"},
            "calibration": {"epochs": 1},
        },
    ],
)
def test_other_recipes_export_and_verify(tmp_path, sections):
    result = export(fused_run(tmp_path, "qwen3", **sections), "flatq", None, SILENT)
    assert result["verified"]["logits_max_difference"] <= 1e-5
    assert result["verified"]["codes"] == (
        0 if sections["weights"].get("bits") == 16 and "transform" not in sections else 14
    )


def test_the_figures_are_those_of_the_files(run):
    result = export(run, "flatq", None, SILENT)
    directory = Path(result["path"])
    assert result["bytes"] == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(run.config.model.location)  # tied: one embedding
    assert result["float16_bytes"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert result["compression"] == result["float16_bytes"] / result["bytes"]
    manifest = run.stage("export/flatq").manifest
    assert manifest.status == "done"
    assert {"path": result["path"], **manifest.metrics} == result
    assert {item.file: item.sha256 for item in manifest.items.values()} == hashes(directory)


def test_config_and_tokenizer_are_the_original_s(run):
    directory = Path(export(run, "flatq", None, SILENT)["path"])
    config = AutoConfig.from_pretrained(directory)
    original = AutoConfig.from_pretrained(run.config.model.location)
    different = {
        key
        for key in config.to_dict().keys() | original.to_dict().keys()
        if config.to_dict().get(key) != original.to_dict().get(key)
    }
    assert different == {"quantization_config", "auto_map", "_name_or_path"}
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.quantization_config["recipe"]["weights"]["bits"] == 4
    ours, theirs = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(run.config.model.location)
    assert ours("w1 w22 w39")["input_ids"] == theirs("w1 w22 w39")["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 1


def test_the_index_names_every_tensor_and_the_files_are_for_pytorch(llama):
    directory = llama.path / "export/flatq"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = tensors_in(directory)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert b'"format":"pt"' in (directory / "model-00001-of-00003.safetensors").read_bytes()[:4096]


def test_a_second_export_does_nothing(run, monkeypatch):
    first = export(run, "flatq", None, SILENT)
    monkeypatch.setattr(stage, "verify", lambda *args: pytest.fail("was made again"))
    assert export(run, "flatq", None, SILENT) == first


def test_an_export_that_was_killed_goes_on_and_gives_the_same_bytes(run, monkeypatch):
    expected = hashes(Path(export(run, "flatq", None, SILENT)["path"]))
    shutil.rmtree(run.path / "export")
    packed, calls = stage.packed_tensors, []

    def killed(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return packed(*args)

    monkeypatch.setattr(stage, "packed_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        export(run, "flatq", None, SILENT)
    result = export(run, "flatq", None, SILENT)
    assert len(calls) == 4  # two blocks before, the last shard after
    assert hashes(Path(result["path"])) == expected


def test_a_shard_that_was_damaged_later_is_made_again(run):
    directory = Path(export(run, "flatq", None, SILENT)["path"])
    expected = hashes(directory)
    file = directory / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    export(run, "flatq", None, SILENT)
    assert hashes(directory) == expected


def test_out_takes_the_export_elsewhere(run, tmp_path):
    out = tmp_path / "some where" / "model"
    result = export(run, "flatq", out, SILENT)
    assert result["path"] == str(out)
    assert (out / "manifest.json").is_file()
    assert not (run.path / "export").exists()
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.quant_method == "flatq"
    assert export(run, "flatq", out, SILENT) == result


def test_out_does_not_write_over_something_else(run, tmp_path):
    model = tiny_model_dir(tmp_path / "other", "llama")
    before = hashes(model)
    with pytest.raises(UsageError, match="not empty, and not an export"):
        export(run, "flatq", model, SILENT)
    with pytest.raises(UsageError, match="not empty, and not an export"):
        export(run, "flatq", run.path / "fuse", SILENT)
    assert hashes(model) == before
    run.stage("fuse").require_done("flatq export")


def test_an_unknown_format_and_an_unfused_run_are_refused(run):
    with pytest.raises(UsageError, match="--format gguf: not one of flatq"):
        export(run, "gguf", None, SILENT)
    shutil.rmtree(run.path / "fuse")
    with pytest.raises(UsageError, match="no finished fuse stage"):
        export(run, "flatq", None, SILENT)


# verify


def flip_a_code(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.weight_packed"][3, 5] ^= 0x10


def nudge(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] *= 1 + 2**-20

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flip_a_code, f"{Q}.weight_codes"),
        (nudge(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
        (nudge("model.layers.0.sites.query.right"), "model.layers.0.sites.query.right"),
        (nudge("model.layers.0.input_layernorm.weight"), "model.layers.0.input_layernorm.weight"),
        (lambda tensors: tensors.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
    ],
)
def test_one_wrong_bit_in_an_export_is_found_and_its_tensor_named(llama, copied, change, named, monkeypatch):
    monkeypatch.setenv("FLATQ_VERIFY", "0")  # else its digest is what tells (runtime/integrity.py)
    verify(open_fused(llama), copied)
    edit(copied / "model-00001-of-00003.safetensors", change)
    with pytest.raises(WorkError, match=named):
        verify(open_fused(llama), copied)


def loads_wrongly(directory: Path, load=stage._load):
    """An export of which one linear computes something else."""
    model = load(directory)
    linear = next(module for module in model.modules() if isinstance(module, PackedLinear))
    linear.register_forward_hook(lambda module, args, output: output * 1.01)
    return model


def test_a_forward_pass_that_differs_is_found_though_all_tensors_are_equal(llama, copied, monkeypatch):
    monkeypatch.setattr(stage, "_load", loads_wrongly)
    with pytest.raises(WorkError, match="logits differ"):
        verify(open_fused(llama), copied)


def test_an_export_whose_verification_fails_is_not_done(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_load", loads_wrongly)
        with pytest.raises(WorkError, match="logits differ"):
            export(run, "flatq", None, SILENT)
    assert not run.stage("export/flatq").done
    assert export(run, "flatq", None, SILENT)["verified"]["codes"] == 14
