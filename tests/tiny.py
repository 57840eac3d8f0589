"""Tiny random models of the four families, a tokenizer, and runs made from them by the real stages."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from flatq_cli.config.recipe import Recipe
from flatq_cli.stages.calibrate import calibrate, open_or_create_run
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run

VOCABULARY = 48
TEXT = " ".join(f"w{word}" for word in random.Random(0).choices(range(40), k=600))
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDTHS, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**WIDTHS, head_dim=8, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**WIDTHS, tie_word_embeddings=True),  # biases on q, k, v
    "qwen3": lambda: Qwen3Config(**WIDTHS, head_dim=12, tie_word_embeddings=False),  # norms on q, k; wide heads
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the tiny text: transformers reads any other kind wrongly for Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


def tiny_model_dir(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A model with a tokenizer. Every parameter is random: a fresh model has its norms at one and its biases at 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    directory = folder / f"tiny {family}"
    model.to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def tiny_recipe(folder: Path, epochs: int = 0, **sections: dict[str, Any]) -> Recipe:
    """The default recipe on a tiny text; `sections` are sections of a recipe."""
    calibration = {"data": str(tiny_text(folder)), "samples": 8, "seqlen": 16, "epochs": epochs, "batch": 4}
    return Recipe.model_validate({**sections, "calibration": calibration})


def fused_run(
    folder: Path, family: str, epochs: int = 0, dtype: torch.dtype = torch.float32, **sections: dict[str, Any]
) -> Run:
    """A run whose calibrate and fuse stages are done."""
    recipe = tiny_recipe(folder, epochs, **sections)
    run = open_or_create_run(str(tiny_model_dir(folder, family, dtype)), recipe, folder / f"run {family}")
    calibrate(run, "cpu", SilentProgress())
    fuse(run, "cpu", SilentProgress())
    return run
