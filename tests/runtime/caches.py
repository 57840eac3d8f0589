"""What the tests of packed caches share: models with their exports, prompts, sites and states."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flatq_cli.models.source import BlockSource
from flatq_cli.runtime.fused import open_fused
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.sites import OnlineSite
from flatq_cli.stages.export import export
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import SilentProgress
from tests.tiny import calibrated_run, tiny_model_dir, tiny_recipe, tiny_tokens

HEAD_DIM = 64
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}
# name → variant of tests/tiny.py, and what else is set in its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window shorter than the text": ("mistral", {}),
    "mistral, window longer than the text": ("mistral", {"sliding_window": 60}),
    "qwen2": ("qwen2", {}),
    "qwen2, window in one of two blocks": ("qwen2 with a sliding window from block 1", {}),
    "qwen3": ("qwen3", {}),
}


class Pair(NamedTuple):
    """The same run twice: its fake-quant model, and its export as transformers loads it."""

    fused: PreTrainedModel
    loaded: PreTrainedModel
    directory: Path


def make_pair(folder: Path, variant: str, changes: dict[str, Any], **sections: dict[str, Any]) -> Pair:
    recipe = tiny_recipe(folder, epochs=1, **sections)
    run = calibrated_run(tiny_model_dir(folder, variant, **changes), recipe, folder / "run")
    fuse(run, "cpu", SilentProgress())
    directory = Path(export(run, "flatq", None, SilentProgress())["path"])
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # As a source assembles any model: with transformers' own cache, of which sites fake-quantize what is read.
    return Pair(BlockSource.assemble(open_fused(run)), loaded, directory)


def padded_prompts() -> dict[str, Tensor]:
    """Three prompts of 9, 6 and 2 tokens, padded on the left."""
    ids, mask = tiny_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 3, 7)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def site(name: str = "key", bits: int = 4, symmetric: bool = False, width: int = HEAD_DIM) -> OnlineSite:
    """A site with a random matrix and clips."""
    right = name == "key"
    made = OnlineSite(
        SiteLayout(
            name, width, 1, width, left=False, right=right, diag=False, bits=bits, symmetric=symmetric, clip=True
        )
    )
    generator = torch.Generator().manual_seed(bits)
    if right:
        made.right = torch.randn(width, width, generator=generator)
    made.clip = torch.tensor([0.9, 0.8])
    return made


def states(tokens: int, batch: int = 1, heads: int = 3, width: int = HEAD_DIM, seed: int = 0) -> Tensor:
    return torch.randn(batch, heads, tokens, width, generator=torch.Generator().manual_seed(seed))
