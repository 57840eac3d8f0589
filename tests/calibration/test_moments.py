from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flatq_cli.calibration.moments import (
    LEAST_TOKENS,
    MOST_ROWS,
    Recorder,
    SecondMoment,
    moment_stride,
    output_moment_by_head,
    partial_trace,
    recorders,
    weight_moment,
)
from flatq_cli.models.source import run_block
from tests.calibration.prepare import prepare
from tests.reference import array, block_forward
from tests.tiny import FAMILIES

SITES = {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value", "query"}


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3 with prime widths"])
def test_moments_and_maxima_are_those_of_the_activations(tmp_path: Path, name: str):
    ready = prepare(tmp_path, name)
    _, activations = block_forward(ready.source.block_tensors(0), ready.source.config, ready.hidden)
    assert ready.recorded.keys() == activations.keys() == SITES
    for site, recorder in ready.recorded.items():
        rows = activations[site].reshape(-1, activations[site].shape[-1])
        assert recorder.rows == len(rows)
        assert (recorder.moment.dtype, recorder.maximum.dtype) == (torch.float32, torch.float32)
        moment = rows.T @ rows / len(rows)
        np.testing.assert_allclose(recorder.moment, moment, rtol=0, atol=1e-5 * np.abs(moment).max(), err_msg=site)
        np.testing.assert_allclose(recorder.maximum, np.abs(rows).max(0), rtol=1e-4, err_msg=site)


def test_what_the_linears_of_a_stock_block_read_is_what_is_recorded(tmp_path: Path):
    """By hooks on a block that flatq has not touched."""
    ready = prepare(tmp_path, "qwen2")
    block, family = ready.source.block(0), ready.source.family
    read: dict[str, torch.Tensor] = {}
    for linear in family.linears:
        hook = lambda m, args, linear=linear: read.update({linear: args[0]})  # noqa: E731
        block.get_submodule(linear).register_forward_pre_hook(hook)
    run_block(block, ready.hidden, ready.source.block_kwargs(ready.hidden)[0])
    for site in family.sites:
        for reader in site.readers:
            rows = array(read[reader]).reshape(-1, read[reader].shape[-1])
            np.testing.assert_allclose(
                ready.recorded[site.name].moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5, err_msg=reader
            )


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_moments_do_not_depend_on_the_batches(tmp_path: Path, batch: int):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = prepare(tmp_path / "a", batch=batch), prepare(tmp_path / "b", batch=4)
    for site in SITES:
        torch.testing.assert_close(one.recorded[site].moment, other.recorded[site].moment, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.recorded[site].maximum, other.recorded[site].maximum, rtol=1e-5, atol=1e-6)


def test_a_recorder_lets_its_input_through_and_keeps_a_sample_of_its_rows():
    recorder = Recorder(3)
    batches = [torch.randn(2, 400, 3), torch.randn(5, 3)]
    assert all(recorder(batch) is batch for batch in batches)
    rows = {tuple(row) for batch in batches for row in batch.reshape(-1, 3).tolist()}
    sample = [tuple(row) for row in recorder.sample.tolist()]
    assert set(sample) <= rows
    assert len(set(sample)) == len(sample)
    assert 5 < len(sample) < len(rows)
    assert set(map(tuple, batches[1].tolist())) <= set(sample)


def test_the_sample_of_many_batches_is_bounded_and_comes_from_all_of_them():
    recorder = Recorder(1)
    for batch in range(200):
        recorder(torch.full((2, 300, 1), float(batch)))
    sample = recorder.sample.flatten()
    assert MOST_ROWS / 3 < len(sample) <= MOST_ROWS
    assert sample.unique().numel() == 200


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_of_many_tokens_every_few_go_into_the_moment_whatever_the_batches_are(batch: int):
    windows, length = 16, 64
    recorder, x = Recorder(2, every=3), torch.randn(windows, length, 2)
    for first in range(0, windows, batch):
        recorder(x[first : first + batch])
    rows = x.reshape(-1, 2)[1::3]
    torch.testing.assert_close(recorder.moment, rows.T @ rows / len(rows))
    assert torch.equal(recorder.maximum, x.abs().amax((0, 1)))


@given(
    windows=st.integers(1, 300), length=st.integers(1, 1500) | st.sampled_from([256, 2048]), width=st.integers(1, 16384)
)
@example(windows=16, length=256, width=1536)
@example(windows=128, length=2048, width=14336)
@example(windows=2, length=1536, width=64)
def test_enough_tokens_go_into_a_moment_and_every_position_alike(windows: int, length: int, width: int):
    every = moment_stride(windows, length, width)
    tokens = torch.arange(windows * length)[every // 2 :: every]
    assert every == 1 or len(tokens) >= max(LEAST_TOKENS, 5 * width // 6)
    # A position is in `windows` windows, and should be among the tokens a share of 1 / every of them.
    counts = (tokens % length).bincount(minlength=length)
    assert counts.min() >= windows // every
    assert counts.max() <= windows // every + 1


def test_recorders_know_how_much_passes(tmp_path: Path):
    source = prepare(tmp_path).source
    for windows, length, taken in ((0, 0, 1), (8, 16, 1), (16, 256, 3), (128, 2048, 31)):
        made = recorders(source.family, source.shapes, ["attn_in", "key"], windows, length)
        assert {recorder.every for recorder in made.values()} == {taken}


def test_a_recorder_without_input_says_so():
    for read in (lambda: Recorder(3).moment, lambda: Recorder(3).maximum, lambda: Recorder(3).sample):
        with pytest.raises(RuntimeError, match="no input has passed"):
            read()


def test_there_are_recorders_for_what_is_asked_for_and_for_queries_with_keys(tmp_path: Path):
    source = prepare(tmp_path).source
    assert recorders(source.family, source.shapes, ["attn_in", "value"]).keys() == {"attn_in", "value"}
    assert recorders(source.family, source.shapes, ["key"]).keys() == {"key", "query"}
    assert recorders(source.family, source.shapes, []) == {}


sizes = st.integers(1, 5)


@given(heads=sizes, d=sizes, mapped=st.booleans(), seed=st.integers(0, 99))
def test_the_partial_trace_is_that_of_the_dense_product(heads: int, d: int, mapped: bool, seed: int):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, heads * d))
    moment = rows.T @ rows
    matrix = rng.normal(size=(d, d)) if mapped else None
    every_head = np.kron(np.eye(heads), np.eye(d) if matrix is None else matrix)
    dense = every_head.T @ moment @ every_head
    expected = [[sum(dense[h * d + i, k * d + i] for i in range(d)) for k in range(heads)] for h in range(heads)]
    actual = partial_trace(torch.from_numpy(moment), heads, None if matrix is None else torch.from_numpy(matrix))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@given(heads=sizes, d=sizes, seed=st.integers(0, 99))
def test_the_partial_trace_of_a_moment_is_the_moment_over_heads_of_the_rows(heads: int, d: int, seed: int):
    """What the heads matrix mixes: every row of values as [heads, d], its d columns being d samples."""
    values = np.random.default_rng(seed).normal(size=(20, heads, d))
    rows = values.reshape(20, -1)
    expected = sum(value @ value.T for value in values)
    actual = partial_trace(torch.from_numpy(rows.T @ rows), heads, None)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_weight_moments_are_sums_over_rows():
    torch.manual_seed(0)
    first, second = torch.randn(3, 6), torch.randn(2, 6)
    expected = sum(np.outer(row, row) for row in (*array(first), *array(second)))
    np.testing.assert_allclose(weight_moment([first, second]), expected, rtol=1e-5)
    by_head = sum(np.outer(head, head) for row in array(first) for head in row.reshape(3, 2))
    np.testing.assert_allclose(output_moment_by_head(first, 2), by_head, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 95, 97, 500, 1000])
def test_a_second_moment_is_the_sum_of_the_outer_products_of_its_rows(width: int):
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(width, rows.device)
    for count, part in enumerate(rows.split(11), 1):
        moment.add(part)
        seen = rows[: 11 * count].double()
        torch.testing.assert_close(moment.total().double(), seen.T @ seen, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_moment_of_bf16_inputs_is_summed_in_float32(autocast: bool):
    rows = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    moment = SecondMoment(200, rows.device)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        moment.add(rows)
    exact = rows.double().T @ rows.double()
    assert float((moment.total() - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
