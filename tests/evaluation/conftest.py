"""A tiny language that a tiny Llama has partly learned, so that its scores are neither all right nor all wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.tiny import bpe_tokenizer, save_model, tiny_config

NOUNS = ["dog", "cat", "river", "garden", "window", "mountain"]
VERBS = ["sees", "follows", "hears", "remembers"]


def tiny_prose(sentences: int, seed: int = 0) -> str:
    """Sentences in which the subject decides verb and object, but for one in four."""
    rng = random.Random(seed)
    made = []
    for _ in range(sentences):
        subject = rng.randrange(len(NOUNS))
        thing = (subject + 1) % len(NOUNS) if rng.random() < 0.75 else rng.randrange(len(NOUNS))
        made.append(f"The {NOUNS[subject]} {VERBS[subject % len(VERBS)]} the old {NOUNS[thing]}.")
    return "\n".join(made) + "\n"


def learned_model(vocabulary: int, tokens: torch.Tensor) -> PreTrainedModel:
    """A Llama after a few steps on `tokens`."""
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.02)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = windows[torch.arange(8) + 8 * step % (len(windows) - 8)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Tiny:
    directory: Path
    text: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model, saved as a user's directory would be, and a text in its language."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "tiny-prose.txt"
    text.write_text(tiny_prose(140), encoding="utf-8")
    tokenizer = bpe_tokenizer(tiny_prose(140), vocabulary=280, every_byte=True)
    model = learned_model(len(tokenizer), torch.tensor(tokenizer(tiny_prose(400, seed=1))["input_ids"]))
    return Tiny(save_model(model, tokenizer, folder / "model"), text, model, tokenizer)
