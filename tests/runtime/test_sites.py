from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flatq_cli.config.recipe import Recipe
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import ATTENTION, OnlineSite, attach_sites, online_sites
from tests.reference import array, block_forward, quantize_rows, rotate
from tests.tiny import (
    FAMILIES,
    folded_block,
    fused_run,
    random_transforms,
    tiny_source,
    tiny_tokens,
    without_quantizers,
)

NAMES = {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value", "query"}


class Seen(nn.Module):
    """A site that lets x through and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x.detach().clone())
        return x


def some_hidden(source: BlockSource, tokens: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, tokens, source.shapes.hidden, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def run(block: nn.Module, source: BlockSource, hidden: torch.Tensor, index: int = 0) -> torch.Tensor:
    return run_block(block, hidden, source.block_kwargs(hidden, ATTENTION)[index])


def quantized_block(source: BlockSource, recipe: Recipe | None = None, clip: float = 0.8) -> nn.Module:
    """Block 0 with random transforms folded in and clips that differ from site to site and from max to min."""
    layouts = block_layout(recipe or Recipe(), source.family, source.shapes)
    block = folded_block(source, 0, layouts, random_transforms(layouts))
    for i, site in enumerate(block.sites.values()):
        if site.clip is not None:
            site.clip.copy_(torch.tensor([clip - 0.03 * i, clip + 0.01 * i]))
    return block


@pytest.mark.parametrize("name", FAMILIES)
def test_each_site_sees_its_activation_once_a_forward(tmp_path: Path, name: str):
    """Three linears read `attn_in`, two `mlp_in`; queries, keys and values are those after RoPE (and q and k norms)."""
    source = tiny_source(tmp_path, name)
    sites = {site: Seen() for site in NAMES}
    block = attach_sites(source.block(0, attention=ATTENTION), source.family, sites)
    hidden = some_hidden(source)
    output = run(block, source, hidden)
    expected, activations = block_forward(source.block_tensors(0), source.config, hidden)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for site, values in activations.items():
        (seen,) = sites[site].inputs
        np.testing.assert_allclose(seen, values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=site)


def test_rope_in_the_attention_function_is_that_of_the_positions(tmp_path: Path):
    """By hand from the linears' outputs, with no norm in between: pairs (i, i + d/2) turn by position · θ^(-2i/d)."""
    source = tiny_source(tmp_path, "qwen2")
    sites = {site: Seen() for site in ("query", "key", "value")}
    block = attach_sites(source.block(0, attention=ATTENTION), source.family, sites)
    outputs: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        block.self_attn.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: outputs.update({name: out})
        )
    run(block, source, some_hidden(source))
    for name, site, turned in (("q_proj", "query", True), ("k_proj", "key", True), ("v_proj", "value", False)):
        heads = array(outputs[name]).reshape(2, 11, -1, source.shapes.head_dim).swapaxes(1, 2)
        (seen,) = sites[site].inputs
        np.testing.assert_allclose(seen, rotate(heads, 10000.0) if turned else heads, rtol=0, atol=1e-5)


