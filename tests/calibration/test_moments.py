from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flatq_cli.calibration.moments import (
    GPTQ_EVERY,
    GPTQ_ROWS,
    LEAST_ROWS,
    MOST_ROWS,
    MOST_TIMES,
    Recorder,
    SecondMoment,
    gptq_stride,
    moment_by_head,
    moment_over_heads,
    recorders,
    row_stride,
    second_moment,
)
from flatq_cli.models.source import run_block
from tests.calibration.prepare import prepare
from tests.reference import array, block_forward
from tests.tiny import FAMILIES

SITES = {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value", "query"}


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3 with prime widths"])
def test_rows_and_maxima_are_those_of_the_activations(tmp_path: Path, name: str):
    ready = prepare(tmp_path, name)
    _, activations = block_forward(ready.source.block_tensors(0), ready.source.config, ready.hidden)
    assert ready.recorded.keys() == activations.keys() == SITES
    for site, recorder in ready.recorded.items():
        rows = activations[site].reshape(-1, activations[site].shape[-1])
        assert (len(recorder.rows), recorder.maximum.dtype) == (len(rows), torch.float32)
        moment, kept = rows.T @ rows, array(recorder.rows)
        np.testing.assert_allclose(kept.T @ kept, moment, rtol=0, atol=1e-5 * np.abs(moment).max(), err_msg=site)
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
                array(ready.recorded[site.name].rows), rows, rtol=1e-4, atol=1e-5, err_msg=reader
            )


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_is_recorded_does_not_depend_on_the_batches(tmp_path: Path, batch: int):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = prepare(tmp_path / "a", batch=batch), prepare(tmp_path / "b", batch=4)
    for site in SITES:
        if site not in ("key", "query", "value"):  # heads of a batch come one after the other
            torch.testing.assert_close(one.recorded[site].rows, other.recorded[site].rows, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.recorded[site].maximum, other.recorded[site].maximum, rtol=1e-5, atol=1e-6)


def test_a_recorder_lets_its_input_through_and_keeps_copies_of_its_rows():
    recorder = Recorder(3)
    batches = [torch.randn(2, 400, 3).bfloat16(), torch.randn(5, 3).bfloat16()]
    assert all(recorder(batch) is batch for batch in batches)
    expected = torch.cat([batch.reshape(-1, 3) for batch in batches])
    for batch in batches:
        batch.zero_()
    assert torch.equal(recorder.rows, expected)


def test_rows_are_kept_without_the_activations_they_are_from():
    recorder = Recorder(4, every=5)
    recorder(torch.randn(1, 100, 4))
    assert recorder.rows.untyped_storage().nbytes() == 20 * 4 * 4


def test_maxima_are_taken_where_they_are_asked_for():
    recorder = Recorder(3, maxima=False)
    recorder(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="not asked for"):
        _ = recorder.maximum


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_of_many_tokens_every_few_are_kept_whatever_the_batches_are(batch: int):
    windows, length = 16, 64
    recorder, x = Recorder(2, every=3), torch.randn(windows, length, 2)
    for first in range(0, windows, batch):
        recorder(x[first : first + batch])
    assert torch.equal(recorder.rows, x.reshape(-1, 2)[1::3])
    assert torch.equal(recorder.maximum, x.abs().amax((0, 1)))


