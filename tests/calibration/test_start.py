from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatq_cli.config.recipe import Recipe
from flatq_cli.config.recipe_files import load_recipe
from tests.calibration.prepare import Prepared, moment, prepare
from tests.reference import array

SITES = {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"}


def recipe(**transform: Any) -> Recipe:
    return Recipe.model_validate({"transform": transform})


def start_error(ready: Prepared, settings: Recipe) -> float:
    """Relative squared error of the block's output before any training; clips fixed, so only transforms differ."""
    learnable = ready.learnable(settings, clip=0.98)
    return ready.error(settings, learnable)


def test_with_outlier_channels_balanced_beats_hadamard_beats_nothing(with_outliers):
    plain = {"diagonal": "none"}
    error = {init: start_error(with_outliers, recipe(init=init, **plain)) for init in ("identity", "hadamard")}
    error["balanced"] = start_error(with_outliers, recipe(init="balanced"))
    assert error["balanced"] < 0.6 * error["hadamard"]
    assert error["hadamard"] < 0.6 * error["identity"]


def test_a_diagonal_helps_where_channels_differ(with_outliers):
    nothing = start_error(with_outliers, recipe(init="identity", diagonal="none"))
    for diagonal in ("smooth", "balanced"):
        assert start_error(with_outliers, recipe(init="identity", diagonal=diagonal)) < 0.9 * nothing


@pytest.mark.parametrize("init", ["identity", "orthogonal", "hadamard", "balanced"])
def test_every_start_has_the_parts_of_its_layout_and_can_be_inverted(tmp_path: Path, init: str):
    ready = prepare(tmp_path, "qwen3 with prime widths")
    settings = recipe(init=init)
    layouts, starts = ready.layouts(settings), ready.starts(settings)
    assert starts.keys() == layouts.keys() == SITES
    for name, layout in layouts.items():
        left, right, diag = starts[name]
        assert [part is not None for part in (left, right, diag)] == [layout.left, layout.right, layout.diag]
        for matrix, size in ((left, layout.n1), (right, layout.n2)):
            if matrix is not None:
                assert (matrix.shape, matrix.dtype) == ((size, size), torch.float64)
                assert float(torch.linalg.cond(matrix)) < 1e6
        if diag is not None:
            assert diag.shape == (layout.width,)
            assert bool((diag > 0).all())


@pytest.mark.parametrize(
    ("init", "form"),
    [
        ("orthogonal", "direct"),
        ("orthogonal", "svd"),
        ("orthogonal", "orthogonal"),
        ("hadamard", "direct"),
        ("hadamard", "orthogonal"),
    ],
)
def test_starts_that_ignore_the_data_are_orthogonal(tmp_path: Path, init: str, form: str):
    ready = prepare(tmp_path)
    for left, right, _ in ready.starts(recipe(init=init, parametrization=form)).values():
        for matrix in (left, right):
            if matrix is not None:
                torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)).double(), atol=1e-5, rtol=0)
                assert len(matrix) == 1 or not torch.allclose(matrix, torch.eye(len(matrix)).double())


def test_the_same_seed_draws_the_same_matrices_and_another_seed_others(tmp_path: Path):
    ready = prepare(tmp_path)
    first, again, other = (ready.starts(recipe(init="orthogonal"), seed) for seed in (0, 0, 1))
    assert torch.equal(first["attn_in"].left, again["attn_in"].left)
    assert not torch.allclose(first["attn_in"].left, other["attn_in"].left)
    assert not torch.allclose(first["attn_in"].right, first["mlp_in"].right)


@pytest.mark.parametrize("init", ["identity", "balanced"])
def test_the_smooth_diagonal_is_smoothquants(tmp_path: Path, init: str):
    """s = max|x|^α / max|W|^(1-α) divides the activation (arXiv 2211.10438, eq. 4); d = 1/s multiplies it."""
    ready = prepare(tmp_path)
    alpha = 0.3
    starts = ready.starts(recipe(init=init, diagonal="smooth", smooth_alpha=alpha))
    for site in ready.source.family.sites:
        if site.diag_into is None:
            continue
        largest = np.max([np.abs(array(ready.weights[f"{reader}.weight"])).max(0) for reader in site.readers], axis=0)
        smoothing = array(ready.recorded[site.name].maximum) ** alpha / largest ** (1 - alpha)
        np.testing.assert_allclose(starts[site.name].diag, 1 / smoothing, rtol=1e-5)


