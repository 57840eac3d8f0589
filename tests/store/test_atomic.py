"""Files are whole or not there, deterministic, and say what is wrong with them when they are damaged."""

import errno
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from flatq_cli.errors import UsageError, WorkError
from flatq_cli.store import atomic

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.codes": torch.arange(-8, 8, dtype=torch.int8),
    "c.half": torch.ones(5, dtype=torch.bfloat16),
}
METADATA = {"format": "pt", "flatq": "1", "zeta": 'a "quoted"\nline', "name": "é\x01"}


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path):
    digests = set()
    for turn in range(12):  # safetensors alone writes four metadata entries in a random order
        items = list(TENSORS.items())
        meta = list(METADATA.items())
        tensors, metadata = (dict(items[::-1]), dict(meta[::-1])) if turn % 2 else (dict(items), dict(meta))
        digest = atomic.save_tensors(tmp_path / "x.safetensors", tensors, metadata)
        assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
        digests.add(digest)
    assert len(digests) == 1


def test_what_was_saved_is_loaded_by_the_library_and_by_us(tmp_path):
    path = tmp_path / "x.safetensors"
    atomic.save_tensors(path, TENSORS, METADATA)
    for loaded in (atomic.load_tensors(path), safetensors.torch.load_file(path)):
        assert loaded.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert atomic.read_metadata(path) == METADATA


def test_strided_shared_and_grad_tensors_are_saved_by_value(tmp_path):
    base = torch.randn(6, 4, requires_grad=True)
    tensors = {"whole": base, "tied": base, "transposed": base.T, "rows": base[2:4], "scalar": base[0, 0]}
    atomic.save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = atomic.load_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach()), name


def test_metadata_of_a_file_without_any_is_empty(tmp_path):
    atomic.save_tensors(tmp_path / "x.safetensors", TENSORS)
    assert atomic.read_metadata(tmp_path / "x.safetensors") == {}


def test_files_get_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    atomic.save_tensors(tmp_path / "x.safetensors", TENSORS)
    atomic.write_text(tmp_path / "x.txt", "x")
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("plain", "x.safetensors", "x.txt")}
    assert len(modes) == 1


def test_a_write_leaves_nothing_but_its_file(tmp_path):
    atomic.write_bytes(tmp_path / "a", b"\x00\xff")
    atomic.write_text(tmp_path / "b", "grün")
    atomic.write_json(tmp_path / "c", {"ü": [1, None]})
    atomic.save_tensors(tmp_path / "d", TENSORS, METADATA)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "grün".encode()
    assert json.loads((tmp_path / "c").read_text(encoding="utf-8")) == {"ü": [1, None]}


# Disk full -----------------------------------------------------------------------------------------------------------


def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_in_safetensors(tensors, filename, metadata=None):
    Path(filename).write_bytes(b"half a file")
    (Path(filename).parent / ".tmpAbC123").write_bytes(b"the library's own temporary file")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["save_file", "fsync", "mkdtemp"])
def test_a_full_disk_is_said_with_size_and_leaves_the_old_file_only(tmp_path, monkeypatch, where):
    path = tmp_path / "block.safetensors"
    before = atomic.save_tensors(path, TENSORS)
    if where == "save_file":
        monkeypatch.setattr(safetensors.torch, "save_file", _full_in_safetensors)
    else:
        monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (atomic.tempfile, "mkdtemp")), _full)
    with pytest.raises(WorkError) as caught:
        atomic.save_tensors(path, {"big": torch.zeros(3 * 2**18)})
    assert str(caught.value) == (
        f"disk full: could not write {path} (3 MiB); free space and run the same command again: it goes on where it was"
    )
    assert os.listdir(tmp_path) == ["block.safetensors"]
    assert atomic.file_sha256(path) == before


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from flatq_cli.errors import WorkError
from flatq_cli.store import atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for save, content in ((atomic.save_tensors, {"big": torch.zeros(100_000)}), (atomic.write_bytes, bytes(400_000))):
    try:
        save(Path(sys.argv[1]), content)
    except WorkError as error:
        print(error)
"""


def test_a_real_limit_of_the_file_system_is_said(tmp_path):
    """A limit on file size is the one "disk full" that every machine can make without privileges."""
    path = tmp_path / "x.safetensors"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count(f"disk full: could not write {path} (1 MiB)") == 2
    assert os.listdir(tmp_path) == []


def test_other_failures_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(WorkError, match=r"cannot write .*Input/output error"):
        atomic.write_text(tmp_path / "x", "x")
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_directory_is_needed_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        atomic.make_directory(tmp_path / "file")
    with pytest.raises(UsageError, match="Not a directory"):
        atomic.write_text(tmp_path / "file" / "x", "x")


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.safetensors"
    atomic.save_tensors(path, TENSORS, METADATA)
    return path


def test_every_truncation_is_refused_and_names_the_file_and_the_tensor_it_cuts(saved):
    whole = saved.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    ends = {name: 8 + length + header[name]["data_offsets"][1] for name in TENSORS}
    for size in range(len(whole)):
        saved.write_bytes(whole[:size])
        for read in (atomic.load_tensors, atomic.read_metadata):
            with pytest.raises(UsageError, match=re.escape(f"{saved} is damaged")) as caught:
                read(saved)
            if size < 8 + length:
                assert "header is cut off" in str(caught.value)
            else:
                first_cut = min((end, name) for name, end in ends.items() if end > size)[1]
                assert f"cut off in tensor {first_cut} " in str(caught.value)


def test_no_bit_flip_in_the_header_gives_a_traceback(saved):
    whole = bytearray(saved.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    messages = []
    for bit in range((8 + length) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(flipped)
        try:
            atomic.load_tensors(saved)  # a flip in a name or a metadata value leaves a readable file
        except UsageError as error:
            messages.append(str(error))
    assert len(messages) > 0.3 * (8 + length) * 8
    assert all(str(saved) in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.touch(), "header is cut off"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "header is cut off"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[1]  "), "not a safetensors header"),
    ],
)
def test_what_is_not_a_safetensors_file_is_a_usage_error(tmp_path, make, message):
    path = tmp_path / "x.safetensors"
    make(path)
    for read in (atomic.load_tensors, atomic.read_metadata):
        with pytest.raises(UsageError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_cleaning_removes_staging_folders_only(tmp_path):
    stale = tmp_path / ".partial-abc"
    deeper = tmp_path / "sub" / ".partial-def"
    for folder in (stale, deeper):
        folder.mkdir(parents=True)
        (folder / "x").write_text("half")
    (tmp_path / "kept.safetensors").touch()
    atomic.clean_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["kept.safetensors", "sub"]
    assert deeper.exists()
    atomic.clean_stale(tmp_path, below=True)
    assert os.listdir(tmp_path / "sub") == []
