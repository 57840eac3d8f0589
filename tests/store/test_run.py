"""A run keeps what is finished, refuses what is another run, and survives kills at any moment."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from flatq_cli.config.recipe import Recipe
from flatq_cli.errors import UsageError, WorkError
from flatq_cli.store import atomic
from flatq_cli.store import run as run_module
from flatq_cli.store.run import (
    DataIdentity,
    Item,
    ModelIdentity,
    Run,
    RunConfig,
    config_differences,
    lock_run,
    open_or_create,
    unlock_run,
    version_differences,
)
from flatq_cli.store.versions import package_versions

MODEL = ModelIdentity(
    spec="smollm2-135m",
    location="/models/smollm2.gguf",
    kind="gguf",
    name="smollm2-135m",
    fingerprint="f" * 64,
    model_type="llama",
    num_blocks=30,
)
DATA = DataIdentity(name="pydoc", sha256="d" * 64, characters=465_126)


def config(**changes):
    fields = {"recipe": Recipe(), "model": MODEL, "data": DATA, "versions": package_versions()}
    return RunConfig(**{**fields, **changes})


def recipe(**sections):
    return Recipe.model_validate(sections)


def tensors(seed, size=64):
    return {"attn_in.left": torch.full((size,), float(seed)), "key.right": torch.eye(4) * seed}


@pytest.fixture
def run(tmp_path):
    yield Run.create(tmp_path / "run", config())
    unlock_run(tmp_path / "run")


# run.yaml ------------------------------------------------------------------------------------------------------------


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


# Stages --------------------------------------------------------------------------------------------------------------


def test_a_stage_continues_where_it_was(run):
    stage = run.stage("calibrate")
    assert stage.begin({"recipe": "r"}) == []
    stage.save("block-00000", "block-00000.safetensors", tensors(0), {"loss": 0.5, "steps": 3, "note": None}, 1.5)

    again = Run.open(run.path).stage("calibrate")
    assert again.begin({"recipe": "r"}) == []
    assert again.complete("block-00000", verify=True)
    assert not again.complete("block-00001")
    assert not again.done
    assert again.manifest.items["block-00000"].metrics == {"loss": 0.5, "steps": 3, "note": None}
    assert torch.equal(again.load("block-00000")["attn_in.left"], tensors(0)["attn_in.left"])
    again.finish({"loss": 0.25}, seconds=2.0)

    manifest = json.loads((run.path / "calibrate" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == "flatq.manifest/1"
    assert manifest["status"] == "done"
    assert manifest["metrics"] == {"loss": 0.25}
    assert manifest["items"]["block-00000"]["seconds"] == 1.5
    assert run.stage("calibrate").done


def test_changed_inputs_start_a_stage_over(run):
    stage = run.stage("fuse")
    stage.begin({"calibrate": "old"})
    stage.save("a", "a.safetensors", tensors(1))
    stage.finish()
    (stage.path / "notes.txt").write_text("the user's own")

    assert run.stage("fuse").begin({"calibrate": "old"}) == []
    assert run.stage("fuse").done
    stage = run.stage("fuse")
    assert stage.begin({"calibrate": "new"}) == ["a"]
    assert not stage.complete("a")
    assert not stage.done
    assert sorted(os.listdir(stage.path)) == ["manifest.json", "notes.txt"]


def test_a_digest_depends_on_the_artifacts_and_on_nothing_else(tmp_path):
    digests = []
    for turn, (order, value) in enumerate([((0, 1), 1), ((1, 0), 1), ((0, 1), 2)]):
        run = Run.create(tmp_path / str(turn), config())
        stage = run.stage("calibrate")
        stage.begin()
        for index in order:
            metadata = {"format": "pt", "block": str(index), "z": "", "a": ""}
            stage.save(str(index), f"{index}.safetensors", tensors(value + index), {"t": turn}, turn, metadata)
        stage.finish({"turn": turn}, seconds=turn)
        digests.append(stage.digest())
        unlock_run(run.path)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_saving_an_item_again_unfinishes_the_stage_until_finish(run):
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))
    stage.finish()
    stage.save("a", "a.safetensors", tensors(2))
    assert not run.stage("calibrate").done
    assert run.stage("calibrate").load("a")["attn_in.left"][0] == 2


def test_a_figure_that_is_not_a_number_is_kept_as_none(run):
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1), {"loss": float("nan"), "worst": float("inf")})
    stage.finish({"loss": float("nan")})
    assert run.stage("calibrate").manifest.items["a"].metrics == {"loss": None, "worst": None}


def test_added_files_are_items_like_others(run):
    stage = run.stage("export")
    stage.begin()
    (stage.path / "flatq").mkdir()
    path = stage.path / "flatq" / "config.json"
    path.write_text("{}")
    assert stage.add_file("config", path).file == "flatq/config.json"
    stage.finish()
    stage.require_done("flatq eval")
    assert run.stage("export").complete("config", verify=True)
    path.write_text("[]")
    assert run.stage("export").complete("config")
    assert not run.stage("export").complete("config", verify=True)
    with pytest.raises(ValueError, match="is not in the subpath"):
        stage.add_file("outside", run.path / "run.yaml")


@pytest.mark.parametrize("name", ["../run.yaml", "/etc/passwd", "a/../../x", ""])
def test_a_manifest_cannot_name_files_outside_its_stage(run, name):
    with pytest.raises(ValueError, match="inside the stage"):
        Item(file=name, sha256="", bytes=0)
    stage = run.stage("fuse")
    stage.begin()
    with pytest.raises(ValueError, match="inside the stage"):
        stage.save("x", name, tensors(1))


def test_saving_before_begin_is_a_programming_error(run):
    with pytest.raises(ValueError, match="was not begun"):
        run.stage("calibrate").save("a", "a.safetensors", tensors(1))


def test_an_unfinished_stage_says_what_to_run_first(run):
    with pytest.raises(UsageError, match="has no finished calibrate stage, which `flatq fuse` needs; run `flatq calib"):
        run.stage("calibrate").require_done("flatq fuse")
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))
    with pytest.raises(UsageError, match=r"no finished calibrate stage \(1 items so far\)"):
        run.stage("calibrate").require_done("flatq fuse")
    stage.finish()
    run.stage("calibrate").require_done("flatq fuse")
    (stage.path / "a.safetensors").unlink()
    with pytest.raises(UsageError, match=r"a\.safetensors, which `flatq fuse` needs, is missing"):
        run.stage("calibrate").require_done("flatq fuse")


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def item_file(run):
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))
    stage.finish()
    return stage.path / "a.safetensors"


def test_a_single_flipped_bit_is_found_and_the_file_named(run, item_file):
    content = bytearray(item_file.read_bytes())
    content[-3] ^= 0x10
    item_file.write_bytes(content)
    with pytest.raises(UsageError, match="SHA-256 is not the manifest's; delete it and run `flatq calibr") as caught:
        run.stage("calibrate").load("a")
    assert str(item_file) in str(caught.value)
    assert run.stage("calibrate").complete("a")  # the size is right
    assert not run.stage("calibrate").complete("a", verify=True)


def test_a_truncated_file_is_named_with_its_tensor_and_is_not_complete(run, item_file):
    content = item_file.read_bytes()
    item_file.write_bytes(content[:-1])
    assert not run.stage("calibrate").complete("a")
    with pytest.raises(UsageError, match=r"a\.safetensors is damaged: it is cut off in tensor key.right .*delete"):
        run.stage("calibrate").load("a")


def test_a_missing_file_or_item_says_what_to_run(run, item_file):
    with pytest.raises(UsageError, match="has no b; run `flatq calibrate` first"):
        run.stage("calibrate").load("b")
    item_file.unlink()
    with pytest.raises(UsageError, match=r"a\.safetensors is missing; run `flatq calibrate` again"):
        run.stage("calibrate").load("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": "flatq.mani', "is broken"),
        (b"\xff\xff", "is broken"),
        (b"[]", "is broken"),
        (b'{"schema": "flatq.manifest/9"}', "newer flatq"),
        (b'{"schema": "flatq.manifest/1"}', "is broken: stage: Field required"),
        (
            b'{"schema": "flatq.manifest/1", "stage": "calibrate", "items": '
            b'{"a": {"file": "../run.yaml", "sha256": "", "bytes": 0}}}',
            "inside the stage",
        ),
    ],
)
def test_a_damaged_manifest_is_named_with_what_to_do(run, item_file, content, message):
    file = item_file.parent / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        run.stage("calibrate")
    assert str(file) in str(caught.value)


def test_a_full_disk_loses_nothing_already_saved(run, monkeypatch):
    stage = run.stage("calibrate")
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(WorkError, match=r"disk full: could not write .*b\.safetensors"):
            stage.save("b", "b.safetensors", tensors(2))
    assert sorted(os.listdir(stage.path)) == ["a.safetensors", "manifest.json"]
    stage.save("b", "b.safetensors", tensors(2))
    assert all(run.stage("calibrate").complete(name, verify=True) for name in "ab")


# Kills ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a SIGKILL at one exact place: nothing after it runs but what `finally` would (removed below)."""


