from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatq_cli.config.locations import PACKAGE
from flatq_cli.evaluation import identity as module
from flatq_cli.evaluation.identity import identity
from flatq_cli.evaluation.targets import open_target
from flatq_cli.runtime.backends import Cpu
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import fused_run, tiny_model_dir


def of(path: Path | str) -> str:
    return identity(open_target(str(path), "cpu"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path, "llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is fused and exported; not to be changed."""
    run = fused_run(tmp_path_factory.mktemp("made"), "llama")
    export(run, "flatq", None, SilentProgress())
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Path:
    return shutil.copytree(made.path, tmp_path / "run")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def touch(file: Path) -> None:
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))


def test_a_model_is_the_same_wherever_it_lies_and_however_it_is_called(model: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert of(model) == of(model) == of(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: touch(model / "model.safetensors"),
        lambda model: edit_json(model / "config.json", rms_norm_eps=1e-5),
        lambda model: edit_json(model / "tokenizer_config.json", add_bos_token=True),
        lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
        lambda model: (model / "modeling_own.py").write_text("x = 1"),
    ],
    ids=["weights", "config", "tokenizer", "chat template", "code"],
)
def test_whatever_decides_a_models_answers_makes_it_another(model: Path, change: Callable[[Path], None]):
    before = of(model)
    change(model)
    assert of(model) != before


def test_dtype_backend_and_versions_are_part_of_it(model: Path, monkeypatch: pytest.MonkeyPatch):
    target = open_target(str(model), "cpu")
    found = {
        identity(target),
        identity(replace(target, dtype=torch.bfloat16)),
        identity(replace(target, dtype=torch.bfloat16, backend="cpu")),
    }
    monkeypatch.setattr(module, "package_versions", lambda: {"flatq": "9", "torch": "9", "transformers": "9"})
    assert len({*found, identity(target)}) == 4


@pytest.mark.skipif(Cpu().why_not() is not None, reason="torch multiplies no integers on this CPU")
def test_backends_that_give_the_same_bits_are_one(model: Path):
    """So shards of machines with and without integer kernels go together."""
    target = open_target(str(model), "cpu")
    assert len({identity(replace(target, backend=backend)) for backend in (None, "reference", "cpu")}) == 1


def test_so_is_the_code_that_computes(model: Path, monkeypatch: pytest.MonkeyPatch):
    sources = [*module._source_files()]
    assert PACKAGE / "runtime" / "sites.py" in sources
    assert any(file.suffix == ".cu" for file in sources)
    before = of(model)
    module._sources.cache_clear()
    monkeypatch.setattr(module, "_source_files", lambda: iter(sources[1:]))
    assert of(model) != before
    module._sources.cache_clear()


def test_a_run_is_its_fused_shards_and_its_recipe(run: Path):
    before = of(run)
    assert before == of(run)
    manifest = json.loads((run / "fuse" / "manifest.json").read_text())
    name = next(iter(manifest["items"]))
    file = run / "fuse" / manifest["items"][name]["file"]
    touch(file)
    assert of(run) == before  # its content is known
    target = open_target(str(run), "cpu")
    manifest["items"][name]["sha256"] = "0" * 64
    (run / "fuse" / "manifest.json").write_text(json.dumps(manifest))
    assert identity(target) != before


def test_a_run_its_export_and_its_model_are_three(made: Run):
    assert len({of(made.path), of(made.path / "export" / "flatq"), of(made.config.model.location)}) == 3


def test_an_export_is_its_digests_whenever_its_files_were_written(run: Path):
    directory = run / "export" / "flatq"
    before = of(directory)
    for file in directory.iterdir():
        touch(file)
    assert of(directory) == before


def test_an_export_whose_digests_are_not_compared_is_told_by_times(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLATQ_VERIFY", "0")
    directory = run / "export" / "flatq"
    before = of(directory)
    touch(next(directory.glob("*.safetensors")))
    assert of(directory) != before


def test_a_model_told_by_its_content_is_the_same_on_every_machine(model: Path):
    def by_content() -> str:
        return identity(open_target(str(model), "cpu"), by_content=True)

    before, stamped = by_content(), of(model)
    touch(model / "model.safetensors")
    assert by_content() == before
    assert of(model) != stamped
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert by_content() != before


def test_a_snapshot_of_the_hub_is_its_commit(model: Path, tmp_path: Path):
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    one, other = (shutil.copytree(model, snapshots / commit) for commit in ("a" * 40, "b" * 40))
    before = of(one)
    touch(one / "model.safetensors")
    assert of(one) == before
    assert of(one) != of(other)
