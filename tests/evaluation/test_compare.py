from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flatq_cli.config.recipe import Recipe
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.compare import compare
from flatq_cli.store.records import ModelIdentity, RunConfig
from flatq_cli.store.run import Run


def result(value: float, **changes: object) -> str:
    return json.dumps(
        {
            "schema": "flatq.eval/1",
            "target": "t",
            "kind": "fake-quant",
            "recipe": "rtn",
            "perplexity": {"prose": {"value": value, "tokens": 64, "seqlen": 32}},
            "tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.1}},
            "gates": [],
            "versions": {},
            "seconds": 1.0,
            **changes,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    model = ModelIdentity(
        spec="m", location="m", kind="directory", name="m", fingerprint="0", model_type="llama", num_blocks=1
    )
    run = Run.create(tmp_path / "tiny-rtn", RunConfig(recipe=Recipe(), model=model))
    peaks = {"calibrate": (2.0, 500), "fuse": (3.0, 700), "fuse/tune": (0.0, 900)}
    for stage, (seconds, peak) in peaks.items():
        at_work = run.stage(stage)
        at_work.begin()
        at_work.finish(seconds=seconds)
        needed(run, stage, peak)
    return run


def needed(run: Run, stage: str, peak: int | None) -> None:
    """Write a peak of memory into a stage's manifest."""
    file = run.path / stage / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peak_memory_bytes": peak}))


def test_a_run_without_results_has_a_row_of_what_is_known(run: Run):
    unknown = dict.fromkeys(("kind", "recipe", "bytes", "compression"))
    assert compare([run.path]) == [{"name": "tiny-rtn", **unknown, "seconds": 5.0, "memory_bytes": 900}]


@pytest.mark.parametrize(("tuning", "memory"), [(600, 700), (None, 700)])
def test_memory_is_that_of_the_stage_that_needed_most(run: Run, tuning: int | None, memory: int):
    needed(run, "fuse/tune", tuning)
    assert compare([run.path])[0]["memory_bytes"] == memory


def test_the_memory_of_a_run_from_before_it_was_recorded_is_unknown(run: Run):
    for stage in ("calibrate", "fuse", "fuse/tune"):
        needed(run, stage, None)
    assert compare([run.path])[0]["memory_bytes"] is None


def test_a_row_holds_the_newest_figures_the_size_and_the_compression(run: Run):
    (run.path / "eval").mkdir()
    for age, (name, value) in enumerate([("b", 20.0), ("a", 21.0)]):
        file = run.path / "eval" / f"{name}.json"
        file.write_text(result(value))
        os.utime(file, (1000 - age, 1000 - age))
    export = run.stage("export/flatq")
    export.begin()
    (export.path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 300)
    (export.path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100)
    export.finish({"float16_bytes": 1200})
    (row,) = compare([run.path])
    assert row == {
        "name": "tiny-rtn",
        "kind": "fake-quant",
        "recipe": "rtn",
        "perplexity.prose": 20.0,
        "piqa.acc": 0.5,
        "bytes": 400,
        "compression": 3.0,
        "seconds": 5.0,
        "memory_bytes": 900,
    }


def test_a_result_file_stands_for_what_is_not_a_run(tmp_path: Path):
    (tmp_path / "full.json").write_text(result(19.0, kind="float", recipe=None))
    (row,) = compare([tmp_path / "full.json"])
    assert (row["name"], row["kind"], row["recipe"], row["perplexity.prose"]) == ("full", "float", None, 19.0)
    assert row["memory_bytes"] is None


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other/1"}'])
def test_files_that_are_no_results_are_refused_by_name(tmp_path: Path, content: str):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UsageError, match=r"other\.json"):
        compare([tmp_path / "other.json"])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="not a run"):
        compare([tmp_path])


def test_the_float_model_of_a_run_has_its_size_in_16_bits(run: Run, tmp_path: Path):
    export = run.stage("export/flatq")
    export.begin()
    (export.path / "model.safetensors").write_bytes(b"x" * 400)
    export.finish(metrics={"float16_bytes": 1000})
    (tmp_path / "full.json").write_text(result(19.0, kind="float", recipe=None, target="m"))
    (tmp_path / "another.json").write_text(result(19.0, kind="float", recipe=None, target="another"))
    full, another, _ = compare([tmp_path / "full.json", tmp_path / "another.json", run.path])
    assert (full["bytes"], full["compression"]) == (1000, 1.0)
    assert (another["bytes"], another["compression"]) == (None, None)
