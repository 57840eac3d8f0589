"""YAML text to plain data with the line of every key, and back.

What is read is the core schema of YAML 1.2, not the 1.1 that PyYAML defaults to: there `2e-3` is a string, `010` is 8,
and `no` is false. Nothing but plain data comes out of a file, and a key given twice is an error, not a silent override.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from flatq_cli.errors import UsageError

KeyPath = tuple[str | int, ...]

_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_CORE_SCHEMA = [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
]
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own protocol)


class _CoreDumper(yaml.SafeDumper):
    """Quotes each string that YAML 1.1 or the core schema would read as something else."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """One line, and escapes for line breaks: PyYAML's other styles lose the rarer ones (U+0085)."""
    style = '"' if text and text.splitlines() != [text] else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _name, _pattern, _first in _CORE_SCHEMA:
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _CoreDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
_CoreDumper.add_representer(str, _represent_str)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class Document:
    """The data of a YAML text, and the line (from 1) on which each key or list item stands."""

    data: Any
    lines: Mapping[KeyPath, int]


def parse_yaml(text: str, source: str, number_lines: bool = True) -> Document:
    """Read one YAML document; `source` names it in errors, with the line if asked. An empty text gives the data None.

    Raises:
        UsageError: a syntax error or a duplicate key, with `source` and line.
    """
    try:
        loader = _CoreLoader(text)
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        return Document(None if root is None else _plain(loader, root, (), lines, source), lines)
    except yaml.YAMLError as error:
        raise UsageError(_syntax_error(error, source, number_lines)) from error
    except RecursionError as error:
        raise UsageError(f"{source}: not valid YAML here: nested too deeply, or in itself") from error
    except ValueError as error:  # a tag that its text does not fit, such as `!!int x`
        raise UsageError(f"{source}: not valid YAML: {error}") from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text that `parse_yaml` reads back as it was; keys keep their order."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=10_000)


def _plain(loader: _CoreLoader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> Any:
    """The data of `node`; notes in `lines` where each key below it stands."""
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise UsageError(f"{source}:{node.start_mark.line + 1}: not valid YAML: the tag {node.tag} is not allowed here")
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{source}:{line}: a key must be a word")
            key = key_node.value
            if key in data:
                first = lines[(*path, key)]
                name = ".".join(map(str, (*path, key)))
                raise UsageError(f"{source}:{line}: {name}: this key is there twice (first on line {first})")
            lines[(*path, key)] = line
            data[key] = _plain(loader, value_node, (*path, key), lines, source)
        return data
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_plain(loader, item, (*path, index), lines, source))
        return items
    return loader.construct_object(node, deep=True)


def _syntax_error(error: yaml.YAMLError, source: str, number_lines: bool) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = source if mark is None or not number_lines else f"{source}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    return f"{where}: not valid YAML: {problem}" + (f" ({context})" if context else "")