@given(
    windows=st.integers(1, 300), length=st.integers(1, 1500) | st.sampled_from([256, 2048]), width=st.integers(1, 16384)
)
@example(windows=16, length=256, width=1536)
@example(windows=128, length=2048, width=14336)
@example(windows=2, length=1536, width=64)
@example(windows=7, length=32768, width=14336)
def test_enough_tokens_are_kept_and_every_position_alike(windows: int, length: int, width: int):
    every = row_stride(windows, length, width)
    tokens = torch.arange(windows * length)[every // 2 :: every]
    least = max(LEAST_ROWS, 5 * width // 6)
    assert every == 1 or len(tokens) >= least
    if math.gcd(length, 2 * 3 * 5 * 7) == 1:  # else there may be no such stride
        assert len(tokens) <= 2 * max(MOST_ROWS, MOST_TIMES * least)
    # A position is in `windows` windows, and should be among the tokens a share of 1 / every of them.
    counts = (tokens % length).bincount(minlength=length)
    assert counts.min() >= windows // every
    assert counts.max() <= windows // every + 1


def test_few_long_windows_are_thinned_too():
    assert row_stride(7, 32768, 14336) == 5
    assert row_stride(3, 256, 576) == 1


@given(
    windows=st.integers(1, 300), length=st.integers(1, 1500) | st.sampled_from([256, 2048]), width=st.integers(1, 16384)
)
@example(windows=64, length=256, width=1536)
def test_gptqs_moments_take_every_third_token_where_enough_are_left(windows: int, length: int, width: int):
    every = gptq_stride(windows, length, width)
    assert 1 <= every <= GPTQ_EVERY
    assert every == 1 or windows * length // every >= max(LEAST_ROWS, GPTQ_ROWS * width)
    counts = (torch.arange(windows * length)[every // 2 :: every] % length).bincount(minlength=length)
    assert counts.min() >= windows // every
    assert counts.max() <= windows // every + 1


def test_the_default_takes_every_third_token_of_narrow_and_wide_sites():
    assert {gptq_stride(64, 256, width) for width in (576, 1536)} == {3}
    assert gptq_stride(64, 256, 14336) == 1


def test_recorders_know_how_much_passes(tmp_path: Path):
    source = prepare(tmp_path).source
    for windows, length, taken in ((0, 0, 1), (8, 16, 1), (16, 256, 3), (128, 2048, 31)):
        made = recorders(source.family, source.shapes, ["attn_in", "key"], windows, length)
        assert {recorder.every for recorder in made.values()} == {taken}


def test_a_recorder_without_input_says_so():
    for read in (lambda: Recorder(3).rows, lambda: Recorder(3).maximum):
        with pytest.raises(RuntimeError, match="no input has passed"):
            read()


def test_there_are_recorders_for_what_is_asked_for_and_for_queries_with_keys(tmp_path: Path):
    source = prepare(tmp_path).source
    assert recorders(source.family, source.shapes, ["attn_in", "value"]).keys() == {"attn_in", "value"}
    assert recorders(source.family, source.shapes, ["key"]).keys() == {"key", "query"}
    assert recorders(source.family, source.shapes, []) == {}


sizes = st.integers(1, 5)


@given(heads=sizes, d=sizes, mapped=st.booleans(), seed=st.integers(0, 99))
def test_the_moment_over_heads_is_that_of_mapped_heads(heads: int, d: int, mapped: bool, seed: int):
    """What the heads matrix mixes: every row of values as [heads, d], its d columns being d samples."""
    rng = np.random.default_rng(seed)
    values, matrix = rng.normal(size=(20, heads, d)), rng.normal(size=(d, d)) if mapped else np.eye(d)
    expected = sum(value @ matrix @ matrix.T @ value.T for value in values)
    rows, by = torch.from_numpy(values.reshape(20, -1)), torch.from_numpy(matrix) if mapped else None
    np.testing.assert_allclose(moment_over_heads(rows, heads, by), expected, rtol=1e-4, atol=1e-3)


def test_the_moment_by_head_is_a_sum_over_rows_and_heads():
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    by_head = sum(np.outer(head, head) for row in array(rows) for head in row.reshape(3, 2))
    np.testing.assert_allclose(moment_by_head(rows, 2), by_head, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 95, 97, 500, 1000])
def test_the_second_moment_of_matrices_is_summed_over_their_rows(width: int):
    matrices = [torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) for rows in (30, 50)]
    expected = sum(array(matrix).T @ array(matrix) for matrix in matrices)
    found = second_moment(iter(matrices))
    assert found.dtype == torch.float32
    assert torch.equal(found, found.T)
    # Entries of bf16, and their products: 2⁻⁸ of what was summed.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * np.abs(expected).max())


def test_a_second_moment_with_one_dominant_direction_stays_positive():
    """Massive activations: rounded sums would have negative eigenvalues larger than the ridge."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 96, generator=generator) + 100 * torch.randn(96, generator=generator)
    moment = second_moment([rows]).double()
    assert float(torch.linalg.eigvalsh(moment)[0]) > -1e-6 * float(moment.diagonal().mean())


@pytest.mark.parametrize("width", [1, 95, 97, 500, 1000])
def test_a_second_moment_is_the_sum_of_the_outer_products_of_its_rows(width: int):
    rows = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment(width, rows.device)
    for count, part in enumerate(rows.split(11), 1):
        moment.add(part)
        seen = rows[: 11 * count].double()
        torch.testing.assert_close(moment.total().double(), seen.T @ seen, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_a_second_moment_of_every_third_row_takes_the_same_rows_whatever_the_batches_are(batch: int):
    rows = torch.randint(-8, 8, (100, 5), generator=torch.Generator().manual_seed(0)).float()  # exact in bf16
    moment = SecondMoment(5, rows.device, every=3)
    for part in rows.split(batch):
        moment.add(part)
    taken = rows[1::3]
    assert moment.rows == len(taken)
    assert torch.equal(moment.total(), taken.T @ taken)


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