def test_the_balanced_diagonal_makes_the_channels_of_both_sides_alike(tmp_path: Path):
    """d = (mean W² / mean x²)^¼: then x d and W / d have equal power in every channel, up to one factor."""
    ready = prepare(tmp_path)
    starts = ready.starts(recipe())
    for site in ready.source.family.sites:
        if site.diag_into is None:
            continue
        diag = array(starts[site.name].diag)
        activation = np.diag(moment(ready.recorded[site.name])) * diag**2
        weight = sum((array(ready.weights[f"{reader}.weight"]) ** 2).sum(0) for reader in site.readers) / diag**2
        np.testing.assert_allclose(activation / weight, (activation / weight)[0], rtol=1e-6)


def test_heads_keys_and_values_are_balanced(tmp_path: Path):
    """tr(Tᵀ Σx T) · tr(T⁻¹ Σw T⁻ᵀ), the noise of rounding, is least where both are one matrix up to a factor.

    The moments of every activation are written out by hand.
    """
    ready = prepare(tmp_path)
    shapes, starts = ready.source.shapes, ready.starts(recipe())
    heads, dim = shapes.heads, shapes.head_dim
    output = array(ready.weights["self_attn.o_proj.weight"]).reshape(-1, heads, dim)
    value = array(starts["value"].right)
    attended = moment(ready.recorded["attn_out"]).reshape(heads, dim, heads, dim)
    sites = {
        "key": (moment(ready.recorded["key"]), moment(ready.recorded["query"]), starts["key"].right),
        "value": (
            moment(ready.recorded["value"]),
            np.einsum("ohi,ohj->ij", output, output),
            starts["value"].right,
        ),
        # heads of what P_v has mapped already
        "attn_out": (
            np.einsum("hikj,ip,jp->hk", attended, value, value),
            np.einsum("ohi,okj,pi,pj->hk", output, output, np.linalg.inv(value), np.linalg.inv(value)),
            starts["attn_out"].left,
        ),
    }
    for name, (sigma_x, sigma_w, start) in sites.items():
        matrix, inverse = array(start), np.linalg.inv(array(start))
        activations, weights = matrix.T @ sigma_x @ matrix, inverse @ sigma_w @ inverse.T
        factor = np.trace(activations) / np.trace(weights)
        np.testing.assert_allclose(
            activations, factor * weights, rtol=0, atol=5e-3 * np.abs(activations).max(), err_msg=name
        )
        assert np.trace(activations) * np.trace(weights) < np.trace(sigma_x) * np.trace(sigma_w)


@pytest.mark.parametrize(
    ("init", "form"),
    [("hadamard", "svd"), ("balanced", "svd"), ("hadamard", "orthogonal"), ("orthogonal", "orthogonal")],
)
def test_every_form_starts_at_the_matrices_of_the_direct_one(tmp_path: Path, init: str, form: str):
    ready = prepare(tmp_path)
    direct, other = (ready.learnable(recipe(init=init, parametrization=kind)).plain() for kind in ("direct", form))
    assert direct.keys() == other.keys()
    for name, tensor in direct.items():
        if not name.endswith("clip"):
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()))


def test_smoothquant_starts_at_square_roots_of_maxima_and_no_matrix(tmp_path: Path):
    """α = 0.5: s = (max|x| / max|W|)^½, d = 1/s (arXiv 2211.10438, eq. 4), where a norm or up_proj absorbs it."""
    ready = prepare(tmp_path)
    starts = ready.starts(load_recipe("smoothquant"))
    assert {name for name, start in starts.items() if start.diag is not None} == {"attn_in", "mlp_in", "mlp_out"}
    assert all(start.left is None and start.right is None for start in starts.values())
    for name, reader in (
        ("attn_in", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
        ("mlp_out", "mlp.down_proj"),
    ):
        rows = np.concatenate([array(ready.weights[f"{linear}.weight"]) for linear in reader.split()])
        expected = np.sqrt(np.abs(rows).max(0) / array(ready.recorded[name].maximum))
        np.testing.assert_allclose(starts[name].diag, expected, rtol=1e-5)