def test_hooks_are_attached_once(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    block = quantized_block(source)
    hooks = {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in block.named_modules()
    }
    assert {name: counts for name, counts in hooks.items() if counts != (0, 0)} == {
        "input_layernorm": (0, 1),
        "post_attention_layernorm": (0, 1),
        "self_attn.o_proj": (1, 0),
        "mlp.down_proj": (1, 0),
    }


def test_sites_on_a_block_that_has_some_are_refused(tmp_path: Path):
    """The hooks of the first would stay, and everything be quantized twice."""
    source = tiny_source(tmp_path, "llama")
    block = quantized_block(source)
    with pytest.raises(ValueError, match="has sites already"):
        attach_sites(block, source.family, {})


def test_the_state_holds_the_tensors_of_each_site_once_under_the_documented_names(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in quantized_block(source).state_dict().items()}
    stock = set(source.block(0).state_dict())
    assert {name: shape for name, shape in shapes.items() if name not in stock} == {
        "sites.attn_in.left": (4, 4),
        "sites.attn_in.right": (8, 8),
        "sites.attn_in.clip": (2,),
        "sites.attn_out.left": (4, 4),
        "sites.attn_out.clip": (2,),
        "sites.mlp_in.left": (4, 4),
        "sites.mlp_in.right": (8, 8),
        "sites.mlp_in.clip": (2,),
        "sites.mlp_out.left": (7, 7),
        "sites.mlp_out.right": (8, 8),
        "sites.mlp_out.clip": (2,),
        "sites.key.right": (8, 8),
        "sites.key.clip": (2,),
        "sites.query.right": (8, 8),
        "sites.value.clip": (2,),
    }
    assert stock < shapes.keys()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("site", ["key", "value"])
def test_keys_and_values_are_quantized_per_token_and_head(tmp_path: Path, site: str, symmetric: bool):
    source = tiny_source(tmp_path, "qwen3")
    recipe = Recipe.model_validate({"kv_cache": {"bits": 4, "symmetric": symmetric}})
    block = quantized_block(source, recipe)
    module = block.sites[site]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_hook(lambda m, args, output: calls.append((args[0], output)))
    run(block, source, some_hidden(source))
    ((before, after),) = calls
    shapes = source.shapes
    assert before.shape == after.shape == (2, shapes.kv_heads, 11, shapes.head_dim)
    transformed = array(before) @ (np.eye(shapes.head_dim) if module.right is None else array(module.right))
    clip = array(module.clip)
    assert clip[0] != clip[1]
    for sequence in range(2):
        for head in range(shapes.kv_heads):
            for token in range(11):
                vector = transformed[sequence, head, token]
                ratio, codes, scale, zero = quantize_rows(vector, 4, symmetric, clip)
                assert len(np.unique(codes)) <= 16
                firm = np.abs(ratio % 1 - 0.5) > 1e-4  # not within rounding of a tie
                got = array(after[sequence, head, token])
                np.testing.assert_allclose(got[firm], ((codes - zero) * scale)[firm], rtol=0, atol=1e-5)
                assert firm.mean() > 0.9


def test_what_one_token_and_head_holds_does_not_change_the_codes_of_another(tmp_path: Path):
    site = online_sites(block_layout(Recipe(), (s := tiny_source(tmp_path, "llama")).family, s.shapes))["key"]
    keys = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    loud = keys.clone()
    loud[0, 1, 3] *= 100
    differs = (site(keys) != site(loud)).any(-1)
    assert differs.nonzero().tolist() == [[0, 1, 3]]


def test_activations_are_quantized_per_token(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    block = quantized_block(source)
    module = block.sites["mlp_out"]
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_hook(lambda m, args, output: calls.append((args[0], output)))
    run(block, source, some_hidden(source))
    ((before, after),) = calls
    transformed = array(before) @ np.kron(array(module.left), array(module.right))
    ratio, codes, scale, _ = quantize_rows(transformed, 4, True, array(module.clip))
    firm = np.abs(ratio % 1 - 0.5) > 1e-3
    np.testing.assert_allclose(array(after)[firm], (codes * scale)[firm], rtol=0, atol=1e-4)
    assert firm.mean() > 0.99


def test_sites_stay_float32_when_the_model_changes_its_dtype(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    block = quantized_block(source)
    before = {name: tensor.clone() for name, tensor in block.sites.state_dict().items()}
    for convert in (
        lambda: block.to(torch.bfloat16),
        block.half,
        block.double,
        lambda: block.to("cpu", torch.bfloat16),
    ):
        convert()
        for name, tensor in block.sites.state_dict().items():
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name]), name
    assert block.self_attn.q_proj.weight.dtype == torch.bfloat16
    hidden = some_hidden(source).bfloat16()
    output = run(block, source, hidden)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_a_copied_block_runs_through_its_own_sites(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    original, hidden = quantized_block(source), some_hidden(source)
    expected = run(original, source, hidden)
    twin = copy.deepcopy(original)
    assert torch.equal(run(twin, source, hidden), expected)
    for name in NAMES:
        changed = copy.deepcopy(original)
        site = changed.sites[name]
        part = next(tensor for tensor in (site.left, site.right, site.clip) if tensor is not None)
        part.mul_(0.5)
        assert not torch.equal(run(changed, source, hidden), expected), name
        assert torch.equal(run(original, source, hidden), expected), name


def test_a_stock_block_and_one_with_sites_run_side_by_side(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    hidden = some_hidden(source)
    before = run_block(source.block(0), hidden, source.block_kwargs(hidden)[0])
    quantized = run(quantized_block(source), source, hidden)
    after = run_block(source.block(0), hidden, source.block_kwargs(hidden)[0])
    assert torch.equal(before, after)
    assert not torch.allclose(before, quantized)


def test_a_site_without_transform_and_quantizer_is_the_identity():
    layout = SiteLayout("x", 6, 2, 3, left=False, right=False, diag=False, bits=16, symmetric=True, clip=False)
    x = torch.randn(2, 6)
    assert torch.equal(OnlineSite(layout)(x), x)


def test_the_transform_runs_in_the_dtype_of_the_activation():
    layout = SiteLayout("x", 6, 2, 3, left=True, right=True, diag=False, bits=16, symmetric=True, clip=False)
    site = OnlineSite(layout)
    site.left.copy_(torch.randn(2, 2))
    site.right.copy_(torch.randn(3, 3))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(4, 6).to(dtype)
        expected = x.double() @ torch.kron(site.left.double(), site.right.double())
        result = site(x)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(tmp_path: Path, family: str):
    """In float64, so that no code falls on the other side of a tie when a matmul has other sizes."""
    run = fused_run(tmp_path, family)
    model = BlockSource.assemble(open_fused(run), dtype=torch.float64)
    ids = tiny_tokens(batch=2, length=13)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for first, last in ((0, 4), *((i, i + 1) for i in range(4, 13))):
            output = model(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_generation_is_the_same_with_and_without_a_cache(tmp_path: Path):
    model = BlockSource.assemble(open_fused(fused_run(tmp_path, "llama")), dtype=torch.float64)
    prompt = tiny_tokens(batch=1, length=5)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.ones_like(prompt)
    with_cache, without = (model.generate(prompt, use_cache=cached, **options) for cached in (True, False))
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    for left, right in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_modules_exist_for_what_runs_online_and_nothing_for_what_is_folded(tmp_path: Path):
    source = tiny_source(tmp_path, "llama")
    layouts = block_layout(Recipe(), source.family, source.shapes)
    sites = online_sites(layouts)
    assert sites.keys() == NAMES
    assert sites["value"].right is None
    assert sites["attn_out"].right is None
    assert sites["query"].bits == 16
    assert sites["query"].clip is None
    off = online_sites(without_quantizers(layouts))
    assert all(site.clip is None and site.bits == 16 for site in off.values())
