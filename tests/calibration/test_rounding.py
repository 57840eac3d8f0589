from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq_cli.calibration.moments import gptq_stride
from flatq_cli.calibration.rounding import (
    FoldedBlock,
    fold_block,
    round_gptq,
    round_nearest,
    run_running,
    running_block,
    running_tensors,
)
from flatq_cli.config.recipe import Recipe
from flatq_cli.quantization.gptq import gptq_weight
from flatq_cli.quantization.weights import CODES, SCALE
from flatq_cli.runtime.sites import attach_sites, online_sites
from tests.calibration.prepare import CPU, Prepared, prepare

RECIPE = Recipe.model_validate({"activations": {"bits": 8}, "kv_cache": {"bits": 8}})


def folded_block(ready: Prepared, recipe: Recipe = RECIPE) -> FoldedBlock:
    learnable = ready.learnable(recipe)
    source = ready.source
    return fold_block(
        source.block_tensors(0), learnable.plain(), ready.layouts(recipe), source.family, source.shapes, CPU
    )


def sited_block(ready: Prepared, recipe: Recipe = RECIPE) -> torch.nn.Module:
    """Without its weights: what it runs with is set by whoever uses it."""
    source = ready.source
    return attach_sites(source.empty_block(0), source.family, online_sites(ready.layouts(recipe)))


def gptq(ready: Prepared, folded: FoldedBlock, **options: Any) -> dict[str, dict[str, Tensor]]:
    arguments: dict[str, Any] = {"hidden": ready.hidden.clone(), "kwargs": ready.kwargs, "batch": 3} | options
    return round_gptq(folded, sited_block(ready), ready.source.family, RECIPE.weights, **arguments)


def output(ready: Prepared, folded: FoldedBlock, rounded: dict[str, dict[str, Tensor]] | None, batch: int) -> Tensor:
    """The block's own, with the linears in `rounded` rounded."""
    block = running_block(sited_block(ready), running_tensors(folded, rounded))
    return torch.cat([run_running(block, rows, ready.kwargs) for rows in ready.hidden.split(batch)])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gptq_moves_the_blocks_output_less_than_the_nearest_codes(tmp_path: Path, name: str):
    ready = prepare(tmp_path, name, samples=16, seqlen=32)
    folded = folded_block(ready)
    exact = output(ready, folded, None, 4)
    error = {}
    for kind, rounded in (
        ("nearest", round_nearest(folded, ready.source.family, RECIPE.weights)),
        ("gptq", gptq(ready, folded)),
    ):
        error[kind] = float((output(ready, folded, rounded, 4) - exact).pow(2).sum())
    assert error["gptq"] < 0.9 * error["nearest"]


@pytest.mark.parametrize("site", ["attn_in", "attn_out", "mlp_in", "mlp_out"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_each_linear_is_rounded_against_what_it_reads_when_all_before_it_are_rounded(
    tmp_path: Path, name: str, site: str
):
    """Its codes, from inputs noted in one run of the whole block whose linears before it are rounded already: of this
    many tokens, from every third.
    """
    ready = prepare(tmp_path, name, samples=96, seqlen=32)
    folded, family = folded_block(ready), ready.source.family
    rounded = gptq(ready, folded)
    linears = family.site(site).readers
    before = {linear: rounded[linear] for linear in family.linears[: family.linears.index(linears[0])]}
    for linear in linears:
        block = running_block(sited_block(ready), running_tensors(folded, before))
        seen: list[Tensor] = []
        block.get_submodule(linear).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        run_running(block, ready.hidden, ready.kwargs)
        (rows,) = (x.flatten(0, 1) for x in seen)
        assert gptq_stride(96, 32, rows.shape[1]) == 3
        rows = rows[1::3]
        expected = gptq_weight(
            folded.parameters[f"{linear}.weight"].float(),
            rows.T @ rows / len(rows),
            bits=4,
            group=0,
            symmetric=True,
            clip=folded.weight_clips[linear],
        )
        same = (rounded[linear][CODES] == expected[CODES]).float().mean()
        assert same > 0.99  # the moment of one large batch differs from that of small ones in the last bits
        assert torch.equal(rounded[linear][SCALE], expected[SCALE])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_prefix_goes_on_with_what_the_rounded_block_puts_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bf16: bool
):
    """Though modules whose output is known did not run again."""
    if bf16:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    ready = prepare(tmp_path, name)
    folded, hidden = folded_block(ready), ready.hidden.clone()
    rounded = gptq(ready, folded, hidden=hidden)
    assert torch.equal(hidden, output(ready, folded, rounded, 3))
    assert not torch.equal(hidden, ready.hidden)


def test_a_rounded_block_and_what_it_kept_are_gone_when_it_is_done(tmp_path: Path):
    """By reference counts: cycles would keep blocks, and the inputs of all their linears, until some collection."""
    ready = prepare(tmp_path)
    block, folded = sited_block(ready), folded_block(ready)
    alive = weakref.ref(block)
    gc.collect()
    gc.disable()
    try:
        round_gptq(folded, block, ready.source.family, RECIPE.weights, ready.hidden, ready.kwargs, 4)
        del block
        assert alive() is None
    finally:
        gc.enable()
