"""From plain data to a typed model, with errors that say where the wrong value was written.

Data comes in layers (a file, a preset's overrides, `--set` options); each layer remembers where each of its keys was
written. Layers are merged key by key, pydantic validates the whole, and its first error is turned into one line:

    recipes/mine.yaml:7: activations.clip: 'learn' is not one of none, learned (did you mean 'learned'?)

Everything the line says (choices, nearest key, limits) is read from the model itself, so a new key needs nothing here.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flatq_cli.config.yaml_text import KeyPath, parse_yaml
from flatq_cli.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """Plain data, where it is from, and where each of its keys was written."""

    data: Mapping[str, Any]
    source: str
    where: Mapping[KeyPath, str]


def plain_layer(data: Mapping[str, Any], source: str) -> Layer:
    """A layer whose every key was written at one place."""
    return Layer(data, source, dict.fromkeys(_key_paths(data), source))


def file_layer(path: Path, what: str) -> Layer:
    """Read a YAML file that holds a mapping; `what` ("recipe") names its purpose in errors.

    Raises:
        UsageError: the file cannot be read, is not YAML, or holds something else than a mapping.
    """
    source = _short(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not a YAML file (not UTF-8 text)") from error
    except OSError as error:
        raise UsageError(f"{source}: cannot read this {what} ({error.strerror})") from error
    document = parse_yaml(text, source)
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise UsageError(f"{source}:1: a {what} is a list of `key: value` lines, found {_show(data)}")
    return Layer(data, source, {key: f"{source}:{line}" for key, line in document.lines.items()})


def validate(model: type[Model], layers: Sequence[Layer]) -> Model:
    """Merge the layers, the last one strongest, and build `model` of them.

    Raises:
        UsageError: the first thing wrong, where it was written, and how many more there are.
    """
    data: dict[str, Any] = {}
    where: dict[KeyPath, str] = {}
    for layer in layers:
        data = _merge(data, layer.data)
        where.update(layer.where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        line = _explain(model, first, where, layers[-1].source if layers else model.__name__)
        raise UsageError(line + (f" (and {len(others)} more)" if others else "")) from error


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint for a misspelt word, or nothing: ` (did you mean 'learned'?)`."""
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def leaf_fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of a model that holds a value, not a section; in the order of their definition."""
    for name, info in model.model_fields.items():
        if _is_model(info.annotation):
            yield from leaf_fields(typing.cast("type[BaseModel]", info.annotation), (*path, name))
        else:
            yield (*path, name)


def _key_paths(data: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from _key_paths(value, (*path, key))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _explain(model: type[BaseModel], error: ErrorDetails, where: Mapping[KeyPath, str], source: str) -> str:
    location = error["loc"]
    key = ".".join(map(str, location))
    place = next((where[location[:n]] for n in range(len(location), 0, -1) if location[:n] in where), source)
    prefix = place if place == f"--set {key}" else f"{place}: {key}" if key else place
    return f"{prefix}: {_reason(model, error)}"


def _reason(model: type[BaseModel], error: ErrorDetails) -> str:
    location, value = error["loc"], error["input"]
    if error["type"] == "extra_forbidden":
        return f"unknown key '{location[-1]}'{_nearest_key(model, location)}"
    if error["type"] == "missing":
        return "this key is missing"
    if error["type"] in ("model_type", "model_attributes_type"):
        section = _annotation(model, location)
        return f"this is a section with the keys {', '.join(section.model_fields)}; found {_show(value)}"
    if error["type"] == "literal_error":
        choices = _choices(_annotation(model, location))
        if choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            return f"{_show(value)} is not {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}{hint}"
    message = error["msg"].removeprefix("Input ")  # "Input should be greater than 0"
    if isinstance(value, Mapping):  # a check of a whole section: its message says what was found
        return message
    return f"{_show(value)} {message}" if message != error["msg"] else f"{_show(value)}: {message}"


def _nearest_key(model: type[BaseModel], location: KeyPath) -> str:
    """Where an unknown key may belong: the keys so called in other sections, else a sibling of nearly that name."""
    word, keys = str(location[-1]), list(_annotation(model, location[:-1]).model_fields)
    elsewhere = [".".join(path) for path in leaf_fields(model) if path[-1] == word]
    if elsewhere:
        return f" (did you mean {' or '.join(elsewhere)}?)"
    return nearest(word, keys) or f" (the keys here are {', '.join(keys)})"


def _annotation(model: Any, location: KeyPath) -> Any:
    """The type that the model gives to the key at `location`."""
    for part in location:
        if isinstance(part, int):  # an item of a list: the list's annotation has given its model already
            continue
        model = model.model_fields[part].annotation
        if not _is_model(model):  # `Section | None`
            model = next((option for option in typing.get_args(model) if _is_model(option)), model)
    return model


def _choices(annotation: Any) -> list[str]:
    """The values of a Literal, of `Literal[…] | None` too."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for option in typing.get_args(annotation) for choice in _choices(option)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _show(value: Any) -> str:
    """A value as the user wrote it, near enough."""
    if value is None:
        return "an empty value"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _short(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
