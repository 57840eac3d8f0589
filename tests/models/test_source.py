from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flatq_cli.errors import UsageError
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source, run_block, run_in_batches


def tokens(vocabulary: int, batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stream(source: BlockSource, input_ids: torch.Tensor, **options: str) -> torch.Tensor:
    hidden = source.embed(input_ids)
    for i, kwargs in enumerate(source.block_kwargs(hidden, **options)):
        hidden = run_block(source.block(i, **options), hidden, kwargs)
    return source.head()(hidden)


def test_streaming_block_by_block_gives_the_models_logits(any_config, make_dir):
    directory = make_dir(any_config)
    input_ids = tokens(any_config.vocab_size)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(input_ids).logits
    torch.testing.assert_close(stream(open_source(locate(str(directory))), input_ids), expected, rtol=0, atol=1e-6)


def test_streaming_with_eager_attention_gives_the_models_logits(any_config, make_dir):
    directory = make_dir(any_config)
    input_ids = tokens(any_config.vocab_size)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")(input_ids).logits
    actual = stream(open_source(locate(str(directory))), input_ids, attention="eager")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_assembled_model_gives_the_same_logits_and_generates_the_same_text(any_config, make_dir):
    directory = make_dir(any_config)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assembled = open_source(locate(str(directory))).assemble()
    prompt = tokens(any_config.vocab_size, batch=1, length=7)
    with torch.no_grad():
        torch.testing.assert_close(assembled(prompt).logits, reference(prompt).logits, rtol=0, atol=1e-6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert assembled.generate(prompt, **options).tolist() == reference.generate(prompt, **options).tolist()
    assert {name: tensor.dtype for name, tensor in assembled.named_buffers()} == {
        name: tensor.dtype for name, tensor in reference.named_buffers()
    }
    assert assembled.state_dict().keys() == reference.state_dict().keys()


def test_the_assembled_model_saves_and_loads_again(config_of, make_dir, tmp_path):
    model = open_source(locate(str(make_dir(config_of("qwen2"))))).assemble(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_blocks_of_an_assembled_model_follow_its_attention(llama_dir):
    calls: list[int] = []

    def counted(module, query, *args, **kwargs):
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", sdpa_mask)
    source = open_source(locate(str(llama_dir)))
    input_ids = tokens(48)
    model = source.assemble()
    expected = model(input_ids).logits
    assert calls == []
    model.set_attn_implementation("counted")
    torch.testing.assert_close(model(input_ids).logits, expected)
    assert calls == [0, 1, 2]
    torch.testing.assert_close(stream(source, input_ids, attention="counted"), expected, rtol=0, atol=1e-6)
    assert calls == [0, 1, 2, 0, 1, 2]


def test_an_attention_that_nobody_registered_is_refused(llama_dir):
    with pytest.raises(ValueError, match="'flash_attention_99' is not registered"):
        open_source(locate(str(llama_dir))).block(0, attention="flash_attention_99")


def test_assemble_takes_blocks_from_the_caller(llama_dir):
    source = open_source(locate(str(llama_dir)))

    def without_attention(i: int) -> torch.nn.Module:
        block = source.block(i)
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        return block

    input_ids = tokens(48)
    changed, original = source.assemble(without_attention)(input_ids).logits, source.assemble()(input_ids).logits
    assert not torch.allclose(changed, original)


def test_nothing_of_the_source_keeps_a_block_alive(llama_dir):
    source = open_source(locate(str(llama_dir)))
    block, embedding, head = source.block(1), source.read_embedding(), source.head()
    run_block(block, source.embed(tokens(48)), source.block_kwargs(torch.zeros(1, 19, 32))[1])
    used = [weakref.ref(tensor) for module in (block, embedding, head) for tensor in module.parameters()]
    assert len(used) == 9 + 1 + 2
    del block, embedding, head
    gc.collect()
    assert [reference() for reference in used] == [None] * len(used)
    assert all(parameter.device.type == "meta" for parameter in source.skeleton().parameters())


def test_using_a_block_leaves_the_skeleton_as_it_was(any_config, make_dir):
    source = open_source(locate(str(make_dir(any_config))))
    before = copy.deepcopy(source.skeleton())
    hidden = source.embed(tokens(any_config.vocab_size))
    source.block_kwargs(hidden, attention="eager")
    source.block(0, attention="eager").self_attn.config.sliding_window = 3
    source.head()
    source.assemble(dtype=torch.bfloat16)
    after = source.skeleton()
    assert repr(after) == repr(before)
    assert after.config.to_dict() == before.config.to_dict()
    assert after.config._attn_implementation == "sdpa"
    for (name, old), (_, new) in zip(before.named_buffers(), after.named_buffers(), strict=True):
        assert torch.equal(old, new), name


def test_blocks_of_one_kind_share_their_arguments(config_of, make_dir):
    source = open_source(locate(str(make_dir(config_of("qwen2 with a sliding window from block 1")))))
    first, second, third = source.block_kwargs(torch.zeros(4, 19, 32))
    assert second["attention_mask"] is third["attention_mask"]
    assert first["attention_mask"] is not second["attention_mask"]
    assert first["position_embeddings"] is third["position_embeddings"]
    # A batch of one: the memory of the arguments does not grow with the calibration batch.
    assert second["attention_mask"].shape == (1, 1, 19, 19)
    assert first.get("past_key_values") is None  # transformers 5.24 leaves it out


def test_a_block_comes_in_the_dtype_asked_for_and_frozen(make_dir, config_of):
    directory = make_dir(AutoModelForCausalLM.from_config(config_of("qwen3"), dtype=torch.bfloat16))
    source = open_source(locate(str(directory)))
    assert source.checkpoint.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in source.block_tensors(0).values()} == {torch.bfloat16}
    block = source.block(0)
    assert not block.training
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert source.embed(tokens(48)).dtype == torch.float32


def test_the_rotary_buffers_of_old_checkpoints_are_ignored(llama_dir):
    weights = load_file(llama_dir / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, llama_dir / "model.safetensors", metadata={"format": "pt"})
    open_source(locate(str(llama_dir))).block(0)


def test_a_head_that_contradicts_tied_embeddings_is_used_as_transformers_does(config_of, make_dir):
    directory = make_dir(config_of("llama tied"))
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(48, 32)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    input_ids = tokens(48)
    source = open_source(locate(str(directory)))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(input_ids).logits
        torch.testing.assert_close(stream(source, input_ids), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(source.assemble()(input_ids).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.embed_tokens.weight", r"no tensor model\.embed_tokens\.weight"),
        ("model.norm.weight", r"no tensor model\.norm\.weight"),
        ("lm_head.weight", r"no tensor lm_head\.weight"),
    ],
)
def test_a_missing_tensor_is_named(llama_dir, name, message):
    weights = load_file(llama_dir / "model.safetensors")
    del weights[name]
    save_file(weights, llama_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=message):
        open_source(locate(str(llama_dir))).assemble()


def test_a_superfluous_tensor_and_a_wrong_shape_are_named(llama_dir):
    weights = load_file(llama_dir / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 32)
    save_file(weights, llama_dir / "model.safetensors", metadata={"format": "pt"})
    source = open_source(locate(str(llama_dir)))
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_proj\.bias has no place"):
        source.block(0)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.k_proj\.weight is \[8, 32\].*\[16, 32\]"):
        source.block(1)


def test_a_model_that_is_quantized_already_is_refused(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (llama_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"quantized already \(gptq\)"):
        open_source(locate(str(llama_dir)))


def test_an_unsupported_architecture_is_refused_before_weights_are_read(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    config["model_type"] = "gpt_neox"
    (llama_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="unsupported architecture 'gpt_neox': supported are llama"):
        open_source(locate(str(llama_dir)))


def test_a_model_type_that_nobody_knows_is_one_line(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    config["model_type"] = "no_such_model"
    (llama_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no_such_model") as caught:
        open_source(locate(str(llama_dir)))
    assert "\n" not in str(caught.value)


def test_smollm2_from_gguf_streams_to_the_logits_transformers_gives(smollm2_gguf):
    directory, file = str(smollm2_gguf.parent), smollm2_gguf.name
    input_ids = tokens(49152)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file)
    with torch.no_grad():
        expected = model(input_ids).logits
    source = open_source(locate(str(smollm2_gguf)))
    assert source.num_blocks == 30
    torch.testing.assert_close(stream(source, input_ids), expected, rtol=0, atol=1e-4)
    # Bit for bit, tensor by tensor.
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert source.checkpoint.names() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(source.checkpoint.read(name), tensor), name


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_any_size_give_the_whole_and_may_replace_their_input(make_dir, config_of, batch):
    source = open_source(locate(str(make_dir(config_of("llama")))))
    hidden = source.embed(tokens(48, batch=3))
    block, kwargs = source.block(0), source.block_kwargs(hidden[:1])[0]
    whole = run_block(block, hidden, kwargs)
    before = hidden.clone()
    torch.testing.assert_close(run_in_batches(block, hidden, kwargs, batch, "cpu"), whole)
    assert torch.equal(hidden, before)
    assert run_in_batches(block, hidden, kwargs, batch, "cpu", into=hidden) is hidden
    torch.testing.assert_close(hidden, whole)
