from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatq_cli.calibration.precision import with_fast_linears
from flatq_cli.errors import UsageError, WorkError
from flatq_cli.runtime.fused import open_fused
from flatq_cli.stages.calibrate import _sharing_copy, calibrate, open_or_create_run
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.atomic import file_sha256
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import (
    FAMILIES,
    NO_TRANSFORM,
    RECIPES,
    calibrated_run,
    tiny_model_dir,
    tiny_recipe,
    tiny_source,
    tiny_tokens,
)

SILENT = SilentProgress()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=3)


def hashes(run: Run) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted((run.path / "calibrate").glob("*.safetensors"))}


def metrics(run: Run, block: int) -> dict[str, Any]:
    return run.stage("calibrate").manifest.items[f"block-{block:05d}"].metrics


class Interrupted(SilentProgress):
    """A progress that is cut off before an item."""

    def __init__(self, at: int) -> None:
        self.at = at

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        for i, item in enumerate(items):
            if i == self.at:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("sections", RECIPES.values(), ids=RECIPES)
def test_every_kind_of_recipe_calibrates_fuses_and_runs(tmp_path: Path, model: Path, sections: dict[str, Any]):
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=1, **sections), tmp_path / "run")
    fuse(run, "cpu", SILENT)
    with torch.no_grad():
        logits = open_fused(run).assemble()(tiny_tokens()).logits
    assert logits.isfinite().all()
    learns = sections != RECIPES["nothing"] and sections.get("transform") != NO_TRANSFORM
    for block in range(3):
        figures = metrics(run, block)
        assert 0 <= figures["loss_after"] < 0.5
        assert figures["steps"] == 2 or not learns
        assert (figures["loss_before"] == 0) == (sections == RECIPES["nothing"])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models_are_calibrated_in_float32(tmp_path: Path, family: str):
    model = tiny_model_dir(tmp_path, family, torch.bfloat16)
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    for file in (run.path / "calibrate").glob("*.safetensors"):
        assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path, model: Path):
    recipes = [tiny_recipe(tmp_path, epochs=2, calibration={"seed": seed}) for seed in (0, 0, 1)]
    first, again, other = (hashes(calibrated_run(model, recipe, tmp_path / str(i))) for i, recipe in enumerate(recipes))
    assert first == again
    assert len(first) == 3
    assert set(first.values()).isdisjoint(other.values())


def test_the_result_does_not_depend_on_what_the_process_drew_before(tmp_path: Path, model: Path):
    recipe = tiny_recipe(tmp_path, epochs=1, transform={"init": "orthogonal"})
    first = hashes(calibrated_run(model, recipe, tmp_path / "a"))
    torch.manual_seed(1234)
    torch.randn(7)
    assert hashes(calibrated_run(model, recipe, tmp_path / "b")) == first


def test_without_epochs_the_start_is_the_result(tmp_path: Path, model: Path):
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=0), tmp_path / "run")
    for block in range(3):
        assert metrics(run, block)["steps"] == 0
        assert metrics(run, block)["loss_before"] == metrics(run, block)["loss_after"] > 0


def test_the_figures_of_the_stage_are_means_over_the_blocks(tmp_path: Path, model: Path):
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    manifest = run.stage("calibrate").manifest
    assert manifest.status == "done"
    assert manifest.metrics["blocks"] == 3
    for key in ("loss_before", "loss_after"):
        mean = sum(metrics(run, block)[key] for block in range(3)) / 3
        assert manifest.metrics[key] == pytest.approx(mean)
    assert calibrate(run, "cpu", SILENT) == manifest.metrics


