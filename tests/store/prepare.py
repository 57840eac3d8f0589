"""A run of the default recipe, and small tensors to save in it."""

import torch

from flatq_cli.config.recipe import Recipe
from flatq_cli.store.records import DataIdentity, ModelIdentity, RunConfig
from flatq_cli.store.versions import package_versions

MODEL = ModelIdentity(
    spec="smollm2-135m",
    location="/models/smollm2.gguf",
    kind="gguf",
    name="smollm2-135m",
    fingerprint="f" * 64,
    model_type="llama",
    num_blocks=30,
)
DATA = DataIdentity(name="pydoc", sha256="d" * 64, characters=465_126)


def config(**changes):
    fields = {"recipe": Recipe(), "model": MODEL, "data": DATA, "versions": package_versions()}
    return RunConfig(**{**fields, **changes})


def recipe(**sections):
    return Recipe.model_validate(sections)


def tensors(seed, size=64):
    return {"attn_in.left": torch.full((size,), float(seed)), "key.right": torch.eye(4) * seed}
