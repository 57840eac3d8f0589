"""Plain data as tables: nothing is cut, wrapped or taken for markup where no person looks."""

import json

import pytest

from flatq_cli.cli.tables import cell, show_json, show_mapping, show_rows, size


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("memory_bytes", 96.2 * 2**20, "96.2 MiB"),
        ("export.bytes", 12, "12 B"),
        ("seconds", 0.25, "0.2s"),
        ("calibrate.seconds", 75, "1m15s"),
        ("perplexity", 19.2612, "19.26"),
        ("loss", 0.0123456, "0.01235"),
        ("parameters", 1234567, "1,234,567"),
        ("tied", True, "yes"),
        ("baseline", None, "–"),
        ("formats", ["a", "b"], "a, b"),
    ],
)
def test_a_value_is_shown_as_a_person_reads_it(key, value, text):
    assert cell(key, value) == text


@pytest.mark.parametrize(("count", "text"), [(1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**40, "3.0 TiB")])
def test_sizes_have_binary_units(count, text):
    assert size(count) == text


def test_rows_may_lack_keys_and_brackets_are_no_markup(capsys):
    long = "x" * 300
    show_rows([{"name": "[red]a", "shape": [2, 3]}, {"name": long, "note": "only here"}])
    lines = capsys.readouterr().out.splitlines()
    assert any("[red]a" in line and "2, 3" in line for line in lines)
    assert any(long in line and "only here" in line for line in lines)


def test_nested_values_have_dotted_names_and_long_lists_are_counted(capsys):
    show_mapping({"fuse": {"bytes": 2048, "blocks": [{"a": 1}, {"a": 2}]}})
    output = capsys.readouterr().out
    assert "fuse.bytes" in output
    assert "2.0 KiB" in output
    assert "2 entries" in output


def test_json_takes_what_json_does_not_know(capsys, tmp_path):
    show_json({"path": tmp_path, "name": "é"})
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path), "name": "é"}
