"""Model presets: a short name for a model, where its weights come from, and what its recipe changes.

`configs/models/<name>.yaml` each. Where a preset names a GGUF inside a Python package, an installed package is used and
the hub is asked otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flatq_cli.config.locations import configs_dir
from flatq_cli.config.recipe import Frozen, Recipe
from flatq_cli.config.validation import file_layer, nearest, validate
from flatq_cli.errors import UsageError


class PackagedGguf(Frozen):
    """A GGUF file that a Python package carries."""

    package: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = Field(description="the package's import name")
    pattern: str = Field("*.gguf", description="glob inside the package; exactly one file must match")


class ModelPreset(Frozen):
    """A model by a short name."""

    name: str = Field(description="the name that `--model` takes; the file's name")
    description: str = Field("", description="one line for `flatq models`")
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] = Field(description="repository on the Hugging Face hub")
    revision: str = Field("main", description="branch, tag or commit of the repository")
    gguf: PackagedGguf | None = Field(None, description="a GGUF in an installed package, preferred to the hub")
    recipe: Recipe = Field(default_factory=Recipe, description="recipe keys that this model changes")

    @property
    def overrides(self) -> dict[str, Any]:
        """What the preset changes in a recipe: the keys its file sets and no others, nested as in a recipe."""
        return self.recipe.model_dump(exclude_unset=True)


def preset_names() -> list[str]:
    """The presets, in natural order (8b before 13b)."""
    return sorted((path.stem for path in _presets_dir().glob("*.yaml")), key=_natural)


def load_preset(name: str) -> ModelPreset:
    """Read a preset.

    Raises:
        UsageError: no such preset (with the nearest names), or a wrong key or value in its file.
    """
    if name not in preset_names():
        raise UsageError(
            f"--model: there is no preset '{name}'{nearest(name, preset_names())}; `flatq models` lists them; "
            "a hub id (owner/name), a model directory and a .gguf file will do too"
        )
    return validate(ModelPreset, [file_layer(_presets_dir() / f"{name}.yaml", "model preset")])


def find_preset(model: str) -> ModelPreset | None:
    """The preset that `--model` names, or None where it is a hub id, a directory or a file.

    Raises:
        UsageError: it can only be a preset, and there is none of that name.
    """
    if model not in preset_names() and ("/" in model or model.endswith(".gguf") or Path(model).exists()):
        return None
    return load_preset(model)


def _presets_dir() -> Path:
    return configs_dir() / "models"


def _natural(name: str) -> list[tuple[int, float, str]]:
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]
