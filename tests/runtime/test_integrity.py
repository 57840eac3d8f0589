"""No damage to an export loads silently wrong: it is refused with the file named, or it changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.targets import open_target
from flatq_cli.models.locate import INDEX
from flatq_cli.runtime.integrity import check_files, shard_digests
from flatq_cli.stages.export import export
from flatq_cli.store.progress import SilentProgress
from tests.tiny import TEXT, fused_run, tiny_tokens

SHARD = "model-00001-of-00003.safetensors"
LAST = "model-00003-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj"
DAMAGES = 200  # of each of the two exports
# A 16-bit export has all that the stock model needs: loaded without its sites it answers, and is wrong.
RECIPES: dict[str, dict[str, Any]] = {"packed": {}, "weights in 16 bits": {"weights": {"bits": 16}}}
MEANINGLESS = {"README.md", "manifest.json", "modeling_flatq.py"}  # a loader that has flatq reads none of them


def exported(folder: Path, **sections: Any) -> Path:
    run = fused_run(folder, "llama", **sections)
    return Path(export(run, "flatq", None, SilentProgress())["path"])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: exported(tmp_path_factory.mktemp("run"), **sections) for name, sections in RECIPES.items()}


@pytest.fixture
def copied(directories: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(directories["packed"], tmp_path / "copy"))


def answers(directory: Path) -> tuple[bytes, list[int], object, dict[str, Any]]:
    """What an export says: the bits of its logits, its tokenizer's work, and how it would generate."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        logits = model(tiny_tokens()).logits
    generation = model.generation_config.to_dict()
    return logits.numpy().tobytes(), tokenizer(TEXT[:60])["input_ids"], tokenizer.chat_template, generation


# Damages: each changes something in a directory and says which file


def flip_a_bit(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return file.name


def cut(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.iterdir()))
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])
    return file.name


def overwrite(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.iterdir()))
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    file.write_bytes(data)
    return file.name


def remove(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.iterdir()))
    file.unlink()
    return file.name


def mix_up_shards(directory: Path, rng: random.Random) -> str:
    first, second = rng.sample(sorted(directory.glob("*.safetensors")), 2)
    data = first.read_bytes()
    if rng.random() < 0.5:
        first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    return "model-0000"


def edit_config(directory: Path, rng: random.Random) -> str:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    section, key = rng.choice(list(leaves(config)))
    value = section[key]
    changes: list[Any] = [None, "other", 7]
    if isinstance(value, bool):
        changes.append(not value)
    elif isinstance(value, int | float):
        changes += [value + 1, value * 2]
    if rng.random() < 0.2:
        del section[key]
    else:
        section[key] = rng.choice([change for change in changes if change != value])
    file.write_text(json.dumps(config))
    return file.name


def leaves(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value)
        yield section, key


def save_a_tensor_otherwise(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.glob("*.safetensors")))
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    change: Callable[[torch.Tensor], torch.Tensor] = rng.choice(
        [
            lambda t: t.reshape(-1, 1),
            lambda t: t[:-1],
            lambda t: t.double(),
            lambda t: t.half(),
            lambda t: t.flip(0),
            lambda t: t + 1,
        ]
    )
    tensors[name] = change(tensor).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name


KINDS = [*[flip_a_bit] * 5, cut, overwrite, remove, mix_up_shards, *[edit_config] * 2, *[save_a_tensor_otherwise] * 2]


def refusal(directory: Path, whole: object) -> str | None:
    """What is said when an export does not load; None if it loads and answers as the whole one."""
    try:
        same = answers(directory) == whole
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if same else "LOADS AND IS WRONG"


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_damage_loads_with_another_answer(directories, tmp_path, recipe):
    whole = answers(directories[recipe])
    refused: Counter[str] = Counter()
    for seed in range(DAMAGES):
        rng = random.Random(seed)
        directory = Path(shutil.copytree(directories[recipe], tmp_path / "copy"))
        kind = rng.choice(KINDS)
        name = kind(directory, rng)
        said = refusal(directory, whole)
        # config.json is read before flatq is asked: what transformers says of a damaged one is its own.
        assert said != "LOADS AND IS WRONG", f"{kind.__name__} {seed} in {name}"
        assert said is None or name == "config.json" or name in said, f"{kind.__name__} {seed} in {name}: {said}"
        refused.update([name] if said else [])
        shutil.rmtree(directory)
    assert sum(refused.values()) > DAMAGES / 2
    assert len(refused) >= 7
    assert not refused.keys() & MEANINGLESS


