from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flatq_cli.kernels.kv_quant import dequantize_cache
from flatq_cli.quantization.packing import unpack
from flatq_cli.quantization.quantizers import quantize
from flatq_cli.runtime.kv_cache import PackedLayer, PackedRows, PackedStates, capacity_for, packed_rows
from tests.runtime.caches import GREEDY, HEAD_DIM, Pair, make_pair, padded_prompts, site, states
from tests.tiny import tiny_tokens


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("mistral"), "mistral", {})


def generated(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    return model.generate(**inputs, **GREEDY, **options, cache=cache), cache


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, cache=cache, use_cache=True).logits


def is_packed(cache: Any) -> bool:
    return all(isinstance(layer, PackedLayer) for layer in cache.layers)


def layer(window: int | None = None, width: int = HEAD_DIM) -> PackedLayer:
    return PackedLayer(site("key", width=width), site("value", width=width), window)


def test_greedy_generation_from_prompts_of_different_lengths_is_that_of_the_fused_model(pair):
    expected, stock = generated(pair.fused, padded_prompts())
    tokens, cache = generated(pair.loaded, padded_prompts())
    assert torch.equal(tokens, expected)
    assert len(set(tokens[:, -20:].flatten().tolist())) > 3  # not one token over and over, which anything repeats
    assert is_packed(cache)
    assert not any(isinstance(each, PackedLayer) for each in stock.layers)
    assert cache.get_seq_length() == stock.get_seq_length() == 9 + 23


def test_beam_search_is_that_of_the_fused_model(pair):
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected, _ = generated(pair.fused, padded_prompts(), **options)
    tokens, cache = generated(pair.loaded, padded_prompts(), **options)
    assert torch.equal(tokens, expected)
    assert is_packed(cache)


def test_a_prompt_in_pieces_is_the_prompt(pair):
    expected, _ = generated(pair.fused, padded_prompts())
    tokens, cache = generated(pair.loaded, padded_prompts(), prefill_chunk_size=4)
    assert torch.equal(tokens, expected)
    assert is_packed(cache)


def test_drafts_that_are_cropped_again_leave_no_trace(pair, monkeypatch):
    cropped: list[int] = []
    crop = PackedLayer.crop
    monkeypatch.setattr(PackedLayer, "crop", lambda self, n: (cropped.append(n), crop(self, n))[1])
    prompt = {"input_ids": tiny_tokens(1, 9).repeat(1, 2)}  # what comes twice is drafted
    expected, _ = generated(pair.fused, prompt)
    tokens, cache = generated(pair.loaded, prompt, prompt_lookup_num_tokens=3)
    assert torch.equal(tokens, expected)
    assert is_packed(cache)
    assert min(cropped) < 0


def test_going_back_and_on_another_way_is_as_if_never_gone(pair):
    ids, other = tiny_tokens(2, 12), tiny_tokens(2, 7, seed=5)
    for model in pair[:2]:
        straight, returned = DynamicCache(config=model.config), DynamicCache(config=model.config)
        returned.activate_past_recording()
        logits(model, ids[:, :8], straight)
        logits(model, ids, returned)
        returned.crop(-4)
        assert returned.get_seq_length() == 8
        torch.testing.assert_close(logits(model, other, returned), logits(model, other, straight))


def test_the_codes_are_those_of_the_transformed_keys_and_values_bit_for_bit(pair, monkeypatch):
    came: dict[int, list[tuple[Tensor, Tensor]]] = {}
    update = PackedLayer.update

    def recorded(self, key, value, *args, **kwargs):
        came.setdefault(id(self), []).append((key.clone(), value.clone()))
        return update(self, key, value, *args, **kwargs)

    monkeypatch.setattr(PackedLayer, "update", recorded)
    _, cache = generated(pair.loaded, padded_prompts())
    for block, stored in zip(pair.loaded.model.layers, cache.layers, strict=True):
        for part, (name, rows) in enumerate((("key", stored.key_rows), ("value", stored.value_rows))):
            sites = block.sites
            pieces = []
            for arrived in came[id(stored)]:
                x = arrived[part]
                x = (x.reshape(-1, x.shape[-1]) @ sites[name].right).view(x.shape) if name == "key" else x
                pieces.append(quantize(x, 4, False, sites[name].clip))
            codes, scale, zero = (
                torch.cat(tensors, dim=2)[:, :, -len(rows) :] for tensors in zip(*pieces, strict=True)
            )
            assert 1 < len(rows) == codes.shape[2]
            used = slice(rows.start, rows.end)
            assert torch.equal(unpack(rows.parts[0][:, :, used], 4, codes.shape[-1], False).float(), codes)
            assert torch.equal(rows.parts[1][:, :, used], scale.squeeze(-1))
            assert torch.equal(rows.parts[2][:, :, used].float(), zero.squeeze(-1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 12, 5])
