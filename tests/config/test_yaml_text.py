"""YAML text: the core schema of YAML 1.2, line numbers, and nothing else than plain data."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.config.yaml_text import dump_yaml, parse_yaml
from flatq_cli.errors import UsageError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 0.002),
        ("1E5", 100000.0),
        ("-1.5e+2", -150.0),
        (".5", 0.5),
        ("010", 10),
        ("0x10", 16),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_are_read_as_yaml_1_2_says(text, value):
    found = parse_yaml(f"key: {text}", "x").data["key"]
    assert found == value
    assert type(found) is type(value)


@settings(deadline=None)
@given(DATA)
def test_any_plain_data_survives_dump_and_parse(data):
    assert parse_yaml(dump_yaml(data), "x").data == data


@settings(deadline=None)
@given(st.text())
def test_a_dumped_string_is_a_string_for_a_yaml_1_1_reader_too(text):
    assert yaml.safe_load(dump_yaml({"key": text}))["key"] == text


def test_every_key_and_list_item_has_its_line():
    document = parse_yaml("# comment\na:\n  b: 1\n  c:\n    - x\n    - y\n", "x")
    assert document.lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", 0): 5, ("a", "c", 1): 6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", r"^f\.yaml:3: not valid YAML: "),
        ("a: 1\n\tb: 2", r"^f\.yaml:2: not valid YAML: .*tab|^f\.yaml:2: not valid YAML: .*'\\t'"),
        ("s:\n  a: 1\n  a: 2", r"^f\.yaml:3: s\.a: this key is there twice \(first on line 2\)$"),
        ("a: !!python/object/apply:os.getcwd []", r"^f\.yaml:1: not valid YAML: "),
        ("a: !!python/name:os.system x", r"^f\.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: *nowhere", r"^f\.yaml:1: not valid YAML: found undefined alias"),
        ("a: &a [*a]", r"^f\.yaml: not valid YAML here: nested too deeply"),
        ("a: !!int x", r"^f\.yaml: not valid YAML: invalid literal"),
        ("a: 1\n---\nb: 2", r"^f\.yaml:2: not valid YAML: .*another document"),
        ("? [a]\n: 1", r"^f\.yaml:1: a key must be a word$"),
        ("a: \x01", r"^f\.yaml: not valid YAML: "),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)
