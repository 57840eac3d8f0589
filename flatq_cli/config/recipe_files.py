"""Recipes from YAML, and back: bundled by name or a file by path, changed by a preset and by `--set`, validated.

What is strongest comes last. A bundled recipe is general, so the model preset's overrides come after it; a user's own
file is particular, so it comes after the preset's. Each `--set a.b=v` follows, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.recipe import Recipe
from flatq_cli.config.validation import Layer, file_layer, nearest, plain_layer, validate
from flatq_cli.config.yaml_text import dump_yaml, parse_yaml
from flatq_cli.errors import UsageError


def recipe_names() -> list[str]:
    """The bundled recipes, the default first."""
    names = sorted(path.stem for path in (configs_dir() / "recipes").glob("*.yaml"))
    return sorted(names, key=lambda name: name != "flatq")


def load_recipe(
    recipe: str,
    overrides: Sequence[str] = (),
    preset_overrides: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """Resolve a recipe.

    Args:
        recipe: the name of a bundled recipe, or the path of a YAML file.
        overrides: `a.b=v` each, v read as YAML.
        preset_overrides: what a model preset changes, nested as in the file.
        changes: what a pipeline file changes, nested in the same way; `overrides` are stronger.
    Raises:
        UsageError: no such recipe, a YAML error, an unknown key or a wrong value, with the place where it was written.
    """
    layers = [file_layer(_recipe_path(recipe), "recipe")]
    if preset_overrides:
        layers.insert(recipe in recipe_names(), plain_layer(preset_overrides, "the model preset"))
    if changes:
        layers.append(plain_layer(changes, "the pipeline's `set`"))
    layers += [_set_layer(option) for option in overrides]
    return validate(Recipe, layers)


def recipe_from_mapping(data: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain data, such as the one stored in a run; `source` names it in errors.

    Raises:
        UsageError: an unknown key or a wrong value.
    """
    return validate(Recipe, [plain_layer(data, source)])


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `load_recipe` reads it back equal."""
    return dump_yaml(recipe.model_dump(mode="json"))


def describe_recipe(recipe: Recipe) -> str:
    """The same YAML as `dump_recipe`, with what each key means as a comment beside it."""
    return "\n".join(_described_lines(recipe, indent="")) + "\n"


def recipe_stem(recipe: str) -> str:
    """The short name of a recipe given by name or path, as it is used in a run's folder name."""
    return recipe if recipe in recipe_names() else Path(recipe).stem


def _recipe_path(recipe: str) -> Path:
    if recipe in recipe_names():
        return configs_dir() / "recipes" / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_file() or "/" in recipe or path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    raise UsageError(
        f"--recipe: there is no recipe '{recipe}'{nearest(recipe, names)}; the recipes are {', '.join(names)}, "
        "or the path of a YAML file"
    )


def _set_layer(option: str) -> Layer:
    """One `--set a.b=v` as a layer whose keys were all written there."""
    key, equals, text = option.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UsageError(f"--set {option}: expected KEY=VALUE, such as --set weights.bits=4")
    source = f"--set {'.'.join(path)}"
    value: Any = parse_yaml(text, source, number_lines=False).data
    for part in reversed(path):
        value = {part: value}
    return plain_layer(value, source)


def _described_lines(section: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            summary = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{indent}# {summary}", f"{indent}{name}:", *_described_lines(value, indent + "  ")]
        else:
            entry = indent + dump_yaml({name: value}).rstrip("\n")
            lines.append(f"{entry:<32}  # {info.description}" if info.description else entry)
    return lines
