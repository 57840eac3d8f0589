from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flatq_cli.calibration.learnable import transforms_from_plain
from flatq_cli.config.recipe import Recipe
from flatq_cli.evaluation.flatness import (
    POINTS,
    Calibrated,
    Tuned,
    Watch,
    _tuned_partners,
    measure_block,
    summarize,
    watch_tuned,
    watches,
)
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.quantization.quantizers import fake_quantize
from flatq_cli.runtime.folding import fold, online_tensors
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import attach_sites, online_sites
from flatq_cli.transforms.kronecker import kronecker_matmul
from tests.tiny import FAMILIES, RECIPES, random_transforms, tiny_recipe, tiny_source, tiny_tokens

PLAIN = {"transform": {"kind": "none", "diagonal": "none"}}


def measured(source: BlockSource, recipe: Recipe, transformed: bool, curves: bool = True) -> dict[str, dict]:
    """The sites of block 0 by name, with random transforms or none."""
    layouts = block_layout(recipe, source.family, source.shapes)
    calibrated = sides(layouts, transformed)
    watched = watches(source.family, source.shapes, calibrated)
    parameters = run_watched(source, watched)
    found = measure_block(parameters, watched, calibrated, source.family, source.shapes, recipe.weights, curves)
    return {site["site"]: site for site in found}


def sides(layouts: dict[str, SiteLayout], transformed: bool) -> Calibrated:
    transforms = random_transforms(layouts) if transformed else {}
    plain = {}
    for name, transform in transforms.items():
        parts = {"left": transform.left and transform.left.matrix, "right": transform.right and transform.right.matrix}
        plain |= {
            f"{name}.{part}": matrix for part, matrix in {**parts, "diag": transform.diag}.items() if matrix is not None
        }
    return Calibrated(layouts, transforms_from_plain(plain, layouts, torch.float32), {}, {})


def run_watched(source: BlockSource, watched: dict[str, Watch]) -> dict[str, Tensor]:
    """Run block 0 of a source on random tokens with watches; its parameters."""
    block = source.block(0)
    parameters = dict(block.named_parameters())
    hidden = source.embed(tiny_tokens())
    with torch.no_grad():
        run_block(attach_sites(block, source.family, watched), hidden, source.block_kwargs(hidden[:1])[0])
    return parameters


def test_a_watch_lets_through_and_notes_the_largest_of_each_channel():
    watch = Watch(3, lambda x: x * 2)
    first, second = torch.tensor([[[1.0, -5.0, 0.0]]]), torch.tensor([[[-3.0, 2.0, 0.5]]])
    assert watch(first) is first
    watch(second)
    assert watch.before.tolist() == [3.0, 5.0, 0.5]
    assert watch.after.tolist() == [6.0, 10.0, 1.0]
    assert watch.rows.tolist() == [[1.0, -5.0, 0.0], [-3.0, 2.0, 0.5]]


