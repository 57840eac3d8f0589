from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from flatq_cli.runtime.kv_cache import PackedLayer
from flatq_cli.runtime.pack_cache import pack_cache
from flatq_cli.runtime.static_cache import PackedStaticLayer
from tests.runtime.caches import GREEDY, HEAD_DIM, Pair, make_pair, padded_prompts, site, states
from tests.runtime.tape import Tape
from tests.tiny import tiny_tokens

ROOM = 40
PROMPT = 7
STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static"}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Half the time to compile."""
    return make_pair(tmp_path_factory.mktemp("one"), "llama", {"num_hidden_layers": 1})


def static_cache(model: PreTrainedModel, room: int = ROOM) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=room)


def layer(room: int = ROOM, bits: int = 4, symmetric: bool = False) -> PackedStaticLayer:
    return PackedStaticLayer(site("key", bits, symmetric), site("value", bits, symmetric), room)


def tensors(packed: PackedStaticLayer) -> list[Tensor]:
    return [*packed.key_rows.parts, *packed.value_rows.parts, packed.cumulative_length, packed.lengths]


@torch.no_grad()
def steps(model: PreTrainedModel, forward: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of a prompt, as the model runs it, and of each further token, through `forward`."""
    found = [model(ids[:, :PROMPT], cache=cache, use_cache=True).logits]
    for begin in range(PROMPT, ids.shape[1]):
        found.append(forward(input_ids=ids[:, begin : begin + 1], cache=cache, use_cache=True).logits)
    return torch.cat(found, 1)


# ---- It is the cache of the fake-quant model. ----


@pytest.mark.parametrize("chunk", [None, 4])
def test_generation_is_that_of_the_fused_model(pair, chunk):
    expected = pair.fused.generate(**padded_prompts(), **GREEDY)
    cache = static_cache(pair.loaded)
    tokens = pair.loaded.generate(**padded_prompts(), **GREEDY, cache=cache, prefill_chunk_size=chunk)
    assert torch.equal(tokens, expected)
    shorter = pair.loaded.config.layer_types if hasattr(pair.loaded.config, "layer_types") else []
    window = getattr(pair.loaded.config, "sliding_window", None) or ROOM
    for index, each in enumerate(cache.layers):
        sliding = shorter[index] == "sliding_attention" if shorter else True
        assert type(each) is (StaticSlidingWindowLayer if sliding and window < ROOM else PackedStaticLayer)


def test_beam_search_is_that_of_the_fused_model(llama):
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = llama.fused.generate(**padded_prompts(), **GREEDY, **options)
    assert torch.equal(llama.loaded.generate(**padded_prompts(), **STATIC, **options), expected)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (3, True)])
def test_rows_are_those_of_the_cache_that_grows(bits, symmetric):
    packed = layer(100, bits, symmetric)
    growing = PackedLayer(packed.key_rows.site, packed.value_rows.site)
    for seed, tokens in enumerate((70, 1, 1, 5)):
        x = states(tokens, 2, seed=seed)
        pairs = list(zip(packed.update(x, 2 * x), growing.update(x, 2 * x), strict=True))
    for ours, wanted in pairs:
        assert ours.lengths.tolist() == [77, 77]
        numbers = ours.dequantize(torch.float32)
        assert torch.equal(numbers[:, :, :77], wanted.dequantize(torch.float32))
        assert numbers.shape[2] == 100
        assert not numbers[:, :, 77:].any()  # what is masked must not be NaN


@pytest.mark.parametrize(("mask", "rows"), [(None, 3), (torch.ones(1, 1, 3, 9, dtype=torch.bool), 9)])
def test_what_new_tokens_see_is_what_the_mask_speaks_of(mask, rows):
    packed = layer()
    keys, _ = packed.update(states(3), states(3))
    seen = keys.seen(3, mask)
    assert (seen.start, seen.end) == (0, rows)
    assert (seen.lengths is None) == (mask is None)


# ---- It is a static cache. ----


def test_it_answers_as_the_stock_layer_does():
    packed, stock = layer(), StaticLayer(ROOM)
    for tokens in (0, 9, 1, 4):
        if tokens:
            packed.update(states(tokens), states(tokens))
            stock.update(states(tokens), states(tokens))
        assert packed.get_mask_sizes(3) == stock.get_mask_sizes(3)
        assert int(packed.get_seq_length()) == int(stock.get_seq_length())
        assert packed.get_max_length() == stock.get_max_length()
        assert (packed.is_compileable, packed.is_croppable) == (stock.is_compileable, stock.is_croppable)
    for each in (packed, stock):
        each.crop(-5)
        assert int(each.get_seq_length()) == 9
    assert packed.lengths.tolist() == [9]


def test_nothing_of_it_ever_moves():
    packed = layer()
    packed.update(states(9, 3), states(9, 3))
    before = [tensor.data_ptr() for tensor in tensors(packed)]
    packed.update(states(1, 3), states(1, 3))
    packed.crop(-4)
    packed.reorder_cache(torch.tensor([2, 0, 0]))
    packed.reset()
    packed.update(states(2, 3), states(2, 3))
    assert [tensor.data_ptr() for tensor in tensors(packed)] == before


def test_sequences_can_be_rearranged():
    packed, x = layer(), states(9, 3)
    before, _ = (part.dequantize(torch.float32) for part in packed.update(x, x))
    packed.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(packed.key_rows.states(packed.lengths).dequantize(torch.float32), before[[2, 0, 0]])


def test_at_2048_tokens_it_takes_less_than_0_30_of_bf16():
    packed = layer(2048)
    packed.update(states(1), states(1))
    assert packed.nbytes <= 0.30 * 2 * 2 * 3 * 2048 * HEAD_DIM


def test_a_copy_goes_its_own_way():
    packed = layer()
    packed.update(states(5), states(5))
    twin = copy.deepcopy(packed)
    assert twin.key_rows.site is packed.key_rows.site
    twin.update(states(2), states(2))
    assert (packed.lengths.tolist(), twin.lengths.tolist()) == ([5], [7])
    assert not {t.data_ptr() for t in tensors(packed)} & {t.data_ptr() for t in tensors(twin)}


def test_one_that_was_filled_in_inference_mode_goes_on_outside_it(llama):
    cache = static_cache(llama.loaded)
    with torch.inference_mode():
        llama.loaded(tiny_tokens(), cache=cache)
    assert steps(llama.loaded, llama.loaded, tiny_tokens(2, PROMPT + 2), cache).isfinite().all()


# ---- Who gets it. ----


def test_a_cache_allocated_ahead_of_its_first_token_is_packed_and_stays_allocated(llama):
    cache = static_cache(llama.loaded)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert pack_cache(cache, [(block.sites.key, block.sites.value) for block in llama.loaded.model.layers])
    before = [tensor.data_ptr() for tensor in tensors(cache.layers[0])]
    steps(llama.loaded, llama.loaded, tiny_tokens(), cache)
    assert [tensor.data_ptr() for tensor in tensors(cache.layers[0])] == before


def test_one_that_holds_something_or_moves_to_the_cpu_stays(llama):
    filled, offloading = static_cache(llama.loaded), static_cache(llama.loaded)
    steps(llama.fused, llama.fused, tiny_tokens(), filled)
    offloading.offloading = True
    sites = [(block.sites.key, block.sites.value) for block in llama.loaded.model.layers]
    assert not pack_cache(filled, sites)
    assert not pack_cache(offloading, sites)
    assert not pack_cache(static_cache(llama.loaded), sites[:1])
    assert {type(each) for cache in (filled, offloading) for each in cache.layers} == {StaticLayer}


def test_one_that_was_emptied_is_packed_for_the_model_that_uses_it_next(llama):
    cache, twin, ids = static_cache(llama.loaded), copy.deepcopy(llama.loaded), tiny_tokens(2, PROMPT + 2)
    expected = steps(llama.loaded, llama.loaded, ids, cache)
    kept = list(cache.layers)
    cache.reset()
    assert torch.equal(steps(llama.loaded, llama.loaded, ids, cache), expected)
    assert cache.layers == kept
    cache.reset()
    steps(twin, twin, ids, cache)
    assert cache.layers[0].key_rows.site is twin.model.layers[0].sites["key"]


# ---- Captured and compiled. ----


@torch.no_grad()
def test_a_recorded_decode_step_goes_on_when_it_is_repeated_on_the_same_memory(llama):
    model, ids = llama.loaded, tiny_tokens(2, PROMPT + 5)
    expected = steps(model, model, ids, static_cache(model))
    cache, token, tape = static_cache(model), ids[:, PROMPT : PROMPT + 1].clone(), Tape()
    model(ids[:, :PROMPT], cache=cache, use_cache=True)
    with tape:
        logits = model(input_ids=token, cache=cache, use_cache=True).logits
    for at in range(PROMPT, PROMPT + 5):
        if at > PROMPT:
            token.copy_(ids[:, at : at + 1])
            tape.replay()
        assert torch.equal(logits, expected[:, at : at + 1])
    assert cache.layers[1].lengths.tolist() == [PROMPT + 5] * 2


@torch.no_grad()
def test_a_step_over_the_cache_that_grows_cannot_be_repeated(llama):
    """Else the test above would show nothing."""
    model, ids = llama.loaded, tiny_tokens(2, PROMPT + 2)
    expected = steps(model, model, ids, DynamicCache(config=model.config))
    cache, token, tape = DynamicCache(config=model.config), ids[:, PROMPT : PROMPT + 1].clone(), Tape()
    model(ids[:, :PROMPT], cache=cache, use_cache=True)
    with tape:
        logits = model(input_ids=token, cache=cache, use_cache=True).logits
    token.copy_(ids[:, PROMPT + 1 :])
    tape.replay()
    assert not torch.equal(logits, expected[:, -1:])
    with pytest.raises(AssertionError, match="makes the host wait"), Tape():
        bool(token[0, 0] > 0)


@pytest.mark.parametrize(("blocks", "backend"), [("llama", "eager"), ("one_block", "aot_eager")])
def test_a_compiled_decode_step_is_one_graph_that_serves_every_token(blocks, backend, request):
    llama = request.getfixturevalue(blocks)
    ids = tiny_tokens(2, PROMPT + 6)
    expected = steps(llama.loaded, llama.loaded, ids, static_cache(llama.loaded))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(llama.loaded.forward, backend=backend, fullgraph=True)
    found = steps(llama.loaded, compiled, ids, static_cache(llama.loaded))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_prompt_may_be_compiled_too(one_block):
    ids = tiny_tokens(2, PROMPT + 3)
    expected = steps(one_block.loaded, one_block.loaded, ids, static_cache(one_block.loaded))
    torch._dynamo.reset()
    compiled: Any = torch.compile(one_block.loaded.forward, backend="eager")
    found = steps(compiled, compiled, ids, static_cache(one_block.loaded))
    torch.testing.assert_close(found, expected)


def test_generate_compiles_decode_steps_as_it_does_for_float_models(one_block):
    expected = one_block.fused.generate(**padded_prompts(), **GREEDY)
    how = CompileConfig(backend="eager", fullgraph=True, mode=None)
    how._compile_all_devices = True  # of transformers, to do on a CPU what it does on a GPU
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(one_block.loaded.generate(**padded_prompts(), **STATIC, compile_config=how), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_step_over_the_cache_that_grows_gives_the_same(one_block):
    ids = tiny_tokens(2, PROMPT + 3)
    config = one_block.loaded.config
    expected = steps(one_block.loaded, one_block.loaded, ids, DynamicCache(config=config))
    torch._dynamo.reset()
    compiled = torch.compile(one_block.loaded.forward, backend="eager")
    torch.testing.assert_close(steps(one_block.loaded, compiled, ids, DynamicCache(config=config)), expected)
