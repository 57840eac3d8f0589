"""A tiny language that a tiny Llama has partly learned, so that its scores are neither all right nor all wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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


def tiny_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def tiny_llama(vocab: int, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Tiny:
    directory: Path
    text: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model, saved as a user's directory would be, and a text in its language."""
    folder = tmp_path_factory.mktemp("tiny")
    text = tiny_prose(140)
    (folder / "tiny-prose.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer(text)
    model = tiny_llama(len(tokenizer))
    tokens = torch.tensor(tokenizer(tiny_prose(400, seed=1))["input_ids"])
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        batch = windows[torch.arange(8) + 8 * step % (len(windows) - 8)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Tiny(folder / "model", folder / "tiny-prose.txt", model.eval().requires_grad_(False), tokenizer)
