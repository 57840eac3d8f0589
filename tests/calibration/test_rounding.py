from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq_cli.calibration import rounding
from flatq_cli.calibration.rounding import FoldedBlock, fold_block, round_gptq, round_nearest, run_with, running_tensors
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
    source = ready.source
    return attach_sites(source.block(0), source.family, online_sites(ready.layouts(recipe)))


def gptq(ready: Prepared, folded: FoldedBlock, **options: Any) -> dict[str, dict[str, Tensor]]:
    arguments: dict[str, Any] = {"hidden": ready.hidden, "kwargs": ready.kwargs, "batch": 3} | options
    return round_gptq(folded, sited_block(ready), ready.source.family, RECIPE.weights, **arguments)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gptq_moves_the_blocks_output_less_than_the_nearest_codes(tmp_path: Path, name: str):
    ready = prepare(tmp_path, name, samples=16, seqlen=32)
    folded = folded_block(ready)
    block = sited_block(ready)
    exact = run_with(block, running_tensors(folded), ready.hidden, ready.kwargs, 4)
    error = {}
    for kind, rounded in (
        ("nearest", round_nearest(folded, ready.source.family, RECIPE.weights)),
        ("gptq", gptq(ready, folded)),
    ):
        output = run_with(block, running_tensors(folded, rounded), ready.hidden, ready.kwargs, 4)
        error[kind] = float((output - exact).pow(2).sum())
    assert error["gptq"] < 0.9 * error["nearest"]


def test_each_linear_is_rounded_against_what_it_reads_when_all_before_it_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """down_proj's codes, from inputs noted in a run of the block whose other linears are rounded already."""
    monkeypatch.setattr(rounding, "fast_matmuls", lambda device: contextlib.nullcontext())
    ready = prepare(tmp_path, samples=16, seqlen=32)
    folded = folded_block(ready)
    rounded = gptq(ready, folded)
    block = sited_block(ready)
    seen: list[Tensor] = []
    block.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = {linear: parts for linear, parts in rounded.items() if linear != "mlp.down_proj"}
    run_with(block, running_tensors(folded, before), ready.hidden, ready.kwargs, 16)
    rows = torch.cat(seen).flatten(0, 1)
    weight = folded.parameters["mlp.down_proj.weight"].float()
    clip = folded.weight_clips["mlp.down_proj"]
    moment = (rows.T @ rows) / len(rows)
    expected = gptq_weight(weight, moment, bits=4, group=0, symmetric=True, clip=clip)
    same = (rounded["mlp.down_proj"][CODES] == expected[CODES]).float().mean()
    assert same > 0.99  # the moment of one large batch differs from that of small ones in the last bits
    assert torch.equal(rounded["mlp.down_proj"][SCALE], expected[SCALE])


def test_the_blocks_own_tensors_and_hooks_stay_as_they_were(tmp_path: Path):
    ready = prepare(tmp_path)
    block = sited_block(ready)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    hooks = len(block.get_submodule("mlp.down_proj")._forward_pre_hooks)
    round_gptq(folded_block(ready), block, ready.source.family, RECIPE.weights, ready.hidden, ready.kwargs, 4)
    assert len(block.get_submodule("mlp.down_proj")._forward_pre_hooks) == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