def test_flatq_s_own_commands_name_every_damaged_file(directories, tmp_path):
    for seed in range(DAMAGES // 4):
        rng = random.Random(seed)
        directory = Path(shutil.copytree(directories["weights in 16 bits"], tmp_path / "copy"))
        kind = rng.choice(KINDS)
        name = kind(directory, rng)
        said = name
        try:
            open_target(str(directory), "cpu").model()
        except UsageError as error:
            said = str(error)
        assert name in said, f"{kind.__name__} {seed} in {name}: {said}"
        shutil.rmtree(directory)


def test_a_flipped_bit_is_refused_with_file_and_tensor_named(copied, monkeypatch):
    file = copied / SHARD
    tensors = load_file(file)
    tensors[f"{Q}.weight_scale"].view(torch.int32)[3] ^= 1  # the last bit of a float
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"{SHARD}: tensor {Q}.weight_scale is damaged.*FLATQ_VERIFY=0"):
        AutoModelForCausalLM.from_pretrained(copied)
    monkeypatch.setenv("FLATQ_VERIFY", "0")
    model = AutoModelForCausalLM.from_pretrained(copied)
    assert torch.equal(model.get_submodule(Q).weight_scale, tensors[f"{Q}.weight_scale"])


def test_a_whole_shard_of_another_export_is_refused(copied, tmp_path):
    (tmp_path / "other").mkdir()
    other = exported(tmp_path / "other", weights={"clip": "none"})
    shutil.copy(other / SHARD, copied / SHARD)
    with pytest.raises(UsageError, match=rf"{SHARD}: tensor model\.layers\.0\..* is damaged or of another export"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_an_edited_config_is_refused_unless_told_otherwise(copied, monkeypatch):
    config = json.loads((copied / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"config\.json is damaged or was edited.*FLATQ_VERIFY=0"):
        AutoModelForCausalLM.from_pretrained(copied)
    monkeypatch.setenv("FLATQ_VERIFY", "0")
    assert AutoModelForCausalLM.from_pretrained(copied).config.rope_parameters["rope_theta"] == 20000.0


def test_a_config_that_transformers_saved_again_is_the_same(copied):
    before = answers(copied)
    AutoConfig.from_pretrained(copied).save_pretrained(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps({**config, "transformers_version": "9", "attn_implementation": "sdpa"})
    )
    assert answers(copied) == before


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "change", [lambda c: c.pop("quantization_config"), lambda c: c["quantization_config"].update(quant_method="flaty")]
)
def test_a_config_that_no_longer_names_flatq_does_not_give_the_stock_model(directories, tmp_path, recipe, change):
    directory = Path(shutil.copytree(directories[recipe], tmp_path / "copy"))
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        check_files(directory)


def test_transformers_without_flatq_refuses_an_export(directories):
    code = """
import sys, transformers
for directory in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, *directories.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count("import flatq_cli first") == len(directories)


def test_a_copy_that_save_pretrained_made_has_no_digests_and_loads(copied, tmp_path):
    before = answers(copied)
    model = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    AutoTokenizer.from_pretrained(copied).save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert "digests" not in (tmp_path / "saved" / INDEX).read_text()
    assert answers(tmp_path / "saved")[:2] == before[:2]
    model.save_pretrained(copied)  # over the export: one file, which is what is loaded from now on
    assert answers(copied)[:2] == before[:2]


def test_in_the_hub_s_cache_a_file_may_be_missing_but_not_damaged(directories, tmp_path):
    snapshot = tmp_path / "models--someone--some" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in directories["packed"].iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot / "tokenizer.json").unlink()
    AutoModelForCausalLM.from_pretrained(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json is damaged"):
        AutoModelForCausalLM.from_pretrained(snapshot)


def test_an_index_that_is_broken_is_named(copied):
    index = json.loads((copied / INDEX).read_text())
    for broken in (
        {**index, "metadata": 3},
        {**index, "metadata": {"digests": {"files": {"../x": "0"}, "tensors": {}}}},
    ):
        (copied / INDEX).write_text(json.dumps(broken))
        with pytest.raises(UsageError, match=rf"{INDEX} is damaged"):
            AutoModelForCausalLM.from_pretrained(copied)


def test_a_tensor_s_digest_is_of_its_dtype_shape_and_bytes(tmp_path):
    values = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    same = {"a": values, "b": values.reshape(4), "c": values.view(torch.int32), "d": values.bfloat16()}
    save_file({name: tensor.clone() for name, tensor in same.items()}, tmp_path / "x.safetensors")
    found = shard_digests(tmp_path / "x.safetensors")
    assert len(set(found.values())) == 4
    content = b"F32 [2, 2]\n" + struct.pack("<4f", 1.0, -2.0, 0.5, 4.0)
    assert found["a"] == hashlib.blake2b(content, digest_size=16).hexdigest()
