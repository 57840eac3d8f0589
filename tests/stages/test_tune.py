from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flatq_cli.runtime.fused import open_fused
from flatq_cli.stages import tune as tune_stage
from flatq_cli.stages.calibrate import block_name
from flatq_cli.stages.export import export
from flatq_cli.stages.fuse import fuse
from flatq_cli.stages.tune import batch_rows
from flatq_cli.store.atomic import file_sha256
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import calibrated_run, tiny_model_dir, tiny_recipe

SILENT = SilentProgress()
SECTIONS: dict[str, Any] = {
    "weights": {"rounding": "gptq"},
    "tune": {"steps": 4, "learning_rate": 1e-3, "warmup": 1},
}


class Stopped(SilentProgress):
    """Stops a stage as Ctrl-C would, at item `at` of the loop called `loop`."""

    def __init__(self, loop: str, at: int) -> None:
        self.loop, self.at = loop, at

    def track(self, items: Iterable[Any], description: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if description == self.loop and number == self.at:
                raise KeyboardInterrupt
            yield item


def calibrated(folder: Path, name: str, **sections: Any) -> Run:
    model = folder / "tiny llama"
    if not model.exists():
        tiny_model_dir(folder, "llama")
    return calibrated_run(model, tiny_recipe(folder, **{**SECTIONS, **sections}), folder / name)


def tensors(run: Run) -> dict[str, Tensor]:
    return {
        k: v for file in sorted((run.path / "fuse").glob("model-*.safetensors")) for k, v in load_file(file).items()
    }


def hashes(run: Run) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in (run.path / "fuse").glob("model*")}


def test_tuning_changes_no_code_no_name_no_shape_and_no_dtype(tmp_path: Path):
    rounded, tuned = calibrated(tmp_path, "rounded", tune={"steps": 0}), calibrated(tmp_path, "tuned")
    for run in (rounded, tuned):
        fuse(run, "cpu", SILENT)
    before, after = tensors(rounded), tensors(tuned)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.endswith(("weight_codes", "embed_tokens.weight", "lm_head.weight")) for name in changed)
    for kind in ("weight_scale", "layernorm.weight", "attn_in.left", "mlp_out.right", "query.right", "mlp_in.clip"):
        assert any(name.endswith(kind) for name in changed), kind
    assert tuned.stage("fuse").manifest.metrics["tune_steps"] == 4
    assert tuned.stage("fuse").done


def test_a_tuned_run_exports_and_done_again_makes_nothing_anew(tmp_path: Path):
    run = calibrated(tmp_path, "run")
    fuse(run, "cpu", SILENT)
    made = hashes(run)
    assert export(run, "flatq", None, SILENT)["verified"]
    exported = {name for name in load_file(next((run.path / "export/flatq").glob("model-00001-*"))) if "sites" in name}
    assert exported
    fuse(run, "cpu", Stopped("tune", 0))
    assert hashes(run) == made
    assert not (run.path / "fuse/tune/tuning.safetensors").exists()
    open_fused(run)


@pytest.mark.parametrize(("loop", "at"), [("tune", 2), ("fuse", 1), ("full precision", 0)])
def test_a_stopped_tuning_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str, at: int):
    monkeypatch.setattr(tune_stage, "CHECKPOINT_SECONDS", 0.0)
    whole, part = calibrated(tmp_path, "whole"), calibrated(tmp_path, "part")
    fuse(whole, "cpu", SILENT)
    with pytest.raises(KeyboardInterrupt):
        fuse(part, "cpu", Stopped(loop, at))
    assert not part.stage("fuse").done
    fuse(part, "cpu", SILENT)
    assert hashes(part) == hashes(whole)


def test_a_shard_lost_after_tuning_is_made_again_to_the_same_bits(tmp_path: Path):
    run = calibrated(tmp_path, "run")
    fuse(run, "cpu", SILENT)
    made = hashes(run)
    (run.path / "fuse" / run.stage("fuse").manifest.items[block_name(1)].file).unlink()
    fuse(run, "cpu", SILENT)
    assert hashes(run) == made


def test_batches_go_through_whole_batches_again_and_again():
    assert [batch_rows(step, 9, 4) for step in range(3)] == [slice(0, 4), slice(4, 8), slice(0, 4)]
    assert batch_rows(5, 3, 4) == slice(0, 3)


def test_blocks_read_again_at_every_step_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where the model does not fit in memory."""
    kept, read = calibrated(tmp_path, "kept"), calibrated(tmp_path, "read")
    fuse(kept, "cpu", SILENT)
    monkeypatch.setattr(tune_stage, "KEEP_SHARE", 0.0)
    fuse(read, "cpu", SILENT)
    assert hashes(read) == hashes(kept)