def _save_all(path, inputs, count=3, size=64):
    stage = Run.open(path).stage("calibrate")
    stage.begin(inputs)
    for index in range(count):
        if not stage.complete(str(index)):
            name = f"block-{index}.safetensors"
            stage.save(str(index), name, tensors(index, size), {"loss": 1.0}, time.perf_counter())
    stage.finish()
    return stage


def _assert_whole(path):
    stage = Run.open(path).stage("calibrate")
    for name, item in stage.manifest.items.items():
        assert atomic.file_sha256(stage.path / item.file) == item.sha256, name
        stage.load(name)
    return stage


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_a_kill_before_any_disk_operation_leaves_whole_items_and_the_same_result(tmp_path, monkeypatch, call):
    """Kill at the k-th call for every k, then resume; starting over from older inputs is part of it."""
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
    expected = None
    real = getattr(os, call)
    for kill_at in range(100):
        path = tmp_path / f"run-{kill_at}"
        Run.create(path, config())
        stage = run_module.Stage(path, "calibrate")
        stage.begin({"model": "old"})
        stage.save("0", "old-name.safetensors", tensors(7))
        stage.finish()

        calls = iter(range(1000))

        def counting(*args, calls=calls, kill_at=kill_at, **kwargs):
            if next(calls) == kill_at:
                raise Killed
            return real(*args, **kwargs)

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(os, call, counting)
            try:
                _save_all(path, {"model": "new"})
            except Killed:
                killed = True
        interrupted = Run.open(path).stage("calibrate")
        if interrupted.manifest.inputs == {"model": "new"}:
            _assert_whole(path)
        else:
            assert not (interrupted.done and not interrupted.complete("0"))
        finished = _save_all(path, {"model": "new"})
        _assert_whole(path)
        assert set(finished.manifest.items) == {"0", "1", "2"}
        assert not (finished.path / "old-name.safetensors").exists()
        expected = expected or finished.digest()
        assert finished.digest() == expected
        unlock_run(path)
        if not killed:
            assert kill_at >= 1
            return
    pytest.fail("never ran to the end")