@pytest.mark.parametrize("width", [3, POINTS, POINTS + 1, 14336])
def test_a_curve_has_few_points_and_loses_no_outlier(width: int):
    maxima = torch.rand(width) + 0.1
    maxima[width // 2] = 1000.0
    summary = summarize(maxima, None, curves=True)
    assert len(summary["by_channel"]) == len(summary["sorted"]) == min(width, POINTS)
    assert max(summary["by_channel"]) == summary["sorted"][0] == summary["largest"] == 1000.0
    assert summary["sorted"][-1] == pytest.approx(float(maxima.min()), rel=1e-4)
    assert summary["sorted"] == sorted(summary["sorted"], reverse=True)


def test_what_is_not_a_number_is_none():
    assert summarize(torch.tensor([torch.nan, 1.0]), float("inf"), curves=False) == {
        **{"largest": None, "mean": None, "error": None}
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family_is_measured_on_both_sides(family: str, tmp_path: Path):
    found = measured(tiny_source(tmp_path, family), tiny_recipe(tmp_path), transformed=True)
    assert list(found) == ["attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"]
    assert [site["partner"]["name"] for site in found.values()] == [*["weights"] * 4, "queries", "weights"]
    for site in found.values():
        for side in ("activation", "partner"):
            for when in ("before", "after"):
                assert site[side][when]["largest"] >= site[side][when]["mean"] > 0
        assert site["activation"]["after"]["error"] > 0


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_measured(name: str, tmp_path: Path):
    recipe = tiny_recipe(tmp_path, **RECIPES[name])
    found = measured(tiny_source(tmp_path, "llama"), recipe, transformed=True)
    rounds = recipe.activations.bits < 16, recipe.weights.bits < 16
    for name in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        errors = found[name]["activation"]["after"]["error"], found[name]["partner"]["after"]["error"]
        assert (errors[0] is not None, errors[1] is not None) == rounds


def test_without_a_transform_nothing_differs(tmp_path: Path):
    found = measured(tiny_source(tmp_path, "llama"), tiny_recipe(tmp_path, **PLAIN), transformed=False)
    for site in found.values():
        assert site["activation"]["before"] == site["activation"]["after"]
        assert site["partner"]["before"] == site["partner"]["after"]


def test_what_is_shown_after_is_what_runs_after_folding(tmp_path: Path):
    source, recipe = tiny_source(tmp_path, "qwen2"), tiny_recipe(tmp_path)
    layouts = block_layout(recipe, source.family, source.shapes)
    calibrated = sides(layouts, transformed=True)
    parameters = dict(source.block(0).named_parameters())
    folded = fold(parameters, calibrated.transforms, source.family, source.shapes)
    found = measured(source, recipe, transformed=True)
    for site in source.family.sites:
        weights = torch.cat([folded[f"{reader}.weight"] for reader in site.readers])
        assert found[site.name]["partner"]["after"]["by_channel"] == pytest.approx(
            weights.abs().amax(0).tolist(), rel=1e-4
        )


def test_an_error_is_that_of_the_rounded_product(tmp_path: Path):
    """By hand, for the input of down_proj: all tokens fit into the sample."""
    source, recipe = tiny_source(tmp_path, "llama"), tiny_recipe(tmp_path)
    calibrated = sides(block_layout(recipe, source.family, source.shapes), transformed=True)
    watched = watches(source.family, source.shapes, calibrated)
    parameters = run_watched(source, watched)
    found = measure_block(parameters, watched, calibrated, source.family, source.shapes, recipe.weights, curves=False)
    transform = calibrated.transforms["mlp_out"]
    rows, weight = transform.apply(watched["mlp_out"].rows), parameters["mlp.down_proj.weight"]
    folded = transform.apply_inverse_transpose(weight)
    product = rows @ folded.T
    off = fake_quantize(rows, 4, True) @ folded.T - product
    weights_off = rows @ fake_quantize(folded, 4, True).T - product
    site = next(one for one in found if one["site"] == "mlp_out")

    def relative(error: Tensor) -> float:
        return float((error.square().sum(-1) / product.square().sum(-1)).mean())

    assert site["activation"]["after"]["error"] == pytest.approx(relative(off), rel=1e-3)
    assert site["partner"]["after"]["error"] == pytest.approx(relative(weights_off), rel=1e-3)


def fused(source: BlockSource, recipe: Recipe, moved: float) -> tuple[nn.Module, Calibrated]:
    """Block 0 folded by random transforms, weights unrounded, its sites at work; `moved`: how far tuning took its
    matrices, clips and norms.
    """
    layouts = block_layout(recipe, source.family, source.shapes)
    calibrated = sides(layouts, transformed=True)
    block = attach_sites(source.block(0), source.family, online_sites(layouts))
    parameters = {name: tensor.detach() for name, tensor in source.block(0).named_parameters()}
    tensors = fold(parameters, calibrated.transforms, source.family, source.shapes)
    tensors |= {f"sites.{name}": tensor for name, tensor in online_tensors(calibrated.transforms).items()}
    clips = {name: tensor for name, tensor in block.state_dict().items() if name.endswith(".clip")}
    generator = torch.Generator().manual_seed(1)
    for name in list(tensors):
        if name.startswith("sites."):
            change = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = tensors[name] + moved * tensors[name] @ change
        elif "norm" in name:
            tensors[name] = tensors[name] * (1 + moved)
    tensors |= {name: clip - moved for name, clip in clips.items()}
    block.load_state_dict(tensors)
    return block.requires_grad_(False), calibrated


def measured_tuned(
    source: BlockSource, recipe: Recipe, moved: float, rounds: bool = True
) -> tuple[list[dict], Tuned, Calibrated]:
    """What is found of `fused`, whose sites round while it runs, or not."""
    block, calibrated = fused(source, recipe, moved)
    for name, site in block.sites.items():
        site.bits = calibrated.layouts[name].bits if rounds and name in calibrated.layouts else 16
    tuned = watch_tuned(block, source.family, source.shapes)
    hidden = source.embed(tiny_tokens())
    with torch.no_grad():
        run_block(block, hidden, source.block_kwargs(hidden[:1])[0])
    watched = watches(source.family, source.shapes, calibrated)
    parameters = run_watched(source, watched)
    found = measure_block(
        parameters, watched, calibrated, source.family, source.shapes, recipe.weights, curves=True, tuned=tuned
    )
    return found, tuned, calibrated


@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_that_moved_nothing_shows_what_calibration_left(family: str, tmp_path: Path):
    """Where sites do not round while the block runs, so that its later ones are given what those of the other are."""
    found, _, _ = measured_tuned(tiny_source(tmp_path, family), tiny_recipe(tmp_path), moved=0.0, rounds=False)
    assert [site["site"] for site in found] == ["attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"]
    for site in found:
        after, tuned = site["activation"]["after"], site["activation"]["tuned"]
        assert tuned["by_channel"] == pytest.approx(after["by_channel"], rel=1e-3)
        assert tuned["error"] == pytest.approx(after["error"], rel=1e-2)
        assert site["partner"]["tuned"] is None


def test_a_tuned_error_is_that_of_the_tuned_product_alone(tmp_path: Path):
    """By hand, for the input of q, k and v: not that of the distance to the full-precision product, which is larger."""
    source, recipe = tiny_source(tmp_path, "llama"), tiny_recipe(tmp_path)
    found, tuned, calibrated = measured_tuned(source, recipe, moved=0.1)
    site = tuned.block.sites["attn_in"]
    seen = tuned.watched["attn_in"].rows
    rows = kronecker_matmul(seen, site.left, site.right)
    weights = dict(tuned.block.named_parameters())
    readers = torch.cat([weights[f"self_attn.{name}_proj.weight"] for name in "qkv"])
    product, rounded = rows @ readers.T, fake_quantize(rows, 4, True, site.clip) @ readers.T
    own = torch.cat([dict(source.block(0).named_parameters())[f"self_attn.{name}_proj.weight"] for name in "qkv"])
    full = (seen / 1.1 / calibrated.transforms["attn_in"].diag) @ own.T

    def relative(error: Tensor, to: Tensor) -> float:
        return float((error.square().sum(-1) / to.square().sum(-1)).mean())

    shown = found[0]["activation"]["tuned"]
    assert shown["by_channel"] == pytest.approx(rows.abs().amax(0).tolist(), rel=1e-3)
    assert shown["error"] == pytest.approx(relative(rounded - product, product), rel=1e-3)
    assert relative(rounded - full, full) > 2 * shown["error"]


def test_tuned_values_are_weighed_by_what_is_behind_the_heads_matrix(tmp_path: Path):
    """A head's value v gives v Eᵀ to the block's output, E what the heads matrix and o_proj make of it."""
    source, recipe = tiny_source(tmp_path, "llama"), tiny_recipe(tmp_path)
    _, tuned, _ = measured_tuned(source, recipe, moved=0.1)
    shapes, block = source.shapes, tuned.block
    site = block.sites["attn_out"]
    heads = torch.randn(5, shapes.heads * shapes.head_dim)
    output = kronecker_matmul(heads, site.left, None) @ block.self_attn.o_proj.weight.T
    (readers,) = _tuned_partners("value", tuned, source.family, shapes)
    by_head = readers.reshape(shapes.hidden, shapes.heads, shapes.head_dim)
    torch.testing.assert_close(torch.einsum("nhd,ohd->no", heads.view(5, shapes.heads, -1), by_head), output)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_can_be_measured_as_tuned(name: str, tmp_path: Path):
    recipe = tiny_recipe(tmp_path, **RECIPES[name])
    layouts = block_layout(recipe, *(getattr(tiny_source(tmp_path, "llama"), part) for part in ("family", "shapes")))
    found, _, _ = measured_tuned(tiny_source(tmp_path, "llama"), recipe, moved=0.01)
    for site in found:
        tuned = site["activation"]["tuned"]
        assert (tuned is not None) == (site["site"] in layouts)
        assert tuned is None or (tuned["error"] is not None) == (layouts[site["site"]].bits < 16)


def test_curves_are_left_out_where_they_are_not_wanted(tmp_path: Path):
    found = measured(tiny_source(tmp_path, "llama"), tiny_recipe(tmp_path), transformed=True, curves=False)
    assert all("sorted" not in site["activation"]["after"] for site in found.values())