def test_what_is_read_is_what_the_site_fake_quantizes(bits, symmetric, dtype, width):
    key, value = site("key", bits, symmetric, width), site("value", bits, symmetric, width)
    packed = PackedLayer(key, value)
    pieces = [states(tokens, 2, width=width, seed=tokens).to(dtype) for tokens in (70, 1, 1, 5)]
    for piece in pieces:
        keys, values = packed.update(piece, 2 * piece)
    assert torch.equal(keys.dequantize(dtype), torch.cat([key(piece) for piece in pieces], dim=2))
    assert torch.equal(values.dequantize(dtype), torch.cat([value(2 * piece) for piece in pieces], dim=2))
    assert (keys.zero is None) == symmetric


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernels_read_the_same_numbers_from_the_same_tensors(bits):
    keys, _ = PackedLayer(site("key", bits), site("value", bits)).update(states(70, 2), states(70, 2))
    assert keys.zero is not None
    whole = dequantize_cache(keys.codes, keys.scale, keys.zero, HEAD_DIM, torch.float32)
    assert whole.shape == (2, 3, keys.codes.shape[2], HEAD_DIM)
    assert torch.equal(whole[:, :, keys.start : keys.end], keys.dequantize(torch.float32))
    assert all(part.is_contiguous() for part in (keys.codes, keys.scale, keys.zero))


@pytest.mark.parametrize("prompt", [2048, 2000, 1000, 1])
def test_at_2048_tokens_the_cache_takes_less_than_0_30_of_bf16(prompt):
    packed = layer()
    packed.update(states(prompt), states(prompt))
    for _ in range(2048 - prompt):
        packed.update(states(1), states(1))
    assert packed.get_seq_length() == 2048
    parts = (*packed.key_rows.parts, *packed.value_rows.parts)
    assert packed.nbytes == sum(part.untyped_storage().nbytes() for part in parts)
    assert packed.nbytes <= 0.30 * 2 * 2 * 3 * 2048 * HEAD_DIM


def test_a_token_is_appended_without_moving_the_others():
    packed = layer()
    packed.update(states(1000), states(1000))
    places = []
    for _ in range(1000):
        packed.update(states(1), states(1))
        places.append(packed.key_rows.parts[0].data_ptr())
    moved = sum(before != after for before, after in pairwise(places))
    assert moved <= 1000 / 32


def test_with_a_window_memory_stays_that_of_the_window():
    packed, window = layer(window=100), 100
    keys, _ = packed.update(states(3000), states(3000))
    assert keys.dequantize(torch.float32).shape[2] == 3000  # the prompt's first tokens look further back
    del keys
    for _ in range(500):
        keys, _ = packed.update(states(1), states(1))
        assert keys.end - keys.start == window
        assert packed.key_rows.capacity <= 2 * capacity_for(window)
    assert packed.get_seq_length() == 3500


