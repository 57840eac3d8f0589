from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flatq_cli.errors import UsageError
from flatq_cli.stages.export import export
from flatq_cli.stages.inspect import dtype_bits, inspect
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import fused_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fused_run(tmp_path_factory.mktemp("run"), "llama", epochs=1)
    export(run, "flatq", None, SilentProgress())
    return run


def described(directory: Path) -> list[dict[str, object]]:
    """The tensors of a directory by reading all of them."""
    names = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}
    return [
        {"name": name, "dtype": names[tensor.dtype], "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in sorted(load_file(file).items())
    ]


def test_a_run_shows_model_recipe_stages_and_losses(run):
    found = inspect(str(run.path))
    assert found["kind"] == "run"
    assert found["tensors"] == []
    summary = found["summary"]
    assert summary["model"]["model_type"] == "llama"
    assert summary["recipe"]["weights"]["bits"] == 4
    assert set(summary["stages"]) == {"calibrate", "fuse", "export/flatq"}
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    assert [block["block"] for block in summary["blocks"]] == ["block-00000", "block-00001"]
    assert all(block["loss_after"] > 0 for block in summary["blocks"])


def test_a_stage_shows_its_tensors(run):
    found = inspect(str(run.path / "fuse"))
    assert found["kind"] == "stage"
    assert found["summary"]["metrics"]["blocks"] == 2
    assert found["tensors"] == described(run.path / "fuse")


def test_an_export_shows_its_quantization(run):
    found = inspect(str(run.path / "export/flatq"))
    assert found["kind"] == "export"
    assert found["summary"]["quantization"]["format"] == "flatq/1"
    assert found["summary"]["export"]["metrics"]["verified"]["codes"] == 14
    assert found["tensors"] == described(run.path / "export/flatq")
    assert found["summary"]["bytes"] == sum(tensor["bytes"] for tensor in found["tensors"])


def test_a_model_directory(run):
    found = inspect(run.config.model.location)
    assert found["kind"] == "model"
    assert found["summary"]["architectures"] == ["LlamaForCausalLM"]
    assert found["tensors"] == described(Path(run.config.model.location))


def test_a_safetensors_file_of_any_dtype(tmp_path):
    dtypes = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool, torch.uint8]
    tensors = {f"t{i}": torch.zeros(3, 5, dtype=dtype) for i, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect(str(tmp_path / "x.safetensors"))
    assert found["kind"] == "safetensors"
    assert {t["name"]: t["bytes"] for t in found["tensors"]} == {name: t.nbytes for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F32", 32), ("BF16", 16), ("F8_E5M2", 8), ("F4", 4), ("BOOL", 8), ("U64", 64)]
)
def test_bits_of_a_dtype(dtype, bits):
    assert dtype_bits(dtype) == bits


def test_a_gguf_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_name("Tiny")
    writer.add_tensor("token_embd.weight", np.zeros((6, 32), np.float32))
    quantized = gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(str(tmp_path / "x.gguf"))
    assert found["kind"] == "gguf"
    assert found["summary"]["general.architecture"] == "llama"
    assert found["summary"]["general.name"] == "Tiny"
    assert found["tensors"] == [
        {"name": "token_embd.weight", "dtype": "F32", "shape": [6, 32], "bytes": 768},
        {"name": "blk.0.attn_q.weight", "dtype": "Q8_0", "shape": [4, 64], "bytes": 272},
    ]


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf"])
def test_a_damaged_file_is_an_error_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF and nothing more")
    with pytest.raises(UsageError, match=f"{name}: truncated or corrupt"):
        inspect(str(tmp_path / name))


def test_what_is_nothing_known_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"neither a run, nor a stage"):
        inspect(str(tmp_path))
    with pytest.raises(UsageError, match=r"must be \.safetensors or \.gguf"):
        inspect(str(tmp_path / "notes.txt"))
    with pytest.raises(UsageError, match="no such file or directory"):
        inspect(str(tmp_path / "gone.gguf"))


def test_no_data_is_read(tmp_path):
    """A header for 4 TiB of data, followed by a hole of that size: reading it would not end."""
    size = 2**42
    header = b'{"huge":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,%d]}}' % size
    header += b" " * (-len(header) % 8)
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        try:
            out.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("no sparse files of this size here")
    assert inspect(str(file))["summary"]["bytes"] == size
