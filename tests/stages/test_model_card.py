from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flatq_cli.config.recipe_files import load_recipe
from flatq_cli.stages import export as stage
from flatq_cli.stages.export import export
from flatq_cli.stages.model_card import base_model, license_of
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.records import ModelIdentity
from flatq_cli.store.run import Run
from tests.tiny import fused_run

SILENT = SilentProgress()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fused_run(tmp_path_factory.mktemp("place"), "llama", weights={"group": 8})
    export(run, "flatq", None, SILENT)
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    return Run.open(Path(shutil.copytree(made.path, tmp_path / "run")))


def card(run: Run) -> str:
    return (run.path / "export/flatq/README.md").read_text(encoding="utf-8")


def front_matter(run: Run) -> dict[str, Any]:
    return yaml.safe_load(card(run).split("---\n")[1])


def add_result(run: Run, name: str, value: float, **more: Any) -> None:
    result = {
        "schema": "flatq.eval/1",
        "kind": "fake-quant",
        "perplexity": {"pydoc": {"value": value, "tokens": 16384, "seqlen": 2048}},
        "tasks": {"piqa": {"acc": 0.625, "acc_stderr": 0.01}},
        **more,
    }
    (run.path / "eval").mkdir(exist_ok=True)
    (run.path / "eval" / f"{name}.json").write_text(json.dumps(result))


def identity(**values: Any) -> ModelIdentity:
    known = {"spec": "x", "location": "/x", "kind": "directory", "name": "x", "fingerprint": "0", "model_type": "llama"}
    return ModelIdentity.model_validate({**known, "num_blocks": 2, **values})


def test_the_front_matter_is_what_the_hub_reads(run):
    assert front_matter(run) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flatq", "flatquant", "quantized", "4-bit", "w4a4kv4"],
    }


def test_it_says_how_to_load_what_it_is_and_how_small(run):
    text = card(run)
    ratio = run.stage("export/flatq").manifest.metrics["compression"]
    for part in (
        "import flatq_cli",
        "trust_remote_code=True",
        "flatq generate DIR",
        "weights: 4 bits, symmetric, one scale for 8 inputs, rounded to the nearest code",
        f"{ratio:.2f} times as much",
        f"torch {run.config.versions['torch']}",
        run.config.model.fingerprint,
        run.config.data.sha256,
    ):
        assert part in text


def test_the_recipe_in_it_is_the_run_s_but_for_the_text_s_folder(run, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(card(run).split("```yaml\n")[1].split("```")[0])
    ours = run.config.recipe
    calibration = ours.calibration.model_copy(update={"data": Path(ours.calibration.data).name})
    assert load_recipe(str(file)) == ours.model_copy(update={"calibration": calibration})


def test_no_place_of_this_machine_is_in_it(made):
    assert made.path.is_absolute()
    assert str(made.path.parent) not in card(made)
    assert made.path.parent.name not in card(made)


def test_it_is_in_the_manifest_and_a_damaged_one_is_made_again(run):
    stage = run.stage("export/flatq")
    assert stage.complete("README.md", verify=True)
    before = card(run)
    (stage.path / "README.md").write_text(before + "more")
    export(run, "flatq", None, SILENT)
    assert card(run) == before


def test_without_results_it_says_how_to_get_them(run):
    assert "None yet: `flatq eval RUN`" in card(run)


def test_new_figures_change_the_card_and_nothing_else(run, monkeypatch):
    directory = run.path / "export/flatq"
    before = run.stage("export/flatq").manifest
    times = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    monkeypatch.setattr(stage, "verify", lambda *args: pytest.fail("was made again"))
    add_result(run, "ppl-pydoc-2048", 23.4567)
    result = export(run, "flatq", None, SILENT)
    assert "| perplexity of pydoc (16,384 tokens in windows of 2,048) | 23.46 | – | ppl-pydoc-2048 |" in card(run)
    assert "| piqa: acc | 0.625 | – | ppl-pydoc-2048 |" in card(run)
    assert "stderr" not in card(run)
    after = run.stage("export/flatq").manifest
    assert after.status == "done"
    assert (after.metrics, after.seconds) == (before.metrics, before.seconds)
    assert result == {"path": str(directory), **after.metrics}
    changed = {file.name for file in directory.iterdir() if times[file.name] != file.stat().st_mtime_ns}
    assert changed == {"README.md", "manifest.json"}
    export(run, "flatq", None, SILENT)
    assert run.stage("export/flatq").manifest == after


def test_full_precision_stands_beside_where_a_result_has_it(run):
    float_model = {"kind": "float", "perplexity": {"pydoc": {"value": 20.5}}, "tasks": {"piqa": {"acc": 0.75}}}
    add_result(run, "a", 23.4, baseline=float_model)
    export(run, "flatq", None, SILENT)
    assert "| 23.4 | 20.5 | a |" in card(run)
    assert "| piqa: acc | 0.625 | 0.75 | a |" in card(run)


def test_a_baseline_that_is_quantized_is_not_full_precision(run):
    add_result(run, "a", 23.4, baseline={"kind": "fake-quant", "perplexity": {"pydoc": {"value": 20.5}}, "tasks": {}})
    export(run, "flatq", None, SILENT)
    assert "| 23.4 | – | a |" in card(run)


def test_results_of_other_models_and_other_files_are_left_out_and_none_is_there_twice(run):
    add_result(run, "a", 23.4)
    add_result(run, "ppl-pydoc-2048", 23.4)
    add_result(run, "c", 11.1, kind="float")
    (run.path / "eval/d.json").write_text("{")
    (run.path / "eval/e.json").write_text("[1]")
    add_result(run, "f", 12.2, schema="other/1")
    export(run, "flatq", None, SILENT)
    assert card(run).count("| 23.4 |") == 1
    assert "| 23.4 | – | ppl-pydoc-2048 |" in card(run)
    assert "11.1" not in card(run)
    assert "12.2" not in card(run)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        (identity(spec="smollm2-135m"), "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (identity(spec="owner/name", revision="main"), "owner/name"),
        (identity(spec="models/mine"), None),
    ],
)
def test_the_base_model_is_named_where_it_is_known(model, base):
    assert base_model(model) == base


def test_the_licence_is_the_original_s(tmp_path):
    model, other = tmp_path / "model", tmp_path / "README.md"
    model.mkdir()
    assert license_of(model, other) == {}
    (model / "config.json").write_text('{"license": "mit"}')
    assert license_of(model, other) == {"license": "mit"}
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: odd\ntags: [x]\n---\n# Model\n")
    assert license_of(model, other) == {"license": "other", "license_name": "odd"}
    (model / "README.md").write_text("---\n: [\n---\n")
    assert license_of(model, other) == {"license": "mit"}


def test_a_card_keeps_its_licence_when_the_original_is_gone(run):
    original = Path(run.config.model.location)
    (original / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    export(run, "flatq", None, SILENT)
    assert front_matter(run)["license"] == "apache-2.0"
    moved = original.rename(original.with_name("moved"))
    try:
        add_result(run, "a", 23.4)
        export(run, "flatq", None, SILENT)
        assert front_matter(run)["license"] == "apache-2.0"
    finally:
        moved.rename(original)
        (original / "README.md").unlink()