@pytest.mark.parametrize("window", [None, 1000, 40, 5])
def test_masks_are_those_of_the_stock_layer(window):
    packed = layer(window)
    stock = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    for step, tokens in enumerate((0, 9, 1, 1, 30, 1, 4)):
        if step:
            keys, _ = packed.update(states(tokens), states(tokens))
            expected, _ = stock.update(states(tokens), states(tokens))
            assert keys.end - keys.start == expected.shape[2]
        assert packed.get_mask_sizes(3) == stock.get_mask_sizes(3)
        assert packed.get_seq_length() == stock.get_seq_length()
        assert packed.get_max_length() == stock.get_max_length()
        assert packed.is_sliding == stock.is_sliding


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
)
def test_sequences_can_be_rearranged(arrange, expected):
    packed = layer(window=50)
    x = states(70, batch=3)
    keys, values = (part.dequantize(torch.float32) for part in packed.update(x, x))
    arrange(packed)
    keys_after, values_after = packed.update(x[expected, :, :1], x[expected, :, :1])
    kept = slice(0, keys_after.end - keys_after.start - 1)
    assert torch.equal(keys_after.dequantize(torch.float32)[:, :, kept], keys[expected, :, -49:])
    assert torch.equal(values_after.dequantize(torch.float32)[:, :, kept], values[expected, :, -49:])


def test_crop_takes_both_meanings_of_its_number():
    packed = layer()
    packed.update(states(20), states(20))
    packed.crop(-5)
    assert packed.get_seq_length() == len(packed.key_rows) == len(packed.value_rows) == 15
    packed.crop(7)  # as earlier versions say it: the length to keep
    assert packed.get_seq_length() == len(packed.key_rows) == 7
    packed.crop(-100)
    assert packed.get_seq_length() == len(packed.key_rows) == 0


def test_what_left_the_window_cannot_be_gone_back_to_unless_it_was_recorded():
    packed, recording = layer(window=10), layer(window=10)
    recording.activate_past_recording()
    for each in (packed, recording):
        each.update(states(25), states(25))
    with pytest.raises(RuntimeError, match=r"cannot go back 3 tokens.*sliding window of 10.*activate_past_recording"):
        packed.crop(-3)
    assert packed.get_seq_length() == 25
    recording.crop(-3)
    assert recording.get_seq_length() == 22
    assert len(recording.key_rows) == 9


def test_reset_empties_the_cache_for_another_batch(llama):
    _, cache = generated(llama.loaded, padded_prompts())
    cache.reset()
    assert cache.get_seq_length() == 0
    assert sum(each.nbytes for each in cache.layers) == 0
    ids = tiny_tokens(2, 5)
    assert torch.equal(logits(llama.loaded, ids, cache), logits(llama.loaded, ids, None))
    assert is_packed(cache)


def test_a_copied_cache_goes_its_own_way(pair):
    model, ids, other = pair.loaded, tiny_tokens(1, 9), tiny_tokens(1, 4, seed=3)
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache)
    twin = copy.deepcopy(cache)
    assert twin.layers[0].key_rows.site is cache.layers[0].key_rows.site
    logits(model, torch.full_like(other, 7), cache)
    again = DynamicCache(config=model.config)
    logits(model, ids, again)
    assert torch.equal(logits(model, other, twin), logits(model, other, again))


def test_a_copied_model_packs_with_its_own_sites(llama):
    twin = copy.deepcopy(llama.loaded)
    _, cache = generated(twin, padded_prompts())
    assert cache.layers[1].key_rows.site is twin.model.layers[1].sites["key"]
    assert cache.layers[1].key_rows.site is not llama.loaded.model.layers[1].sites["key"]


@pytest.mark.parametrize("with_config", [True, False])
def test_the_caller_s_cache_is_packed_in_place(pair, with_config):
    cache = DynamicCache(config=pair.loaded.config) if with_config else DynamicCache()
    stock = copy.deepcopy(cache)
    returned = pair.loaded(tiny_tokens(), cache=cache).cache
    pair.fused(tiny_tokens(), cache=stock)
    assert returned is cache
    assert is_packed(cache)
    assert cache.is_sliding == stock.is_sliding
    assert torch.equal(
        logits(pair.loaded, tiny_tokens(2, 3), cache).argmax(-1),
        logits(pair.fused, tiny_tokens(2, 3), stock).argmax(-1),
    )


