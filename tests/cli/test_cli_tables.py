"""Plain data as tables: nothing is cut, wrapped or taken for markup where no person looks."""

import json

import pytest

from flatq_cli.cli.tables import cell, show_evaluation, show_json, show_mapping, show_rows, size
from tests.evaluation.judged import judged_result


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


def test_an_evaluation_shows_differences_beyond_noise_and_each_gates_verdict_and_why(capsys):
    show_evaluation(judged_result())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "prose perplexity ratio 1.2 1.1 to 1.3 worse" in lines
    assert "piqa acc drop 0.1 0.06 to 0.14 within noise" in lines
    reason = "0.1 (0.06 to 0.14 at 0.95 confidence) is above the limit 0.02 by 0.08"
    assert f"piqa.acc_drop max 0.02 0.1 regression no {reason}" in lines
    assert "piqa.acc min 0.02 × baseline 0.1 undecided yes about 3,400 would do" in lines
