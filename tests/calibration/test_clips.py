from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatq_cli.calibration.clips import (
    RANK,
    Weighing,
    fixed_clips,
    search_activation_clip,
    search_weight_clips,
    weighing,
    weighing_of_rows,
)
from flatq_cli.config.recipe import Recipe, WeightSpec
from flatq_cli.runtime.layout import SiteLayout
from tests.calibration.prepare import prepare
from tests.reference import array, quantize_rows

TRIED = (0.56, 0.66, 0.76, 0.86, 0.96)
CPU = torch.device("cpu")


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows with a few large entries: clipping them pays."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.sign() * x.abs() ** 2.5


def rounded(x: np.ndarray, bits: int, symmetric: bool, factor: float) -> np.ndarray:
    _, codes, scale, zero = quantize_rows(x, bits, symmetric, np.full(2, factor))
    return (codes - zero) * scale


def outputs_second_moment(width: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Of inputs as they are behind a transform: channels alike, correlated, and a direction of massive tokens."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
    rows = torch.randn(tokens, width, generator=generator) @ mixing
    rows[0] = 100 * torch.randn(width, generator=generator)
    return rows.T @ rows / tokens


@pytest.mark.parametrize("width", [4, RANK, RANK + 1, 3 * RANK])
def test_a_weighing_is_the_moment_on_its_diagonal_and_along_its_largest_directions(width: int):
    moment = outputs_second_moment(width, 4 * width)
    diagonal, directions = weighing(moment)
    whole = torch.diag(diagonal) + directions.float() @ directions.float().T
    torch.testing.assert_close(whole.diagonal(), moment.diagonal(), rtol=2e-2, atol=0)  # directions are bf16
    assert bool((diagonal >= 0).all())
    along = torch.linalg.eigh(moment.double())[1][:, -1].float()
    torch.testing.assert_close(along @ whole @ along, along @ moment @ along, rtol=2e-2, atol=0)
    if width <= RANK:
        torch.testing.assert_close(whole, moment, rtol=0, atol=2e-2 * float(moment.abs().max()))


def test_what_weighs_by_rows_is_what_weighs_by_their_moment():
    matrices = [torch.randn(30, 80), torch.randn(50, 80)]
    by_rows, by_moment = weighing_of_rows(iter(matrices)), weighing(sum(m.T @ m for m in matrices))
    residual = torch.randn(7, 80)
    torch.testing.assert_close(by_rows.error(residual.clone()), by_moment.error(residual.clone()), rtol=1e-2, atol=0)


def test_the_error_of_a_weighing_is_its_quadratic_form():
    weigher, residual = weighing(outputs_second_moment(80, 200)), heavy_tailed(2, 5, 80)
    whole = np.diag(array(weigher.diagonal)) + array(weigher.directions) @ array(weigher.directions).T
    expected = np.einsum("abi,ij,abj->ab", array(residual), whole, array(residual))
    np.testing.assert_allclose(array(weigher.error(residual.clone())), expected, rtol=2e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_take_nearly_the_factors_that_the_whole_moment_finds(symmetric: bool):
    """What is left out of a second moment costs little of what clips gain."""
    weight, moment = heavy_tailed(40, 6 * RANK), outputs_second_moment(6 * RANK, 2000)
    clips = search_weight_clips(weight, weighing(moment), WeightSpec(bits=4, symmetric=symmetric))

    def error(factors: np.ndarray) -> np.ndarray:
        residual = np.stack(
            [row - rounded(row, 4, symmetric, factor) for row, factor in zip(array(weight), factors, strict=True)]
        )
        return np.einsum("ri,ij,rj->r", residual, array(moment), residual)

    values, vectors = torch.linalg.eigh(moment)
    exact = Weighing(torch.zeros(len(moment)), vectors * values.clamp(min=0).sqrt())
    wholly = search_weight_clips(weight, exact, WeightSpec(bits=4, symmetric=symmetric))
    found, least, unclipped = (
        error(array(x)).sum() for x in (clips[:, 0, 0], wholly[:, 0, 0], torch.full((40,), 0.98))
    )
    assert found - least < 0.02 * (unclipped - least)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 8])
def test_each_row_and_group_of_a_weight_takes_the_factor_of_least_output_error(symmetric: bool, group: int):
    weight, rows = heavy_tailed(6, 32), heavy_tailed(50, 32, seed=1)
    moment = rows.T @ rows / 50
    clips = search_weight_clips(weight, weighing(moment), WeightSpec(bits=4, group=group, symmetric=symmetric))
    groups = 32 // group if group else 1
    assert clips.shape == (6, groups, 2)
    assert torch.equal(clips[..., 0], clips[..., 1])
    sigma, width = array(moment), group or 32

    def error(row: int, part: int, factor: float) -> float:
        columns = slice(part * width, (part + 1) * width)
        piece = array(weight)[row, columns]
        residual = piece - rounded(piece, 4, symmetric, factor)
        weigher = sigma[columns, columns] if groups == 1 else np.diag(np.diag(sigma)[columns])
        return float(residual @ weigher @ residual)

    for row in range(6):
        for part in range(groups):
            least = min(error(row, part, factor) for factor in TRIED)
            assert error(row, part, float(clips[row, part, 0])) <= 1.001 * least
    assert len(clips.unique()) > 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_site_takes_the_factor_of_least_output_error(symmetric: bool):
    rows, weight = heavy_tailed(64, 16), heavy_tailed(24, 16, seed=1)
    layout = SiteLayout("x", 16, 4, 4, left=True, right=True, diag=False, bits=4, symmetric=symmetric, clip=True)
    clip = search_activation_clip(rows, weighing(weight.T @ weight), layout)
    assert clip.shape == (2,)

    def error(factor: float) -> float:
        residual = array(rows) - rounded(array(rows), 4, symmetric, factor)
        return float(((residual @ array(weight).T) ** 2).sum())

    assert error(float(clip[0])) <= 1.001 * min(error(factor) for factor in TRIED)
    assert error(float(clip[0])) < error(0.98)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"transform": {"kind": "none", "diagonal": "none"}},
        {"activations": {"bits": 16}, "kv_cache": {"bits": 16}},
        {"activations": {"bits": 16}, "kv_cache": {"bits": 16}, "transform": {"kind": "none", "diagonal": "none"}},
        {"weights": {"bits": 16}},
        {"weights": {"bits": 3, "group": 8, "symmetric": False}},
    ],
    ids=["w4a4kv4", "rtn", "w4", "rtn-w4", "a4kv4", "w3g8"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_searched_clips_start_a_block_no_worse_than_fixed_ones(tmp_path: Path, name: str, sections: dict[str, Any]):
    ready, settings = prepare(tmp_path, name), Recipe.model_validate(sections)

    def error(clip: float | None) -> float:
        learnable = ready.learnable(settings, clip=clip)
        return ready.error(settings, learnable)

    # Each site is searched alone; what they add to the block's error together is known within a few percent.
    assert error(None) < 1.05 * error(0.98)


def test_fixed_clips_are_one_factor_everywhere(tmp_path: Path):
    ready = prepare(tmp_path)
    settings = Recipe.model_validate({"weights": {"group": 8}})
    linears = ready.source.shapes.linears(ready.source.family)
    clips = fixed_clips(0.75, ready.layouts(settings), linears, settings.weights)
    assert clips.sites.keys() == {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"}
    assert {name: tuple(clip.shape) for name, clip in clips.linears.items()} == {
        name: (out, width // 8, 2) for name, (out, width) in linears.items()
    }
    assert all(bool((clip == 0.75).all()) for clip in (*clips.sites.values(), *clips.linears.values()))
