from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatq_cli.calibration.learnable import transforms_from_plain
from flatq_cli.config.recipe import Recipe
from flatq_cli.config.recipe_files import load_recipe
from flatq_cli.models.families import LLAMA, Shapes
from flatq_cli.models.source import BlockSource, run_block
from flatq_cli.runtime.folding import fold
from flatq_cli.runtime.layout import SiteLayout, block_layout
from flatq_cli.runtime.sites import ATTENTION
from flatq_cli.stages.calibrate import block_name
from flatq_cli.transforms.kronecker import Transform, transform_from_matrices
from tests.reference import array, block_forward, dense
from tests.tiny import (
    calibrated_run,
    folded_block,
    random_transforms,
    tiny_model_dir,
    tiny_recipe,
    tiny_source,
    tiny_text,
    tiny_tokens,
    without_quantizers,
)

MODELS = [
    "llama",
    "llama with biases",
    "llama with wide heads",
    "llama with odd widths",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3 with prime widths",
]
SITES = {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"}


def layouts_of(source: BlockSource, recipe: Recipe | None = None) -> dict[str, SiteLayout]:
    """All six sites of a recipe, the default one where none is given, quantizers off."""
    layouts = without_quantizers(block_layout(recipe or Recipe(), source.family, source.shapes))
    assert layouts.keys() == SITES
    return layouts


@torch.no_grad()
def folded_logits(
    source: BlockSource, transforms: list[dict[str, Transform]], recipe: Recipe | None = None
) -> torch.Tensor:
    layouts = layouts_of(source, recipe)
    make = lambda i: folded_block(source, i, layouts, transforms[i])  # noqa: E731
    return source.assemble(make, attention=ATTENTION)(tiny_tokens()).logits


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_random_transforms_at_every_site_leave_the_logits_as_they_were(tmp_path: Path, name: str):
    source = tiny_source(tmp_path, name)
    with torch.no_grad():
        original = source.assemble()(tiny_tokens()).logits
    transforms = [random_transforms(layouts_of(source), seed) for seed in range(source.num_blocks)]
    # float32: how sums are ordered, and with it the last digits, differs from one CPU to the next.
    assert relative(folded_logits(source, transforms), original) < 3e-5


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_transforms_leave_the_logits_as_they_were(tmp_path: Path, name: str):
    run = calibrated_run(tiny_model_dir(tmp_path, name), tiny_recipe(tmp_path, epochs=2), tmp_path / "run")
    source = tiny_source(tmp_path, name)
    with torch.no_grad():
        original = source.assemble()(tiny_tokens()).logits
    layouts, stage = layouts_of(source), run.stage("calibrate")
    plain = [stage.load(block_name(i)) for i in range(source.num_blocks)]
    learned = [transforms_from_plain(tensors, layouts, torch.float64) for tensors in plain]
    assert all(transforms.keys() == SITES for transforms in learned)
    assert relative(folded_logits(source, learned), original) < 1e-5


@pytest.mark.parametrize("recipe_name", ["smoothquant", "spin"])
@pytest.mark.parametrize("name", MODELS)
def test_the_transforms_of_other_methods_leave_the_logits_as_they_were(tmp_path: Path, name: str, recipe_name: str):
    """A diagonal without matrices, and matrices that train without leaving the orthogonal ones."""
    small = {"data": tiny_text(tmp_path), "samples": 16, "seqlen": 16, "learning_rate": 0.03}
    settings = [f"calibration.{key}={value}" for key, value in small.items()]
    settings += [f"{section}.bits=8" for section in ("weights", "activations", "kv_cache")]  # at 4 all is noise here
    recipe = load_recipe(recipe_name, settings)
    run = calibrated_run(tiny_model_dir(tmp_path, name), recipe, tmp_path / "run")
    source = tiny_source(tmp_path, name)
    with torch.no_grad():
        original = source.assemble()(tiny_tokens()).logits
    layouts, stage = layouts_of(source, recipe), run.stage("calibrate")
    plain = [stage.load(block_name(i)) for i in range(source.num_blocks)]
    learned = [transforms_from_plain(tensors, layouts, torch.float64) for tensors in plain]
    diagonal = {"attn_in", "mlp_in", "mlp_out"}
    assert all(transforms.keys() == (diagonal if recipe_name == "smoothquant" else SITES) for transforms in learned)
    moved = [block.metrics["loss_after"] < block.metrics["loss_before"] for block in stage.manifest.items.values()]
    assert moved == [recipe_name == "spin"] * source.num_blocks
    assert relative(folded_logits(source, learned, recipe), original) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_folded_block_equals_the_unfolded_form(tmp_path: Path, name: str):
    """y = (x T)(W T⁻ᵀ)ᵀ with dense T, linear by linear: the output, and what reaches each quantizer, are the same."""
    source = tiny_source(tmp_path, name)
    layouts = layouts_of(source)
    transforms = random_transforms(layouts)
    hidden = torch.randn(2, 11, source.shapes.hidden, generator=torch.Generator().manual_seed(3))
    expected, reaching = block_forward(source.block_tensors(0), source.config, hidden, transforms)

    block = folded_block(source, 0, layouts, transforms)
    seen: dict[str, torch.Tensor] = {}
    for site, module in block.sites.items():
        module.register_forward_hook(lambda m, args, output, site=site: seen.update({site: output}))
    with torch.no_grad():
        output = run_block(block, hidden, source.block_kwargs(hidden, ATTENTION)[0])
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert seen.keys() == reaching.keys() == SITES | {"query"}
    for site, values in reaching.items():
        np.testing.assert_allclose(seen[site], values, rtol=0, atol=1e-5 * np.abs(values).max(), err_msg=site)


@pytest.mark.parametrize("name", ["llama with biases", "mistral", "qwen2", "qwen3"])
def test_the_block_written_down_for_these_tests_is_the_models_block(tmp_path: Path, name: str):
    source = tiny_source(tmp_path, name)
    hidden = torch.randn(2, 11, source.shapes.hidden, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = run_block(source.block(1), hidden, source.block_kwargs(hidden)[1])
    output, _ = block_forward(source.block_tensors(1), source.config, hidden)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def random_parameters(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    """Of a Llama block with biases everywhere, float64."""
    torch.manual_seed(seed)
    norms = ("input_layernorm", "post_attention_layernorm")
    parameters = {f"{norm}.weight": torch.randn(shapes.hidden, dtype=torch.float64) for norm in norms}
    for name, (out, width) in shapes.linears(LLAMA).items():
        parameters[f"{name}.weight"] = torch.randn(out, width, dtype=torch.float64)
        parameters[f"{name}.bias"] = torch.randn(out, dtype=torch.float64)
    return parameters


any_shapes = st.builds(
    lambda hidden, kv_heads, shared, half, intermediate: Shapes(
        hidden, kv_heads * shared, kv_heads, 2 * half, intermediate
    ),
    *(st.integers(low, high) for low, high in ((2, 40), (1, 3), (1, 3), (1, 5), (2, 40))),
)


@settings(max_examples=40)
@given(shapes=any_shapes, seed=st.integers(0, 99))
def test_every_folded_parameter_is_what_dense_algebra_says(shapes: Shapes, seed: int):
    layouts = block_layout(Recipe(), LLAMA, shapes)
    transforms = random_transforms(layouts, seed)
    before = random_parameters(shapes, seed)
    after = {name: array(tensor) for name, tensor in fold(before, transforms, LLAMA, shapes).items()}
    expected = {name: array(tensor) for name, tensor in before.items()}

    T = {name: dense(transforms[name], layout.width) for name, layout in layouts.items() if name != "attn_out"}
    every_kv_head = np.kron(np.eye(shapes.kv_heads), T["value"])
    expected["self_attn.v_proj.weight"] = every_kv_head.T @ expected["self_attn.v_proj.weight"]
    expected["self_attn.v_proj.bias"] = expected["self_attn.v_proj.bias"] @ every_kv_head
    T["attn_out"] = np.kron(array(transforms["attn_out"].left.matrix), T["value"])
    for site in LLAMA.sites:
        for reader in site.readers:
            expected[f"{reader}.weight"] = expected[f"{reader}.weight"] @ np.linalg.inv(T[site.name]).T
    expected["input_layernorm.weight"] *= array(transforms["attn_in"].diag)
    expected["post_attention_layernorm.weight"] *= array(transforms["mlp_in"].diag)
    expected["mlp.up_proj.weight"] *= array(transforms["mlp_out"].diag)[:, None]
    expected["mlp.up_proj.bias"] *= array(transforms["mlp_out"].diag)

    assert after.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-9, atol=1e-9 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("site", sorted(SITES))
def test_each_site_alone_leaves_the_block_as_it_was(tmp_path: Path, site: str):
    """A fold that forgets one place is not saved by another."""
    source = tiny_source(tmp_path, "llama with biases")
    layouts = {site: layouts_of(source)[site]}
    hidden = torch.randn(2, 11, source.shapes.hidden, generator=torch.Generator().manual_seed(3))
    kwargs = source.block_kwargs(hidden, ATTENTION)[0]
    with torch.no_grad():
        expected = run_block(source.block(0), hidden, source.block_kwargs(hidden)[0])
        folded = folded_block(source, 0, layouts, random_transforms(layouts))
        assert relative(run_block(folded, hidden, kwargs), expected) < 1e-5


def test_folding_leaves_its_input_alone_and_keeps_names_shapes_and_dtype():
    shapes = Shapes(hidden=12, heads=4, kv_heads=2, head_dim=4, intermediate=10)
    parameters = random_parameters(shapes, 0)
    copies = {name: tensor.clone() for name, tensor in parameters.items()}
    folded = fold(parameters, random_transforms(block_layout(Recipe(), LLAMA, shapes)), LLAMA, shapes)
    for name, tensor in copies.items():
        assert torch.equal(parameters[name], tensor)
        assert (folded[name].shape, folded[name].dtype) == (tensor.shape, tensor.dtype)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in fold(parameters, {}, LLAMA, shapes).items())


def test_folding_is_differentiable_in_every_part_of_every_transform():
    shapes = Shapes(hidden=4, heads=2, kv_heads=1, head_dim=2, intermediate=6)
    layouts = block_layout(Recipe(), LLAMA, shapes)
    parameters = random_parameters(shapes, 0)
    parts = [
        (name, part, tensor.clone().requires_grad_())
        for name, transform in random_transforms(layouts).items()
        for part, tensor in (
            ("left", transform.left and transform.left.matrix),
            ("right", transform.right and transform.right.matrix),
            ("diag", transform.diag),
        )
        if tensor is not None and name != "key"
    ]

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        plain: dict[str, dict[str, torch.Tensor]] = {}
        for (name, part, _), tensor in zip(parts, tensors, strict=True):
            plain.setdefault(name, {})[part] = tensor
        transforms = {name: transform_from_matrices(layouts[name].width, **given) for name, given in plain.items()}
        return torch.stack(
            [tensor.sin().sum() for tensor in fold(parameters, transforms, LLAMA, shapes).values()]
        ).sum()

    assert torch.autograd.gradcheck(total, [tensor for *_, tensor in parts])


def test_a_block_runs_with_all_its_linears_as_they_are(tmp_path: Path):
    """No copy of a model's code: folding gives tensors, the modules stay the library's own."""
    source = tiny_source(tmp_path, "qwen3")
    layouts = layouts_of(source)
    block = folded_block(source, 0, layouts, random_transforms(layouts))
    stock = source.block(0)
    assert type(block) is type(stock)
    assert {type(block.get_submodule(name)) for name in source.family.linears} == {nn.Linear}
