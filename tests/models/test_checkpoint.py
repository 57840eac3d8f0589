from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from flatq_cli.errors import UsageError
from flatq_cli.models.checkpoint import GgufCheckpoint, SafetensorsCheckpoint, _dequantized
from flatq_cli.models.locate import locate
from flatq_cli.models.source import open_source


@pytest.fixture
def sharded_dir(make_dir, config_of) -> Path:
    directory = make_dir(config_of("llama"), max_shard_size="12KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def test_shards_hold_what_the_index_says(sharded_dir):
    checkpoint = SafetensorsCheckpoint(sharded_dir)
    reference = AutoModelForCausalLM.from_pretrained(sharded_dir).state_dict()
    assert checkpoint.names() == reference.keys()
    assert checkpoint.dtype == torch.float32
    for name, tensor in reference.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def test_tensors_come_in_the_dtype_they_are_stored_in(llama_dir):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(llama_dir / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, llama_dir / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(llama_dir)
    # The dtype of the model is that of most of its weights.
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.read("model.norm.weight").dtype == torch.float32
    assert checkpoint.read("lm_head.weight").dtype == torch.bfloat16


def test_a_missing_shard_is_named(sharded_dir):
    lost = shards(sharded_dir)[2]
    lost.unlink()
    with pytest.raises(UsageError, match=f"missing: {lost.name}"):
        locate(str(sharded_dir))
    with pytest.raises(UsageError, match=f"{lost.name}: no such file"):
        SafetensorsCheckpoint(sharded_dir)


@pytest.mark.parametrize("keep", [4, 200, -8])
def test_a_truncated_shard_is_named_before_the_work_starts(sharded_dir, keep):
    shard = shards(sharded_dir)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UsageError, match=f"{shard.name}: truncated or corrupt"):
        open_source(locate(str(sharded_dir)))


def test_a_corrupt_header_is_named(llama_dir):
    file = llama_dir / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"model\.safetensors: truncated or corrupt"):
        SafetensorsCheckpoint(llama_dir)


def test_a_file_that_is_truncated_after_opening_names_file_and_tensor(llama_dir):
    checkpoint = SafetensorsCheckpoint(llama_dir)
    file = llama_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot read tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")


def test_a_tensor_that_the_index_promises_and_no_shard_holds_is_named(sharded_dir):
    index = sharded_dir / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = shards(sharded_dir)[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"model\.layers\.9\.mlp\.up_proj\.weight is missing"):
        SafetensorsCheckpoint(sharded_dir)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_none_is_one_line(sharded_dir, content):
    (sharded_dir / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UsageError, match="index"):
        SafetensorsCheckpoint(sharded_dir)


def test_an_unknown_tensor_is_named(llama_dir):
    with pytest.raises(UsageError, match="no tensor nothing"):
        SafetensorsCheckpoint(llama_dir).read("nothing")


def write_gguf(path: Path, directory: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """A model directory as llama.cpp's converter writes a Qwen2 or Qwen3 (which are not permuted), in float32."""
    config = AutoConfig.from_pretrained(directory)
    names = gguf.get_tensor_name_map(
        {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type], config.num_hidden_layers
    )
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in {**load_file(directory / "model.safetensors"), **(extra or {})}.items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(gguf_name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_with_biases_reads_as_transformers_reads_it(make_dir, config_of, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_dir(config_of("qwen2")))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    checkpoint = open_source(locate(str(path))).checkpoint
    assert checkpoint.dtype == torch.float16
    assert "model.layers.2.self_attn.v_proj.bias" in checkpoint.names()
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), reference.state_dict()[name]), name


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (48, 96), (997, 32), (40, 16384)])
def test_rows_that_are_dequantized_together_are_what_gguf_makes_of_each(kind, shape):
    data = gguf.quantize(np.random.default_rng(0).normal(size=shape).astype(np.float32), kind)
    found = _dequantized(SimpleNamespace(data=data, tensor_type=kind))
    np.testing.assert_array_equal(found, gguf.dequantize(data, kind), strict=True)


def test_a_gguf_tensor_without_a_place_in_the_model_is_refused(make_dir, config_of, tmp_path):
    extra = {"blk.1.attn_output.bias": torch.ones(32)}
    path = write_gguf(tmp_path / "tiny.gguf", make_dir(config_of("qwen2")), extra)
    with pytest.raises(UsageError, match=r"blk\.1\.attn_output\.bias has no place"):
        open_source(locate(str(path)))


def test_a_truncated_gguf_is_named(make_dir, config_of, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", make_dir(config_of("qwen2")))
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UsageError, match=r"tiny\.gguf: truncated or corrupt"):
        GgufCheckpoint(path, config)
    with pytest.raises(UsageError, match=r"tiny\.gguf"):
        open_source(locate(str(path)))


def test_rope_factors_that_transformers_ignores_are_said(make_dir, config_of, tmp_path, caplog):
    path = write_gguf(tmp_path / "tiny.gguf", make_dir(config_of("qwen2")), {"rope_freqs.weight": torch.ones(4)})
    open_source(locate(str(path)))
    assert "tiny.gguf: transformers ignores the rope factors" in caplog.text
