import os

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader

from flatq_cli.models.gguf_header import read_header, shared_headers


@pytest.fixture
def path(tmp_path):
    """A file with every kind of field a header may hold."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.number", 7)
    writer.add_float32("some.fraction", 0.5)
    writer.add_bool("some.flag", True)
    writer.add_string("some.text", "größer")
    writer.add_array("some.words", ["one", "", "three"])
    writer.add_array("some.numbers", [1, -2, 3])
    writer.add_array("some.fractions", [0.5, 0.25])
    writer.add_array("some.flags", [True, False, True])
    writer.add_tensor("first", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_reads_as_gguf_reads_it(path):
    ours, theirs = read_header(path), GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents(), name
        assert (ours.fields[name].types, ours.fields[name].data) == (field.types, field.data)
        for part, expected in zip(ours.fields[name].parts, field.parts, strict=True):
            np.testing.assert_array_equal(part, expected, strict=True)
    for tensor, expected in zip(ours.tensors, theirs.tensors, strict=True):
        assert tensor.name == expected.name
        assert tensor.tensor_type == expected.tensor_type
        np.testing.assert_array_equal(tensor.data, expected.data)


def test_a_header_is_parsed_once_until_the_file_changes(path):
    first = read_header(path)
    assert read_header(path) is first
    os.utime(path, ns=(0, 0))
    assert read_header(path) is not first


def test_others_read_the_shared_header_inside_and_their_own_outside(path):
    with shared_headers():
        assert gguf.GGUFReader(str(path)) is read_header(path)
    assert gguf.GGUFReader is GGUFReader


@pytest.mark.parametrize("kept", [4, 12, 60, 200])
def test_a_header_that_ends_early_is_an_error(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r".+"):
        read_header(path)
