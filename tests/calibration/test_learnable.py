from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flatq_cli.calibration.learnable import BlockParameters, transforms_from_plain
from flatq_cli.config.recipe import Recipe
from tests.calibration.prepare import Prepared, prepare
from tests.reference import array
from tests.tiny import RECIPES


def trained(ready: Prepared, settings: Recipe) -> BlockParameters:
    """Away from its start, so that nothing is right by being the start."""
    learnable = ready.learnable(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learnable.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return learnable


FORMS = [{"parametrization": form} for form in ("direct", "svd")]
FORMS.append({"parametrization": "orthogonal", "init": "orthogonal"})


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["parametrization"])
def test_what_is_stored_gives_the_transforms_that_were_trained(tmp_path: Path, form: dict[str, str]):
    ready = prepare(tmp_path, "qwen3")
    settings = Recipe.model_validate({"transform": form})
    learnable = trained(ready, settings)
    plain = learnable.plain()
    again = transforms_from_plain(plain, ready.layouts(settings), torch.float64)
    live = learnable.transforms()
    assert again.keys() == live.keys() == {"attn_in", "attn_out", "mlp_in", "mlp_out", "key", "value"}
    for site, transform in live.items():
        for part in ("left", "right"):
            trained_pair, stored = getattr(transform, part), getattr(again[site], part)
            assert (trained_pair is None) == (stored is None)
            if stored is None:
                continue
            # the matrix bit for bit; the inverse is that of the stored matrix, in float64
            assert torch.equal(stored.matrix, trained_pair.matrix.detach().double())
            product = array(stored.matrix).T @ array(stored.inverse_transpose)
            np.testing.assert_allclose(product, np.eye(len(product)), rtol=0, atol=1e-10)
            torch.testing.assert_close(
                stored.inverse_transpose.float(), trained_pair.inverse_transpose, rtol=1e-3, atol=1e-4
            )
        assert (transform.diag is None) == (again[site].diag is None)
        if transform.diag is not None:
            assert torch.equal(again[site].diag, transform.diag.detach().double())


@pytest.mark.parametrize("sections", RECIPES.values(), ids=RECIPES)
def test_the_stored_tensors_are_those_of_the_architecture_document(tmp_path: Path, sections: dict):
    """docs/architecture.md, "Tensors of a block", written out for hidden 32, 4 heads of 8 and intermediate 56."""
    ready, settings = prepare(tmp_path), Recipe.model_validate(sections)
    sizes = {"attn_in": (4, 8), "mlp_in": (4, 8), "mlp_out": (7, 8)}
    linears = ready.source.shapes.linears(ready.source.family)
    bits = settings.weights.bits, settings.activations.bits, settings.kv_cache.bits
    kronecker = settings.transform.kind == "kronecker"
    expected: dict[str, tuple[int, ...]] = {}
    if min(bits[0], bits[1]) < 16:
        for site, (n1, n2) in sizes.items():
            if kronecker:
                expected |= {f"{site}.left": (n1, n1), f"{site}.right": (n2, n2)}
            if settings.transform.diagonal != "none":
                expected[f"{site}.diag"] = (n1 * n2,)
        if kronecker:
            expected["attn_out.left"] = (4, 4)
    if kronecker and bits[2] < 16:
        expected["key.right"] = (8, 8)
    if kronecker and min(bits) < 16:
        expected["value.right"] = (8, 8)
    if bits[1] < 16 and settings.activations.clip == "learned":
        expected |= {f"{site}.clip": (2,) for site in ("attn_in", "attn_out", "mlp_in", "mlp_out")}
    if bits[2] < 16 and settings.kv_cache.clip == "learned":
        expected |= {"key.clip": (2,), "value.clip": (2,)}
    if bits[0] < 16 and settings.weights.clip == "learned":
        group = settings.weights.group
        expected |= {
            f"{name}.weight_clip": (out, width // group if group else 1, 2) for name, (out, width) in linears.items()
        }
    plain = ready.learnable(settings).plain()
    assert {name: tuple(tensor.shape) for name, tensor in plain.items()} == expected
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in plain.values())
    for name, tensor in plain.items():
        assert not name.endswith("clip") or bool(((tensor > 0) & (tensor < 1)).all()), name


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["parametrization"])
def test_every_parameter_learns(tmp_path: Path, form: dict[str, str]):
    ready = prepare(tmp_path, "qwen2")
    settings = Recipe.model_validate({"transform": form})
    learnable, quantized = ready.learnable(settings), ready.quantized(settings)
    output = quantized.run(quantized.tensors(learnable), ready.hidden, ready.kwargs)
    (output - ready.targets).pow(2).mean().backward()
    grads = {name: parameter.grad for name, parameter in learnable.named_parameters()}
    without = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    # the value site has one row of clips for keys and one for values; a 1 × 1 matrix could be without
    assert without == []


@pytest.mark.parametrize("init", ["hadamard", "orthogonal"])
def test_a_block_trains_with_orthogonal_matrices_and_what_is_stored_is_orthogonal(tmp_path: Path, init: str):
    bits = {section: {"bits": 8} for section in ("weights", "activations", "kv_cache")}
    settings = Recipe.model_validate(
        {
            **bits,
            "transform": {"parametrization": "orthogonal", "init": init, "diagonal": "none"},
            "calibration": {"epochs": 8, "learning_rate": 0.03},
        }
    )
    ready = prepare(tmp_path, samples=32, seqlen=32)
    learnable = ready.learnable(settings, clip=0.98)
    start = learnable.plain()
    result = ready.fit(settings, learnable)
    assert result.loss_after < 0.85 * result.loss_before
    matrices = {name: tensor for name, tensor in learnable.plain().items() if name.endswith((".left", ".right"))}
    assert len(matrices) == 9
    for name, matrix in matrices.items():
        assert float((matrix - start[name]).abs().max()) > 0.01, name
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)


def test_the_parameters_are_transforms_and_clips_and_nothing_else(tmp_path: Path):
    ready = prepare(tmp_path)
    learnable = ready.learnable(Recipe())
    transforms, clips = list(learnable.transform_parameters()), list(learnable.clip_parameters())
    assert {id(p) for p in transforms}.isdisjoint({id(p) for p in clips})
    assert {id(p) for p in (*transforms, *clips)} == {id(p) for p in learnable.parameters()}
    assert sum(p.numel() for p in learnable.parameters()) == sum(t.numel() for t in learnable.plain().values())


def test_what_is_stored_does_not_change_when_training_goes_on(tmp_path: Path):
    ready = prepare(tmp_path)
    learnable = ready.learnable(Recipe())
    plain = learnable.plain()
    before = {name: tensor.clone() for name, tensor in plain.items()}
    with torch.no_grad():
        for parameter in learnable.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())
