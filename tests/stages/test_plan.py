from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from flatq_cli.errors import UsageError
from flatq_cli.stages.fuse import fuse
from flatq_cli.stages.plan import CalibrationPlan, plan
from flatq_cli.store.progress import SilentProgress
from tests.tiny import RECIPES, TEXT, calibrated_run, tiny_model_dir, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


def planned(model: Path, tmp_path: Path, **sections: Any) -> CalibrationPlan:
    return plan(str(model), tiny_recipe(tmp_path, **sections), "cpu")


@pytest.mark.parametrize("sections", RECIPES.values(), ids=RECIPES)
def test_a_block_has_as_many_parameters_as_its_artifact_has_numbers(
    tmp_path: Path, model: Path, sections: dict[str, Any]
):
    run = calibrated_run(model, tiny_recipe(tmp_path, **sections), tmp_path / "run")
    file = run.path / "calibrate/block-00000.safetensors"
    numbers = sum(tensor.numel() for tensor in load_file(file).values())
    assert planned(model, tmp_path, **sections).parameters_per_block == numbers
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned(model, tmp_path, **sections).totals()["artifact_bytes"] == file.stat().st_size - header


@pytest.mark.parametrize("name", ["qwen2", "qwen3 with prime widths"])
def test_the_plan_counts_every_block(tmp_path: Path, name: str):
    model = tiny_model_dir(tmp_path, name)
    run = calibrated_run(model, tiny_recipe(tmp_path), tmp_path / "run")
    files = list((run.path / "calibrate").glob("*.safetensors"))
    totals = planned(model, tmp_path).totals()
    assert totals["blocks"] == len(files) == 2
    numbers = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert totals["artifact_bytes"] == 4 * sum(numbers)


def test_rows_and_totals_follow_the_recipe(tmp_path: Path, model: Path):
    made = planned(model, tmp_path, epochs=3, calibration={"samples": 10, "seqlen": 16, "batch": 4})
    assert made.totals()["tokens"] == 160
    assert made.totals()["steps_per_block"] == 3 * 3
    rows = {row["site"]: row for row in made.rows()}
    assert [rows[site]["transform"] for site in ("mlp_out", "attn_out", "key")] == ["diag · 7×7 ⊗ 8×8", "4×4", "8×8"]
    assert rows["attn_in"] | {"site": "attn_in", "width": 32, "n1": 4, "n2": 8, "bits": 4} == rows["attn_in"]
    nothing = {row["transform"] for row in planned(model, tmp_path, **RECIPES["rtn"]).rows()}
    assert nothing == {"none"}
    assert planned(model, tmp_path, **RECIPES["nothing"]).rows() == []


def test_more_work_is_planned_as_more_time(tmp_path: Path, model: Path):
    short, long = (planned(model, tmp_path, epochs=epochs) for epochs in (1, 10))
    assert 0 < short.seconds * short.flops_per_second < long.seconds * long.flops_per_second


def test_rounding_by_gptq_and_every_step_of_tuning_are_planned_for_fuse(tmp_path: Path, model: Path):
    def flops(rounding: str, steps: int) -> float:
        made = planned(model, tmp_path, weights={"rounding": rounding}, tune={"steps": steps})
        return made.totals()["fuse_seconds"] * made.flops_per_second

    assert flops("nearest", 0) == 0
    assert flops("gptq", 0) > 0
    one, three = (flops("nearest", steps) for steps in (1, 3))
    assert three == pytest.approx(3 * one)
    assert flops("gptq", 1) == pytest.approx(flops("gptq", 0) + one)


def test_no_weight_is_read(tmp_path: Path):
    """A model whose weights are not numbers at all can be planned."""
    model = tiny_model_dir(tmp_path, "llama")
    file = model / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little") + 8
    content = file.read_bytes()
    file.write_bytes(content[:size] + b"\xff" * (len(content) - size))
    assert planned(model, tmp_path).blocks == 2


def test_what_calibrate_would_refuse_is_refused(tmp_path: Path, model: Path):
    with pytest.raises(UsageError, match=r"weights\.group: 7 does not divide"):
        planned(model, tmp_path, weights={"group": 7})


def peak_bytes(work: Callable[[], object], mapped: int) -> int:
    """The most that torch held at once while `work` ran. Files of `mapped` bytes are mapped, not read: not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) != mapped:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("widths", "calibration"),
    [
        ({"hidden_size": 192, "intermediate_size": 512}, {"samples": 4}),
        ({"max_position_embeddings": 512}, {"samples": 4, "seqlen": 256, "batch": 2}),
        ({}, {"samples": 40, "seqlen": 32, "batch": 4}),
    ],
    ids=["wide", "long sequences", "many sequences"],
)
def test_memory_is_planned_within_a_factor_of_two(tmp_path: Path, widths: dict[str, int], calibration: dict[str, int]):
    model = tiny_model_dir(tmp_path, "llama", num_hidden_layers=1, **widths)
    recipe = tiny_recipe(tmp_path, epochs=1, calibration=calibration)
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 10)
    mapped = (model / "model.safetensors").stat().st_size
    measured = peak_bytes(lambda: calibrated_run(model, recipe, tmp_path / "run"), mapped)
    assert measured / 2 < plan(str(model), recipe, "cpu").memory_bytes < 2 * measured


@pytest.mark.parametrize(
    ("widths", "sections"),
    [
        ({"hidden_size": 192, "intermediate_size": 512}, {"weights": {"rounding": "nearest"}, "tune": {"steps": 0}}),
        ({"hidden_size": 192, "intermediate_size": 512}, {"weights": {"rounding": "gptq"}, "tune": {"steps": 0}}),
        ({}, {"weights": {"rounding": "gptq"}, "tune": {"steps": 0}, "calibration": {"rounding_samples": 60}}),
        ({"vocab_size": 96}, {"weights": {"rounding": "nearest"}, "tune": {"steps": 40}}),
    ],
    ids=["nearest", "gptq", "gptq on much text", "tuning"],
)
def test_what_fuse_needs_at_least_is_planned_within_a_factor_of_two(
    tmp_path: Path, monkeypatch, widths: dict[str, int], sections: dict[str, Any]
):
    monkeypatch.setattr("flatq_cli.stages.tune.KEEP_SHARE", 0.0)
    model = tiny_model_dir(tmp_path, "llama", num_hidden_layers=1, **widths)
    calibration = {"samples": 4, "seqlen": 32, "batch": 4, **sections.get("calibration", {})}
    recipe = tiny_recipe(tmp_path, epochs=0, **{**sections, "calibration": calibration})
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 40)
    run = calibrated_run(model, recipe, tmp_path / "run")
    measured = peak_bytes(lambda: fuse(run, "cpu", SilentProgress()), (model / "model.safetensors").stat().st_size)
    assert measured / 2 < plan(str(model), recipe, "cpu").fuse_memory_bytes < 2 * measured
