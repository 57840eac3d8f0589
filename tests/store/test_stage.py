"""A stage keeps what is finished, and survives kills at any moment."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from flatq_cli.errors import UsageError, WorkError
from flatq_cli.store import atomic
from flatq_cli.store.lock import unlock_run
from flatq_cli.store.memory import Peak
from flatq_cli.store.records import Item
from flatq_cli.store.run import Run
from flatq_cli.store.stage import Stage
from tests.store.prepare import config, tensors


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


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(monkeypatch):
    """What the next looks at memory find."""
    found = []
    monkeypatch.setattr("flatq_cli.store.stage.take_peak", lambda: Peak(*(found.pop(0) if found else (1, None))))
    return found


def test_a_finished_stage_knows_the_largest_memory_that_its_parts_needed(run, peaks):
    stage = run.stage("calibrate")
    peaks[:] = [(9000, 9000), (500, None), (700, 40), (300, 60)]  # before it began; two items; the end
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))
    stage.save("b", "b.safetensors", tensors(2))
    stage.finish()
    manifest = run.stage("calibrate").manifest
    assert (manifest.peak_memory_bytes, manifest.peak_gpu_memory_bytes) == (700, 60)


@pytest.mark.parametrize(("second", "largest"), [(200, 500), (800, 800)])
def test_a_stage_that_goes_on_keeps_the_memory_of_what_was_done_before(run, peaks, second, largest):
    stage = run.stage("calibrate")
    peaks[:] = [(1, None), (500, None)]
    stage.begin()
    stage.save("a", "a.safetensors", tensors(1))

    again = Run.open(run.path).stage("calibrate")  # killed here
    peaks[:] = [(9000, None), (second, None)]
    again.begin()
    again.save("b", "b.safetensors", tensors(2))
    again.finish()
    assert run.stage("calibrate").manifest.peak_memory_bytes == largest


def test_a_stage_inside_another_has_its_own_memory(run, peaks):
    outer, inner = run.stage("fuse"), run.stage("fuse/tune")
    peaks[:] = [(1, None), (1, None), (900, None), (200, None), (100, None), (100, None)]
    outer.begin()
    inner.begin()
    outer.save("a", "a.safetensors", tensors(1))
    inner.save("tuned", "tuned.safetensors", tensors(2))
    inner.finish()
    outer.finish()
    assert run.stage("fuse").manifest.peak_memory_bytes == 900
    assert run.stage("fuse/tune").manifest.peak_memory_bytes == 200


def test_a_stage_that_starts_over_forgets_the_memory_it_needed(run, peaks):
    stage = run.stage("fuse")
    peaks[:] = [(1, None), (900, None)]
    stage.begin({"calibrate": "old"})
    stage.finish()
    peaks[:] = [(1, None), (200, None)]
    stage.begin({"calibrate": "new"})
    stage.finish()
    assert run.stage("fuse").manifest.peak_memory_bytes == 200


def test_a_manifest_from_before_memory_was_recorded_is_read(run):
    stage = run.stage("calibrate")
    stage.begin()
    stage.finish()
    file = stage.path / "manifest.json"
    old = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("peak_")}
    file.write_text(json.dumps(old))
    assert run.stage("calibrate").done
    assert run.stage("calibrate").manifest.peak_memory_bytes is None


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
        stage = Stage(path, "calibrate")
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
