from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatq_cli.errors import UsageError
from flatq_cli.models.source import run_block
from flatq_cli.runtime.fused import dequantized, open_fused
from flatq_cli.runtime.sites import ATTENTION
from flatq_cli.store.run import Run
from tests.tiny import FAMILIES, calibrated_run, fused_run, tiny_model_dir, tiny_recipe, tiny_source, tiny_tokens

FLOAT = {"bits": 16}


@torch.no_grad()
def logits(run: Run) -> torch.Tensor:
    return open_fused(run).assemble()(tiny_tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_the_fused_blocks_gives_the_logits_of_the_assembled_model(tmp_path: Path, family: str):
    run = fused_run(tmp_path, family, epochs=1)
    source = open_fused(run)
    with torch.no_grad():
        hidden = source.embed(tiny_tokens())
        for i, kwargs in enumerate(source.block_kwargs(hidden, ATTENTION)):
            hidden = run_block(source.block(i), hidden, kwargs)
        streamed = source.head()(hidden)
    torch.testing.assert_close(streamed, logits(run))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_that_quantizes_nothing_is_the_original_model(tmp_path: Path, family: str):
    run = fused_run(tmp_path, family, weights=FLOAT, activations=FLOAT, kv_cache=FLOAT)
    with torch.no_grad():
        original = tiny_source(tmp_path, family).assemble()(tiny_tokens()).logits
    torch.testing.assert_close(logits(run), original, rtol=0, atol=1e-6)


def test_many_bits_come_near_the_original_and_few_do_not(tmp_path: Path):
    distance = {}
    for bits in (8, 3):
        (folder := tmp_path / str(bits)).mkdir()
        spec = {"bits": bits, "clip": "none"}
        run = fused_run(folder, "llama", weights=spec, activations=spec, kv_cache=spec)
        with torch.no_grad():
            original = tiny_source(folder, "llama").assemble()(tiny_tokens()).logits
        distance[bits] = float((logits(run) - original).norm() / original.norm())
    assert distance[8] < 0.05 < distance[3]


@pytest.mark.parametrize("spec", [{}, {"symmetric": False, "group": 8}, {"bits": 8, "symmetric": False}])
def test_the_weights_are_scale_times_code_minus_zero(tmp_path: Path, spec: dict[str, object]):
    run = fused_run(tmp_path, "llama", weights=spec)
    stored = load_file(next((run.path / "fuse").glob("model-00001-*")))
    block = open_fused(run).block(0)
    prefix = "model.layers.0."
    for name, tensor in block.state_dict().items():
        if f"{prefix}{name}" in stored:
            assert torch.equal(tensor, stored[prefix + name]), name
            continue
        linear = prefix + name.removesuffix(".weight_packed")
        codes, scale = stored[f"{linear}.weight_codes"], stored[f"{linear}.weight_scale"]
        zero = stored.get(f"{linear}.weight_zero", torch.zeros_like(scale, dtype=torch.int32))
        weight = block.get_submodule(name.removesuffix(".weight_packed")).dequantize()
        group = codes.shape[1] // scale.shape[1]
        for row, column in ((0, 0), (3, group - 1), (weight.shape[0] - 1, weight.shape[1] - 1)):
            of = row, column // group
            expected = float(scale[of]) * (int(codes[row, column]) - int(zero[of]))
            assert float(weight[row, column]) == pytest.approx(expected, rel=1e-6)


def test_tensors_without_codes_stay_as_they_are():
    tensors = {"a.weight": torch.randn(2, 2), "a.bias": torch.randn(2)}
    assert dequantized(tensors) == tensors


def test_only_the_configuration_comes_from_the_original_model(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    before = logits(run)
    file = Path(run.config.model.location) / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(run), before)


def test_a_run_whose_fuse_stage_did_not_finish_is_refused(tmp_path: Path):
    run = calibrated_run(tiny_model_dir(tmp_path, "llama"), tiny_recipe(tmp_path), tmp_path / "run")
    with pytest.raises(UsageError, match="no finished fuse stage, which `flatq eval` needs; run `flatq fuse"):
        open_fused(run)


def test_a_shard_that_was_cut_off_is_refused_by_name(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    shard = next((run.path / "fuse").glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UsageError, match=shard.name):
        open_fused(run)
