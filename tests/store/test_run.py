"""A run keeps what decides it, and refuses what is another run."""

import pytest
import torch
import yaml

from flatq_cli.errors import UsageError
from flatq_cli.store.lock import unlock_run
from flatq_cli.store.records import DataIdentity
from flatq_cli.store.run import Run, config_differences, open_or_create, version_differences
from flatq_cli.store.versions import package_versions
from tests.store.prepare import DATA, MODEL, config, recipe


def test_an_opened_run_has_the_config_it_was_created_with(run):
    assert Run.open(run.path).config == run.config
    content = yaml.safe_load((run.path / "run.yaml").read_text(encoding="utf-8"))
    assert content["schema"] == "flatq.run/1"
    assert content["recipe"]["calibration"]["seed"] == 0
    assert content["model"]["fingerprint"] == MODEL.fingerprint
    assert content["versions"]["torch"] == torch.__version__


def test_a_place_without_a_run_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match=r"no run at .*nowhere.*flatq calibrate"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"not a run: it has no run.yaml"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flatq.run/1", "flatq.run/2", "made by a newer flatq .*flatq.run/2.*upgrade flatq"),
        ("flatq.run/1", "flatq.eval/1", "its schema is flatq.eval/1"),
        ("bits: 4", "bits: [4", "is broken at line"),
        ("  bits: 4", "  bits: 4\n    bats: 4", "is broken"),
        ("    bits: 4", "    bats: 4", r"recipe\.weights\.bats"),
        ("num_blocks: 30", "num_blocks: many", r"model\.num_blocks"),
    ],
)
def test_a_broken_or_newer_run_yaml_is_named_with_the_place(run, old, new, message):
    file = run.path / "run.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        Run.open(run.path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"just words", b"\xff\xfe", b"- a\n- b\n"])
def test_a_run_yaml_that_is_no_mapping_is_a_usage_error(run, content):
    (run.path / "run.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"run\.yaml is broken"):
        Run.open(run.path)


def test_creating_over_a_run_or_over_orphaned_stages_is_refused(run):
    with pytest.raises(UsageError, match="is a run already"):
        Run.create(run.path, config())
    run.stage("calibrate").begin()
    (run.path / "run.yaml").unlink()
    with pytest.raises(UsageError, match=r"has stages \(calibrate\) but no run.yaml"):
        Run.create(run.path, config())


# Same run or another -------------------------------------------------------------------------------------------------


def test_a_changed_recipe_is_refused_with_each_difference_shown(run):
    other = recipe(weights={"bits": 3}, transform={"init": "hadamard"}, activations={"symmetric": False})
    with pytest.raises(UsageError) as caught:
        open_or_create(run.path, config(recipe=other))
    message = str(caught.value)
    assert "weights.bits: run has 4, asked 3" in message
    assert "transform.init: run has balanced, asked hadamard" in message
    assert "activations.symmetric: run has true, asked false" in message
    assert "use another --run" in message
    assert str(run.path) in message
    assert message.count("asked") == 3
    assert Run.open(run.path).config == run.config


def test_another_model_is_refused_by_name(run):
    other = MODEL.model_copy(update={"fingerprint": "e" * 64, "name": "qwen3-0.6b", "model_type": "qwen3"})
    with pytest.raises(UsageError, match=r"model: run has smollm2-135m \(llama.*asked qwen3-0\.6b \(qwen3"):
        open_or_create(run.path, config(model=other))


def test_another_text_is_refused_by_name(run):
    other = DataIdentity(name="mine.txt", sha256="c" * 64, characters=12)
    with pytest.raises(UsageError, match=r"data: run has pydoc \(465,126 .*asked mine\.txt \(12 "):
        open_or_create(run.path, config(data=other))


def test_the_same_model_moved_is_the_same_run_and_the_new_place_is_noted(run):
    moved = MODEL.model_copy(update={"spec": "/elsewhere/m.gguf", "location": "/elsewhere/m.gguf", "name": "m"})
    opened = open_or_create(run.path, config(model=moved, versions={"torch": "0.1"}))
    assert opened.config.model.location == "/elsewhere/m.gguf"
    assert Run.open(run.path).config.model == moved
    assert Run.open(run.path).config.versions == package_versions()


def test_the_same_text_under_another_path_is_the_same_run(run):
    renamed = DATA.model_copy(update={"name": "../copy.txt"})
    asked = config(data=renamed, recipe=recipe(calibration={"data": "../copy.txt"}, description="another description"))
    assert config_differences(run.config, asked) == []
    assert open_or_create(run.path, asked).config.data == DATA


def test_without_a_text_the_recipe_key_counts():
    old, new = config(data=None), config(data=None, recipe=recipe(calibration={"data": "x.txt"}))
    assert config_differences(old, new) == ["calibration.data: run has auto, asked x.txt"]
    assert config_differences(old, config()) == [f"data: run has none, asked pydoc (465,126 characters, {'d' * 12})"]


def test_other_versions_are_noted_not_refused(tmp_path):
    path = tmp_path / "run"
    run = open_or_create(path, config(versions={**package_versions(), "torch": "2.0.0"}))
    assert version_differences(run) == [f"torch: run has 2.0.0, this is {torch.__version__}"]
    assert version_differences(open_or_create(path, config())) == version_differences(run)
    unlock_run(path)
