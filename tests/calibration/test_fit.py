from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatq_cli.calibration.fit import error_measure
from flatq_cli.config.recipe import Recipe
from flatq_cli.errors import WorkError
from flatq_cli.models.source import run_block
from tests.calibration.prepare import Prepared, prepare
from tests.tiny import FAMILIES, FLOAT


def recipe(calibration: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    settings = {"samples": 8, "seqlen": 16, "batch": 4, "epochs": 12, **(calibration or {})}
    return Recipe.model_validate({**sections, "calibration": settings})


# At 4 bits a tiny random block has little to learn and much rounding noise: that training works shows at 8.
EIGHT = {"weights": {"bits": 8}, "activations": {"bits": 8}, "kv_cache": {"bits": 8}}
ENOUGH = {"samples": 32, "seqlen": 32}
LONGER = {**ENOUGH, "epochs": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_error_of_every_family(tmp_path: Path, family: str):
    ready, settings = prepare(tmp_path, family, **ENOUGH), recipe(LONGER, **EIGHT)
    result = ready.fit(settings, ready.learnable(settings))
    assert result.loss_after < 0.8 * result.loss_before
    assert result.steps == 8 * 8


@pytest.mark.parametrize(
    "settings",
    [
        recipe(LONGER, **EIGHT, transform={"parametrization": "svd"}),
        recipe(LONGER, **EIGHT, transform={"parametrization": "svd", "init": "orthogonal", "diagonal": "smooth"}),
        recipe({**LONGER, "loss": "log"}, **EIGHT, transform={"init": "hadamard"}),
        recipe({**LONGER, "batch": 5}, **{**EIGHT, "activations": {"bits": 8, "symmetric": False}}),
        recipe(LONGER, weights={"bits": 8, "symmetric": False, "group": 8}, activations=FLOAT, kv_cache=FLOAT),
        recipe(LONGER, **{**EIGHT, "weights": FLOAT}),
        recipe(LONGER, weights=FLOAT, activations=FLOAT, kv_cache={"bits": 8}),
    ],
    ids=["svd", "paper", "log", "asymmetric", "weights", "activations", "cache"],
)
def test_training_lowers_the_error_of_every_kind_of_recipe(tmp_path: Path, settings: Recipe):
    ready = prepare(tmp_path, **ENOUGH)
    result = ready.fit(settings, ready.learnable(settings, clip=0.98))
    assert result.loss_after < 0.85 * result.loss_before


@pytest.mark.parametrize("init", ["identity", "hadamard"])
def test_with_outlier_channels_training_lowers_the_error_at_4_bits(with_outliers: Prepared, init: str):
    settings = recipe({"epochs": 10}, transform={"init": init})
    result = with_outliers.fit(settings, with_outliers.learnable(settings))
    assert result.loss_after < 0.95 * result.loss_before


def test_the_figures_are_relative_squared_errors_over_all_samples(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"batch": 3, "loss": "relative"})
    learnable, quantized = ready.learnable(settings), ready.quantized(settings)

    def by_hand() -> float:
        with torch.no_grad():
            output = quantized.run(quantized.tensors(learnable), ready.hidden, ready.kwargs)
        return float((output - ready.targets).double().pow(2).sum() / ready.targets.double().pow(2).sum())

    before = by_hand()
    result = ready.fit(settings, learnable)
    assert result.loss_before == pytest.approx(before, rel=1e-3)
    assert result.loss_after == pytest.approx(by_hand(), rel=1e-3)


def test_the_same_start_gives_the_same_bits(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"epochs": 3})
    first, second = ready.learnable(settings), ready.learnable(settings)
    assert ready.fit(settings, first) == ready.fit(settings, second)
    assert all(torch.equal(tensor, second.plain()[name]) for name, tensor in first.plain().items())


def test_no_epochs_leave_the_start_as_it_is(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"epochs": 0})
    learnable = ready.learnable(settings)
    before = learnable.plain()
    result = ready.fit(settings, learnable)
    assert (result.steps, result.loss_after) == (0, result.loss_before)
    assert result.loss_before > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in learnable.plain().items())