def test_sigkill_at_random_moments_never_leaves_a_torn_item_and_resumes_to_the_same_bytes(tmp_path):
    path, reference = tmp_path / "run", tmp_path / "reference"
    size = 16_000  # small tensors: torch works on them in one thread, and a forked process has no other
    Run.create(path, config())
    unlock_run(path)
    context, rng = multiprocessing.get_context("fork"), random.Random(0)

    def saved():
        return len(Run.open(path).stage("calibrate").manifest.items)

    for _ in range(15):
        before = saved()
        worker = context.Process(target=_save_all, args=(path, {}, 100_000, size))
        worker.start()
        deadline = time.monotonic() + 30
        while saved() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        assert len(_assert_whole(path).manifest.items) > before  # it went on, and nothing finished was lost

    count = saved() + 2
    finished = _save_all(path, {}, count, size)
    assert finished.done
    assert not list(path.rglob(f"{atomic.STAGING_PREFIX}*"))
    Run.create(reference, config())
    assert _save_all(reference, {}, count, size).digest() == finished.digest()
    for place in (path, reference):
        unlock_run(place)


# The lock ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from flatq_cli.store.run import lock_run
lock_run(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_reading_is_not(run):
    unlock_run(run.path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for attempt in (lambda: open_or_create(run.path, config()), lambda: run.stage("calibrate").begin()):
            with pytest.raises(UsageError, match=rf"in use by another flatq process \(process {holder.pid} on "):
                attempt()
        assert Run.open(run.path).config == run.config
    finally:
        holder.kill()
        holder.communicate()
    run.stage("calibrate").begin()  # a killed holder holds nothing


def test_one_process_takes_its_lock_as_often_as_it_likes(run):
    lock_run(run.path)
    open_or_create(run.path, config()).stage("fuse").begin()
    run.stage("calibrate").begin()


def test_a_run_removed_and_made_again_is_locked_again(run):
    shutil.rmtree(run.path)
    again = open_or_create(run.path, config())
    held = os.fstat(run_module._held[run.path.resolve()])
    assert os.path.samestat(held, (again.path / ".lock").stat())
