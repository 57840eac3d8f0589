from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq_cli.calibration import tune
from flatq_cli.calibration.tune import FreeNumbers, RunningBlock, Tuner, TuneSettings, graph_bytes
from flatq_cli.errors import WorkError
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.layout import block_layout
from flatq_cli.runtime.sites import attach_sites, online_sites
from flatq_cli.stages.calibrate import block_name
from flatq_cli.store.run import Run
from tests.tiny import fused_run, source_of, tiny_tokens

SETTINGS = TuneSettings(steps=12, learning_rate=2e-3, clip_rate=5.0, warmup=2)
STEADY = {"activations": {"bits": 8}, "kv_cache": {"bits": 8}}


@dataclass
class Stack:
    """A fused tiny model, ready to be tuned, and what the full-precision one puts out."""

    source: BlockSource
    run: Run
    fused: list[dict[str, Tensor]]
    free: list[FreeNumbers]
    blocks: list[RunningBlock]
    hidden: Tensor
    targets: Tensor
    kwargs: list[dict[str, Any]]

    @property
    def step(self) -> tuple[Any, ...]:
        return self.blocks.__getitem__, self.source.head(), self.hidden, self.targets, self.kwargs


def stack(folder: Path, name: str = "llama", **sections: Any) -> Stack:
    folder.mkdir(exist_ok=True)
    run = fused_run(folder, name, **sections)
    source = source_of(folder / f"tiny {name}")
    layouts = block_layout(run.config.recipe, source.family, source.shapes)
    fused = []
    for index in range(source.num_blocks):
        prefix = f"{source.family.layers}.{index}."
        fused.append({k.removeprefix(prefix): v for k, v in run.stage("fuse").load(block_name(index)).items()})
    blocks = [
        RunningBlock(attach_sites(source.block(i), source.family, online_sites(layouts)), tensors, source.family)
        for i, tensors in enumerate(fused)
    ]
    hidden = source.embed(tiny_tokens(4, 12))
    kwargs = source.block_kwargs(hidden[:1])
    targets = hidden
    with torch.no_grad():
        for i in range(source.num_blocks):
            targets = run_block(source.block(i), targets, kwargs[i])
    return Stack(source, run, fused, [FreeNumbers(t, source.family) for t in fused], blocks, hidden, targets, kwargs)


def test_at_its_start_a_block_holds_what_was_fused(tmp_path: Path):
    ready = stack(tmp_path, "qwen3")
    for fused, free in zip(ready.fused, ready.free, strict=True):
        stored = free.fused()
        assert {"self_attn.q_norm.weight", "sites.key.right", "sites.mlp_in.clip", "mlp.up_proj.weight_scale"} < set(
            stored
        )
        assert not any(name.endswith(("weight_codes", "bias")) for name in stored)
        for name, tensor in stored.items():
            assert tensor.dtype == fused[name].dtype
            torch.testing.assert_close(tensor, fused[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_tuned_rows_and_matrices_run_as_they_will_be_stored(tmp_path: Path, name: str):
    """With random learned numbers: the running block against the stored tensors in a plain fused block."""
    ready = stack(tmp_path, name, **STEADY)
    generator = torch.Generator().manual_seed(0)
    free, index = ready.free[1], 1
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        running = ready.blocks[index].run(free.tensors(), ready.hidden, ready.kwargs[index])
        fused = open_fused(ready.run)
        plain = fused.block(index)
        state = plain.state_dict()
        for key, tensor in free.fused().items():
            state[key].copy_(tensor)
        plain.load_state_dict(state)
        stored = run_block(plain, ready.hidden, fused.block_kwargs(ready.hidden[:1])[index])
    # 8-bit activations: a value on the border of two codes may fall either way.
    assert (running - stored).abs().mean() < 2e-3 * stored.abs().mean()


def test_gradients_are_those_of_the_whole_model_at_once(tmp_path: Path):
    ready = stack(tmp_path, **STEADY)
    loss = tune._gradients(ready.free, *ready.step)
    found = [parameter.grad.clone() for free in ready.free for parameter in free.parameters()]
    hidden = ready.hidden
    for i, free in enumerate(ready.free):
        free.zero_grad()
        hidden = ready.blocks[i].run(free.tensors(), hidden, ready.kwargs[i])
    head = ready.source.head()
    teacher, student = head(ready.targets).log_softmax(-1), head(hidden).log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    expected.backward()
    for gradient, parameter in zip(found, (p for free in ready.free for p in free.parameters()), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kept", [1, 2, 99])
def test_gradients_do_not_depend_on_how_many_graphs_are_kept(tmp_path: Path, kept: int):
    ready = stack(tmp_path)
    tune._gradients(ready.free, *ready.step)
    expected = [parameter.grad.clone() for free in ready.free for parameter in free.parameters()]
    for free in ready.free:
        free.zero_grad()
    tune._gradients(ready.free, *ready.step, kept)
    for gradient, parameter in zip(expected, (p for free in ready.free for p in free.parameters()), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_a_graph_is_larger_than_a_blocks_input_and_grows_with_the_batch(tmp_path: Path):
    ready = stack(tmp_path)
    one, four = (
        graph_bytes(ready.blocks[0], ready.free[0], ready.hidden[:n], ready.kwargs[0]) for n in (1, len(ready.hidden))
    )
    assert ready.hidden.nbytes < one
    assert 2 * one < four


@pytest.mark.parametrize("bf16", [False, True])
def test_tuning_lowers_the_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bf16})
    ready = stack(tmp_path)
    tuner = Tuner(ready.free, SETTINGS)
    losses = [tuner.step(*ready.step) for _ in range(SETTINGS.steps)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_tuning_taken_up_again_goes_on_to_the_same_bits(tmp_path: Path):
    ready = [stack(tmp_path / name) for name in "abc"]
    whole, part, rest = (Tuner(each.free, SETTINGS) for each in ready)
    expected = [whole.step(*ready[0].step) for _ in range(5)]
    for _ in range(3):
        part.step(*ready[1].step)
    rest.resume(part.state())
    assert [rest.step(*ready[2].step) for _ in range(2)] == expected[3:]
    for a, b in zip(whole.parameters, rest.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_divergence_that_is_no_number_names_the_step_and_leaves_what_was_learned(tmp_path: Path):
    ready = stack(tmp_path)
    tuner = Tuner(ready.free, SETTINGS)
    tuner.step(*ready.step)
    before = [parameter.detach().clone() for parameter in tuner.parameters]
    ready.hidden[0, 0, 0] = torch.nan
    with pytest.raises(WorkError, match=r"tuning, step 1: .* lower tune.learning_rate"):
        tuner.step(*ready.step)
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.parameters, strict=True))


def test_the_rate_rises_then_falls_to_nothing():
    rates = [tune._rate(step, SETTINGS) for step in range(SETTINGS.steps)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