def test_a_recipe_with_nothing_to_learn_takes_no_step(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe(weights=FLOAT, activations=FLOAT, kv_cache=FLOAT)
    assert ready.fit(settings, ready.learnable(settings)) == (0.0, 0.0, 0)


@pytest.mark.parametrize(("still", "moving"), [("learning_rate", "clip"), ("clip_learning_rate", "transform")])
def test_transforms_and_clips_have_a_rate_each(tmp_path: Path, still: str, moving: str):
    ready, settings = prepare(tmp_path), recipe({"epochs": 8, "learning_rate": 5e-4, "loss": "relative", still: 1e-12})
    # From a start that training improves on, or it would be kept.
    learnable = ready.learnable(settings, clip=0.7)
    before = learnable.plain()
    ready.fit(settings, learnable)
    for name, tensor in learnable.plain().items():
        moved = float((tensor - before[name]).abs().max())
        assert (moved > 1e-4) == (name.endswith("clip") == (moving == "clip")), name


def test_training_that_ends_worse_than_it_began_keeps_its_start(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"epochs": 2, "learning_rate": 0.2})
    learnable = ready.learnable(settings)
    before = learnable.plain()
    result = ready.fit(settings, learnable)
    assert result.steps > 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in learnable.plain().items())


def test_the_models_own_weights_stay_as_they_are(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"epochs": 2})
    quantized = ready.quantized(settings)
    before = {name: tensor.clone() for name, tensor in quantized.block.state_dict().items()}
    learnable = ready.learnable(settings)
    output = quantized.run(quantized.tensors(learnable), ready.hidden, ready.kwargs)
    output.sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.block.state_dict().items())
    assert not any(parameter.requires_grad for parameter in quantized.block.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_quantizers_the_block_is_the_models_whatever_the_transforms(tmp_path: Path, family: str):
    """The recipe decides which transforms there are; turned off, its quantizers leave the output alone."""
    ready, settings = prepare(tmp_path, family), recipe()
    learnable = ready.learnable(settings)
    quantized = ready.quantized(settings)
    quantized.spec = quantized.spec.model_copy(update={"bits": 16})
    for site in quantized.block.sites.values():
        site.bits = 16
    with torch.no_grad():
        output = quantized.run(quantized.tensors(learnable), ready.hidden, ready.kwargs)
        block = ready.source.block(0)
        expected = run_block(block, ready.hidden, ready.source.block_kwargs(ready.hidden)[0])
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["direct", "svd"])
def test_a_learning_rate_that_is_far_too_high_is_an_error_that_names_block_step_and_parameter(
    tmp_path: Path, form: str
):
    ready = prepare(tmp_path)
    settings = recipe({"learning_rate": 1e30}, transform={"parametrization": form})
    what = "(the loss is not a number|a transform has no inverse)"
    message = rf"^block 0, step [1-9]\d*: {what} \(.*sites\..*\).*calibration\.learning_rate"
    with pytest.raises(WorkError, match=message):
        ready.fit(settings, ready.learnable(settings))


def test_a_parameter_that_is_not_a_number_is_named(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe()
    learnable = ready.learnable(settings)
    with torch.no_grad():
        learnable.sites["mlp_out"].diag[3] = torch.nan
    with pytest.raises(WorkError, match=r"^block 0, step 0: the loss is not a number \(sites\.mlp_out\.diag\)"):
        ready.fit(settings, learnable)


def test_a_start_that_gives_no_number_is_an_error_also_without_training(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe({"epochs": 0})
    targets = ready.targets.clone()
    targets[0, 0, 0] = torch.inf
    with pytest.raises(WorkError, match=r"^block 0, step 0: the loss is not a number"):
        ready.fit(settings, ready.learnable(settings), targets=targets)


def test_a_matrix_that_lost_its_inverse_is_an_error_of_its_block(tmp_path: Path):
    ready, settings = prepare(tmp_path), recipe()
    learnable = ready.learnable(settings)
    with torch.no_grad():
        learnable.sites["attn_out"].left.matrix.zero_()
    with pytest.raises(WorkError, match=r"^block 0, step 0: a transform has no inverse"):
        ready.fit(settings, learnable)


def test_the_token_measure_is_the_mean_of_each_tokens_relative_error():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 5, 8, generator=generator)
    target[0, 0] *= 1000  # a massive token counts as one token
    target[1, 1] = 0
    output = target + torch.randn(2, 5, 8, generator=generator)
    expected = [
        float((o - t).pow(2).sum() / (t.pow(2).sum() if t.any() else 1.0))
        for o, t in zip(output.view(-1, 8), target.view(-1, 8), strict=True)
    ]
    assert float(error_measure("token", target)(output, target)) == pytest.approx(sum(expected) / 10, rel=1e-6)


def test_the_relative_measure_is_the_squared_error_over_the_power_of_all_outputs():
    generator = torch.Generator().manual_seed(0)
    target, output = torch.randn(2, 2, 5, 8, generator=generator)
    expected = float((output - target).pow(2).sum() / target.pow(2).sum())
    assert float(error_measure("relative", target)(output, target)) == pytest.approx(expected, rel=1e-6)