def test_a_block_learns_from_full_precision_inputs(tmp_path: Path, model: Path):
    """The second block's artifact is the same however badly the first is quantized: here the first has other weights
    in its last linear, scaled so that its full-precision output stays and its rounding does not.
    """
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    before, losses = hashes(run), [metrics(run, block)["loss_after"] for block in range(3)]
    twin = tmp_path / "twin"
    twin.mkdir()
    for file in model.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    weights = load_file(twin / "model.safetensors")
    # powers of two: up and down again without rounding
    weights["model.layers.0.mlp.up_proj.weight"][::2] *= 64
    weights["model.layers.0.mlp.down_proj.weight"][:, ::2] /= 64
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    other = calibrated_run(twin, tiny_recipe(tmp_path, epochs=1), tmp_path / "other")
    after = hashes(other)
    assert after["block-00000.safetensors"] != before["block-00000.safetensors"]
    assert metrics(other, 0)["loss_after"] != losses[0]
    assert after["block-00001.safetensors"] == before["block-00001.safetensors"]
    assert after["block-00002.safetensors"] == before["block-00002.safetensors"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_calibration_that_was_cut_off_goes_on_and_gives_the_same_bits(tmp_path: Path, model: Path, at: int):
    recipe = tiny_recipe(tmp_path, epochs=1)
    whole = hashes(calibrated_run(model, recipe, tmp_path / "whole"))
    run = open_or_create_run(str(model), recipe, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        calibrate(run, "cpu", Interrupted(at))
    assert len(hashes(run)) == at
    assert not run.stage("calibrate").done
    written = {file: file.stat().st_mtime_ns for file in (run.path / "calibrate").glob("*.safetensors")}
    calibrate(run, "cpu", SILENT)
    assert hashes(run) == whole
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())


def test_a_calibration_killed_between_its_last_block_and_its_end_is_finished(tmp_path: Path, model: Path):
    run = calibrated_run(model, tiny_recipe(tmp_path), tmp_path / "run")
    file = run.path / "calibrate/manifest.json"
    finished = json.loads(file.read_text())
    file.write_text(json.dumps({**finished, "status": "running", "metrics": {}}))
    before = hashes(run)
    calibrate(run, "cpu", SILENT)
    assert hashes(run) == before
    assert run.stage("calibrate").done
    assert run.stage("calibrate").manifest.metrics == finished["metrics"]


@pytest.mark.parametrize("damage", ["truncated", "gone", "empty"])
def test_a_finished_block_whose_file_was_damaged_is_made_again(tmp_path: Path, model: Path, damage: str):
    run = calibrated_run(model, tiny_recipe(tmp_path, epochs=1), tmp_path / "run")
    before = hashes(run)
    file = run.path / "calibrate/block-00001.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -16 if damage == "truncated" else 0])
    calibrate(run, "cpu", SILENT)
    assert hashes(run) == before
    assert run.stage("calibrate").done


def test_a_finished_block_with_a_wrong_bit_is_refused_by_name_when_it_is_used(tmp_path: Path, model: Path):
    run = calibrated_run(model, tiny_recipe(tmp_path), tmp_path / "run")
    file = run.path / "calibrate/block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"block-00001\.safetensors is damaged: .*flatq calibrate"):
        fuse(run, "cpu", SILENT)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("sections", [{}, RECIPES["rtn"]], ids=["default", "rtn"])
@pytest.mark.parametrize("name", ["input_layernorm", "mlp.down_proj"])
def test_a_model_with_a_weight_that_is_no_number_is_an_error_that_names_it(
    tmp_path: Path, name: str, sections: dict[str, Any], bad: float
):
    model = tiny_model_dir(tmp_path, "llama")
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.1.{name}.weight"].view(-1)[5] = bad
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = open_or_create_run(str(model), tiny_recipe(tmp_path, epochs=1, **sections), tmp_path / "run")
    with pytest.raises(
        WorkError, match=rf"^block 1: .* is not a number \({name}\.weight of the model holds NaN or Inf\)"
    ):
        calibrate(run, "cpu", SILENT)
    # what was finished before is kept
    assert set(hashes(run)) == {"block-00000.safetensors"}


def test_a_loss_that_is_no_number_is_an_error_and_keeps_the_blocks_before(tmp_path: Path, model: Path):
    run = open_or_create_run(
        str(model), tiny_recipe(tmp_path, epochs=2, calibration={"learning_rate": 1e30}), tmp_path / "run"
    )
    with pytest.raises(
        WorkError, match=r"^block 0, step \d+: the loss is not a number \(.*sites\..*\); earlier blocks"
    ):
        calibrate(run, "cpu", SILENT)
    assert not run.stage("calibrate").done


def test_a_group_that_does_not_divide_the_widths_is_refused_before_there_is_a_run(tmp_path: Path, model: Path):
    with pytest.raises(UsageError, match=r"^weights\.group: 7 does not divide the 32 inputs of self_attn\.q_proj"):
        open_or_create_run(str(model), tiny_recipe(tmp_path, weights={"group": 7}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path, model: Path):
    recipe = tiny_recipe(tmp_path, calibration={"samples": 500})
    with pytest.raises(UsageError, match=r"lower calibration\.samples or calibration\.seqlen"):
        open_or_create_run(str(model), recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_full_precision_pass_shares_the_block_and_leaves_it_as_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("flatq_cli.calibration.precision.matmul_dtype", lambda device: torch.bfloat16)
    block = tiny_source(tmp_path, "llama").block(0)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    shared = _sharing_copy(block)
    assert shared.mlp.up_proj.weight.data_ptr() == block.mlp.up_proj.weight.data_ptr()
    with_fast_linears(shared, torch.device("cpu"))
    assert shared.mlp.up_proj.weight.dtype == torch.bfloat16
    for name, parameter in block.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