@torch.no_grad()
def test_a_cache_that_transformers_would_make_is_packed(llama):
    assert is_packed(llama.loaded(tiny_tokens()).cache)
    assert is_packed(llama.loaded.model(tiny_tokens(), None, None, None, None, True).cache)
    assert llama.loaded(tiny_tokens(), use_cache=False).cache is None
    assert is_packed(AutoModel.from_pretrained(llama.directory, dtype=torch.float32)(tiny_tokens()).cache)


def test_recording_asked_for_before_the_first_token_is_kept(mistral):
    cache = DynamicCache(config=mistral.loaded.config)
    cache.activate_past_recording()
    logits(mistral.loaded, tiny_tokens(), cache)
    assert all(cache.is_recording_past(i) for i in range(len(cache)))


def test_a_filled_stock_cache_stays_and_gives_the_same(pair):
    expected = DynamicCache(config=pair.fused.config)
    logits(pair.fused, tiny_tokens(), expected)
    cache = copy.deepcopy(expected)
    following = tiny_tokens(2, 3, seed=8)
    after = logits(pair.loaded, following, cache)
    assert not any(isinstance(each, PackedLayer) for each in cache.layers)
    torch.testing.assert_close(after, logits(pair.fused, following, expected))


def test_a_model_in_training_keeps_the_stock_cache(llama):
    model = copy.deepcopy(llama.loaded).train()
    assert not is_packed(model(tiny_tokens()).cache)


def test_a_recipe_that_leaves_the_cache_alone_has_a_stock_cache(tmp_path):
    pair = make_pair(tmp_path, "llama", {}, kv_cache={"bits": 16})
    expected, _ = generated(pair.fused, padded_prompts())
    tokens, cache = generated(pair.loaded, padded_prompts())
    assert torch.equal(tokens, expected)
    assert [type(each) for each in cache.layers] == [DynamicLayer] * 2


@pytest.mark.parametrize("spec", [{"bits": 8}, {"bits": 3, "clip": "none"}, {"symmetric": True}])
def test_other_codes_generate_as_the_fused_model_does(tmp_path, spec):
    pair = make_pair(tmp_path, "llama", {}, kv_cache=spec)
    expected, _ = generated(pair.fused, padded_prompts())
    tokens, cache = generated(pair.loaded, padded_prompts())
    assert torch.equal(tokens, expected)
    assert is_packed(cache)


def test_a_cache_filled_in_inference_mode_goes_on_outside_it(mistral):
    cache = DynamicCache(config=mistral.loaded.config)
    with torch.inference_mode():
        mistral.loaded(tiny_tokens(), cache=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
    after = logits(mistral.loaded, tiny_tokens(2, 3), cache)
    assert after.isfinite().all()


def test_no_gradient_graph_grows_in_the_cache(llama):
    cache = llama.loaded(tiny_tokens()).cache
    parts = [part for each in cache.layers for part in (*each.key_rows.parts, *each.value_rows.parts)]
    assert len(parts) == 12
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_visible_and_alone(bad):
    packed, x = layer(), states(4)
    x[0, 1, 2, 3] = bad
    _, values = packed.update(states(4), x)
    finite = values.dequantize(torch.float32).isfinite()
    assert not finite[0, 1, 2].any()
    finite[0, 1, 2] = True
    assert finite.all()


def test_an_empty_store_has_no_bytes_and_grows_by_what_comes():
    rows = PackedRows(site())
    assert (len(rows), rows.capacity, rows.nbytes) == (0, 0, 0)
    rows.append(states(65))
    assert (len(rows), rows.capacity) == (65, 128)
    view = rows.last(10, HEAD_DIM)
    assert isinstance(view, PackedStates)
    assert (view.start, view.end) == (55, 65)
    codes, scale, zero = packed_rows(rows.site, states(65))
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert (codes.shape, scale.shape, zero.shape) == ((1, 3, 65, 32), (1, 3, 65), (1, 3, 65))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 2048, 100_000])
def test_capacities_are_multiples_of_64_and_waste_a_32nd(tokens):
    assert tokens <= capacity_for(tokens) < tokens * (1 + 1 / 32) + 64
    assert capacity_for(tokens) % 64 == 0
