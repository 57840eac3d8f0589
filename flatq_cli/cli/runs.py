"""Runs from options: the recipe they name, where a run lives, and opening it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.cli.options import last_run
from flatq_cli.config.presets import find_preset
from flatq_cli.config.recipe import Recipe
from flatq_cli.config.recipe_files import load_recipe, recipe_stem

if TYPE_CHECKING:
    from flatq_cli.store.progress import Progress
    from flatq_cli.store.run import Run


def resolve_recipe(
    model: str, recipe: str, overrides: Sequence[str], changes: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe with what the model's preset, a pipeline (`changes`) and `--set` change. Raises as `load_recipe`."""
    preset = find_preset(model)
    return load_recipe(recipe, overrides, None if preset is None else preset.overrides, changes)


def default_run_dir(model: str, recipe: str) -> Path:
    """`runs/<model>-<recipe>`, the model by its preset, or by the last part of its hub id or path."""
    path = Path(model)
    name = path.resolve().name if path.exists() else path.name
    return Path("runs") / f"{name.removesuffix('.gguf')}-{recipe_stem(recipe)}"


def open_or_create_run(
    model: str, recipe: str, resolved: Recipe, run_dir: Path | None, trust_remote_code: bool, progress: Progress
) -> Run:
    """The run of a model and a recipe, remembered as the last one used here. Raises as `open_or_create_run`."""
    from flatq_cli.stages import calibrate as stage
    from flatq_cli.store.last import remember_run

    path = run_dir or default_run_dir(model, recipe)
    opened = stage.open_or_create_run(
        model, resolved, path, trust_remote_code, progress=progress, recipe_name=recipe_stem(recipe)
    )
    remember_run(path)
    progress.log(f"run: {path}")
    return opened


def open_run(path: Path | None) -> Run:
    """The run at `path`, or the last one used here; it is the last one from now on."""
    from flatq_cli.store.last import remember_run
    from flatq_cli.store.run import Run

    path = path or last_run()
    opened = Run.open(path)
    remember_run(path)
    return opened
