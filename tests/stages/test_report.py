from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatq_cli.errors import UsageError
from flatq_cli.stages.calibrate import calibrate, calibration_tokens, open_or_create_run
from flatq_cli.stages.export import export
from flatq_cli.stages.fuse import fuse
from flatq_cli.stages.report import gather, report, shown_blocks
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from flatq_cli.transforms.kronecker import kronecker_matmul
from tests.tiny import calibrated_run, source_of, tiny_model_dir, tiny_recipe

TUNED = {"tune": {"steps": 2, "warmup": 1}}


def evaluation(run: Run) -> None:
    """A result in the run, as eval would leave it."""
    result = {
        "schema": "flatq.eval/1",
        "target": str(run.path),
        "kind": "fake-quant",
        "recipe": run.config.recipe_name,
        "perplexity": {"prose": {"value": 20.5, "tokens": 64, "seqlen": 32}},
        "tasks": {"piqa": {"acc": 0.5}},
        "gates": [],
        "versions": {},
        "seconds": 1.0,
    }
    (run.path / "eval").mkdir()
    (run.path / "eval" / "ppl.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose calibrate stage alone is done."""
    folder = tmp_path_factory.mktemp("started")
    return calibrated_run(tiny_model_dir(folder, "llama"), tiny_recipe(folder, epochs=1), folder / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with every stage."""
    folder = tmp_path_factory.mktemp("whole")
    run = calibrated_run(tiny_model_dir(folder, "llama"), tiny_recipe(folder, **TUNED), folder / "run")
    fuse(run, "cpu", SilentProgress())
    export(run, "flatq", None, SilentProgress())
    evaluation(run)
    return run


@pytest.fixture
def copied(started: Run, tmp_path: Path) -> Run:
    """A copy of the run that may be damaged."""
    shutil.copytree(started.path, tmp_path / "copy")
    return Run.open(tmp_path / "copy")


def gathered(run: Run, *compared: Path) -> dict:
    return gather(run, compared, "cpu", SilentProgress())


def test_a_whole_run_lacks_nothing(whole: Run):
    data = gathered(whole)
    assert data["missing"] == []
    assert data["comparison"][0]["perplexity.prose"] == 20.5
    assert data["comparison"][0]["bytes"] > 0
    assert [row["stage"] for row in data["stages"]] == ["calibrate", "fuse", "fuse/tune", "export/flatq"]
    assert all(row["rounding_error"] > 0 for row in data["blocks"])
    assert data["tuning"]["steps"] == 2
    assert data["tuning"]["divergence_before"] > 0
    assert all(row["peak_memory_bytes"] > 2**20 for row in data["stages"])
    assert data["comparison"][0]["memory_bytes"] == max(row["peak_memory_bytes"] for row in data["stages"][:3])


def test_a_tuned_run_shows_the_activations_of_its_tuned_blocks(whole: Run, started: Run):
    for block in gathered(whole)["flatness"]["blocks"]:
        for site in block["sites"]:
            after, tuned = site["activation"]["after"], site["activation"]["tuned"]
            assert tuned["error"] > 0
            assert tuned["by_channel"] != after["by_channel"]
            assert len(tuned["by_channel"]) == len(after["by_channel"])
    sites = gathered(started)["flatness"]["blocks"][0]["sites"]
    assert all(site["activation"]["tuned"] is None for site in sites)


def test_tuned_blocks_read_what_the_full_precision_blocks_read(whole: Run):
    """Block 1's site before q, k and v: its input passes the tuned norm and matrices, and nothing quantized."""
    source, stored = source_of(Path(whole.config.model.location)), {}
    for file in sorted((whole.path / "fuse").glob("model-*.safetensors")):
        stored |= load_file(file)
    seen: list[torch.Tensor] = []
    model = source.assemble()
    norm = model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda module, arguments, output: seen.append(output / module.weight))
    with torch.no_grad():
        model(input_ids=calibration_tokens(whole, source))
    site = "model.layers.1.sites.attn_in"
    normed = seen[0].reshape(-1, source.shapes.hidden) * stored["model.layers.1.input_layernorm.weight"]
    expected = kronecker_matmul(normed, stored[f"{site}.left"], stored[f"{site}.right"]).abs().amax(0)
    shown = gathered(whole)["flatness"]["blocks"][1]["sites"][0]["activation"]["tuned"]["by_channel"]
    assert shown == pytest.approx(expected.tolist(), rel=1e-3)


def test_blocks_fused_from_another_calibration_are_not_shown(whole: Run, tmp_path: Path):
    shutil.copytree(whole.path, tmp_path / "copy")
    run = Run.open(tmp_path / "copy")
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("block-00000", "block-00000.safetensors", {**stage.load("block-00000"), "more": torch.ones(1)})
    stage.finish()
    sites = gathered(run)["flatness"]["blocks"][0]["sites"]
    assert all(site["activation"]["tuned"] is None for site in sites)


def with_curve(whole: Run, folder: Path) -> tuple[Run, Path]:
    """A copy of the run whose tuning kept its divergences, and the file they are in."""
    shutil.copytree(whole.path, folder / "copy")
    run = Run.open(folder / "copy")
    stage = run.stage("fuse/tune")
    stage.begin(stage.manifest.inputs)
    losses = torch.tensor([0.123456789, float("nan"), 0.1], dtype=torch.float64)
    stage.save("curve", "curve.safetensors", {"divergence": losses})
    stage.finish()
    return run, stage.path / "curve.safetensors"


def test_the_divergence_of_each_step_is_there_where_it_was_kept(whole: Run, tmp_path: Path):
    data = gathered(with_curve(whole, tmp_path)[0])
    assert data["tuning"]["curve"] == [0.12346, None, 0.1]
    assert data["missing"] == []


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_curve_that_cannot_be_read_is_missing_and_no_error(whole: Run, tmp_path: Path, damage: str):
    run, file = with_curve(whole, tmp_path)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    data = gathered(run)
    assert data["tuning"]["curve"] is None
    assert data["missing"] == ["The divergence of each tuning step is not shown: its file is missing or damaged."]


def test_a_run_that_is_only_calibrated_says_what_is_missing(started: Run):
    data = gathered(started)
    assert [sentence.split()[0] for sentence in data["missing"]] == ["fuse", "There", "Nothing"]
    assert data["missing"][0] == "fuse is not finished: 0 of 2 blocks are rounded."
    assert data["tuning"] is None
    assert [row["rounding_error"] for row in data["blocks"]] == [None, None]
    assert len(data["flatness"]["blocks"]) == 2


def test_an_unfinished_calibration_has_no_flatness_yet(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    run = open_or_create_run(str(tiny_model_dir(tmp_path, "llama")), recipe, tmp_path / "run")
    data = gathered(run)
    assert data["flatness"] is None
    assert "calibrate is not finished: 0 of 2 blocks are calibrated." in data["missing"]
    assert data["stages"] == []


def test_channels_are_those_of_the_full_precision_model(started: Run):
    """The second block sees what the first one puts out."""
    source = source_of(Path(started.config.model.location))
    seen: list[torch.Tensor] = []
    model = source.assemble()
    norm = model.get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=calibration_tokens(started, source))
    site = gathered(started)["flatness"]["blocks"][1]["sites"][0]
    expected = seen[0].reshape(-1, source.shapes.hidden).abs().amax(0)
    assert site["activation"]["before"]["by_channel"] == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_channels_of_first_middle_last_and_worst_block_are_shown():
    rows = [{"block": index, "loss_after": 0.1 + (index == 7)} for index in range(30)]
    shown = shown_blocks(rows, 30)
    assert [(row["block"], row["why"]) for row in shown] == [
        *((0, "first"), (7, "largest loss"), (15, "middle"), (29, "last"))
    ]
    assert shown_blocks([], 1) == [{"block": 0, "why": "first, middle, last"}]
    rows[7]["loss_after"] = None
    assert shown_blocks(rows, 30)[0]["why"] == "first, largest loss"


def test_only_the_shown_blocks_carry_channels(started: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flatq_cli.stages.report.shown_blocks", lambda rows, count: [{"block": 1, "why": "x"}])
    first, second = (block["sites"][0]["activation"]["after"] for block in gathered(started)["flatness"]["blocks"])
    assert "sorted" not in first
    assert "sorted" in second


@pytest.mark.parametrize("format", ["html", "md", "json"])
def test_the_same_run_gives_the_same_bytes(whole: Run, format: str, tmp_path: Path):
    files = [report(whole, [], format, tmp_path / f"{n}.{format}", "cpu", SilentProgress()) for n in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_json_is_the_data_of_the_schema(whole: Run):
    written = report(whole, [], "json", None, "cpu", SilentProgress())
    assert written == whole.path / "report.json"
    data = json.loads(written.read_text())
    assert data["schema"] == "flatq.report/1"
    assert data == json.loads(json.dumps(gathered(whole)))


def test_compared_runs_stand_beside_it(whole: Run, started: Run):
    rows = gathered(whole, started.path, whole.path / "eval" / "ppl.json")["comparison"]
    assert [row["name"] for row in rows] == ["run", "run", "ppl"]


def test_without_the_model_the_rest_is_there(copied: Run):
    moved = copied.config.model.model_copy(update={"location": str(copied.path / "gone")})
    data = gathered(Run(copied.path, copied.config.model_copy(update={"model": moved})))
    assert data["flatness"] is None
    assert "gone" in data["missing"][-1]
    assert len(data["blocks"]) == 2


def test_a_damaged_artifact_is_an_error_that_names_the_file(copied: Run):
    file = copied.path / "calibrate" / "block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"block-00001\.safetensors"):
        gathered(copied)


def test_what_cannot_be_written_or_compared_is_refused(started: Run, tmp_path: Path):
    with pytest.raises(UsageError, match="is a directory"):
        report(started, [], "html", tmp_path, "cpu", SilentProgress())
    with pytest.raises(UsageError, match="not a run"):
        report(started, [tmp_path], "html", tmp_path / "x.html", "cpu", SilentProgress())
    assert not (tmp_path / "x.html").exists()


def test_a_report_changes_nothing_that_a_stage_looks_at(started: Run):
    report(started, [], "html", None, "cpu", SilentProgress())
    before = started.stage("calibrate").digest()
    calibrate(started, "cpu", SilentProgress())
    assert started.stage("calibrate").digest() == before
