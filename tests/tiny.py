"""Tiny random models of the four families, their tokenizers and texts, and runs made from them by the real stages.

Every parameter of a model is random, norms and biases too, which a fresh model has at one and zero: what is folded
into them must show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from flatq_cli.config.recipe import Recipe
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source
from flatq_cli.runtime.folding import fold, online_tensors
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.sites import ATTENTION, attach_sites, online_sites
from flatq_cli.stages.calibrate import calibrate, open_or_create_run
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from flatq_cli.transforms.hadamard import random_orthogonal
from flatq_cli.transforms.kronecker import Transform, transform_from_matrices

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
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ODD_WIDTHS = {"hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
PRIME_WIDTHS = {**ODD_WIDTHS, "hidden_size": 29, "intermediate_size": 41, "head_dim": 6}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# name → config class, and how it differs from WIDTHS
VARIANTS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": (LlamaConfig, {"head_dim": 12}),
    "llama with scaled rope": (LlamaConfig, {"rope_parameters": SCALED_ROPE}),
    "llama with odd widths": (LlamaConfig, ODD_WIDTHS),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 5}),
    "mistral without a window": (MistralConfig, {"head_dim": 8, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),  # biases on q, k, v
    "qwen2 with a sliding window from block 1": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": False}),  # norms on q and k; wide heads
    "qwen3 with prime widths": (Qwen3Config, PRIME_WIDTHS),
}

FLOAT: dict[str, Any] = {"bits": 16}
NO_TRANSFORM = {"kind": "none", "diagonal": "none"}
NO_CLIP = {"clip": "none"}
# Sections of recipes that between them have and lack every part of a block's artifact.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "svd": {"transform": {"parametrization": "svd", "init": "orthogonal", "diagonal": "smooth"}},
    "hadamard": {"transform": {"init": "hadamard", "diagonal": "none"}},
    "orthogonal": {"transform": {"parametrization": "orthogonal", "init": "hadamard", "diagonal": "none"}},
    "log loss": {"calibration": {"loss": "log"}},
    "no clips": {"weights": NO_CLIP, "activations": NO_CLIP, "kv_cache": NO_CLIP},
    "fixed clips": {"calibration": {"clip_start": "fixed"}},
    "rtn": {"transform": NO_TRANSFORM},
    "w4a16": {"activations": FLOAT, "kv_cache": FLOAT},
    "w4a16 rtn": {"activations": FLOAT, "kv_cache": FLOAT, "transform": NO_TRANSFORM},
    "w4a8kv8": {"activations": {"bits": 8}, "kv_cache": {"bits": 8}},
    "w16a4kv4": {"weights": FLOAT},
    "only the cache": {"weights": FLOAT, "activations": FLOAT},
    "smoothquant": {"transform": {"kind": "none", "diagonal": "smooth"}, "kv_cache": FLOAT},
    "nothing": {"weights": FLOAT, "activations": FLOAT, "kv_cache": FLOAT},
    "groups": {"weights": {"group": 8}},
    "asymmetric": {"weights": {"symmetric": False}, "activations": {"symmetric": False}},
    "asymmetric 8-bit groups": {"weights": {"bits": 8, "symmetric": False, "group": 8}},
    "symmetric cache": {"kv_cache": {"symmetric": True}},
}


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a variant; `changes` are keys of the config."""
    make, options = VARIANTS[name]
    return make(**{**WIDTHS, **options, **changes})


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model in which every parameter is random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def bpe_tokenizer(text: str = TEXT, vocabulary: int = VOCABULARY, every_byte: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE of a text: transformers reads any other kind wrongly for Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if every_byte else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


def word_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word, w0 to w44 after three special ones: ids that a test can name."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, **options: Any) -> Path:
    """A model directory as a user would have it; `options` are those of `save_pretrained`."""
    model.save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)
    return directory


LAG = 3
FIRST_WORD = 2
"""The ids below are the tokenizer's special ones."""


def lesson(ids: torch.Tensor, length: int) -> torch.Tensor:
    """What a taught model says after `ids` [batch, at least LAG]: each token follows from the one LAG before it."""
    follows = torch.randperm(VOCABULARY - FIRST_WORD, generator=torch.Generator().manual_seed(0)) + FIRST_WORD
    said = list(ids.unbind(1))
    while len(said) < length:
        said.append(follows[said[-LAG] - FIRST_WORD])
    return torch.stack(said, 1)


def first_words(batch: int, generator: torch.Generator, length: int = LAG) -> torch.Tensor:
    """Random words [batch, length], none of them special."""
    return torch.randint(FIRST_WORD, VOCABULARY, (batch, length), generator=generator)


def taught_model(config: PreTrainedConfig, seed: int = 0, steps: int = 400, length: int = 24) -> PreTrainedModel:
    """A float32 model that has learned `lesson`: it is sure of every token, and has it from its attention.

    Of a random model a rounding makes another text; of this one only a mistake does.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        ids = lesson(first_words(16, generator), length)
        said = model(ids).logits[:, LAG - 1 : -1]
        functional.cross_entropy(said.flatten(0, 1), ids[:, LAG:].flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def tiny_model_dir(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, taught: bool = False, **changes: Any
) -> Path:
    """A variant with its tokenizer in a directory of `folder`, random or `taught`."""
    if taught:
        model = taught_model(tiny_config(name, **{"initializer_range": 0.1, **changes}))
    else:
        model = random_model(tiny_config(name, **changes))
    return save_model(model.to(dtype), bpe_tokenizer(), folder / f"tiny {name}")


def source_of(directory: Path) -> BlockSource:
    """A model directory as the stages see it."""
    return open_source(locate(str(directory)))


def tiny_source(folder: Path, name: str, **changes: Any) -> BlockSource:
    """A variant as the stages see it."""
    return source_of(tiny_model_dir(folder, name, **changes))


def tiny_tokens(batch: int = 2, length: int = 19, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] of the tiny vocabulary."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_text(folder: Path) -> Path:
    """A file with the tiny text."""
    file = folder / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def tiny_recipe(folder: Path, epochs: int = 0, **sections: dict[str, Any]) -> Recipe:
    """The default recipe on the tiny text, rounded to nearest and not tuned; `sections` are merged over it."""
    plain = {"weights": {"rounding": "nearest"}, "tune": {"steps": 0}}
    sections = {**plain, **{name: {**plain.get(name, {}), **section} for name, section in sections.items()}}
    calibration = {"data": str(tiny_text(folder)), "samples": 8, "seqlen": 16, "epochs": epochs, "batch": 4}
    return Recipe.model_validate({**sections, "calibration": {**calibration, **sections.get("calibration", {})}})


def calibrated_run(model: Path, recipe: Recipe, path: Path) -> Run:
    """A run of the model in `model` whose calibrate stage is done."""
    run = open_or_create_run(str(model), recipe, path)
    calibrate(run, "cpu", SilentProgress())
    return run


def fused_run(
    folder: Path,
    family: str,
    epochs: int = 0,
    dtype: torch.dtype = torch.float32,
    taught: bool = False,
    **sections: dict[str, Any],
) -> Run:
    """A run whose calibrate and fuse stages are done."""
    recipe = tiny_recipe(folder, epochs, **sections)
    run = calibrated_run(tiny_model_dir(folder, family, dtype, taught), recipe, folder / f"run {family}")
    fuse(run, "cpu", SilentProgress())
    return run


def random_transforms(layouts: Mapping[str, SiteLayout], seed: int = 0) -> dict[str, Transform]:
    """Well-conditioned random transforms with every part a layout has; float64, of matrices that float32 holds."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(size: int) -> torch.Tensor:
        spread = torch.empty(size, dtype=torch.float64).uniform_(-1, 1, generator=generator).exp()
        mixed = random_orthogonal(size, generator) * spread @ random_orthogonal(size, generator)
        return mixed.float()

    def diagonal(size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(-1.5, 1.5, generator=generator).exp()

    return {
        name: transform_from_matrices(
            layout.width,
            matrix(layout.n1) if layout.left else None,
            matrix(layout.n2) if layout.right else None,
            diagonal(layout.width) if layout.diag else None,
            dtype=torch.float64,
        )
        for name, layout in layouts.items()
    }


def without_quantizers(layouts: Mapping[str, SiteLayout]) -> dict[str, SiteLayout]:
    """The same transforms, and activations that pass as they are."""
    return {name: replace(layout, bits=16, clip=False) for name, layout in layouts.items()}


def folded_block(
    source: BlockSource,
    index: int,
    layouts: Mapping[str, SiteLayout],
    transforms: Mapping[str, Transform],
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Block `index` with `transforms` folded into its parameters in float64, and the sites of `layouts` attached."""
    parameters = {name: tensor.double() for name, tensor in source.block_tensors(index).items()}
    folded = fold(parameters, transforms, source.family, source.shapes)
    sites = online_sites(layouts)
    block = attach_sites(source.block(index, dtype=dtype, attention=ATTENTION), source.family, sites)
    online = {f"sites.{name}": tensor for name, tensor in online_tensors(transforms).items()}
    clips = {name: tensor for name, tensor in block.state_dict().items() if name.endswith(".clip")}
    block.load_state_dict({**clips, **folded, **online}, strict=True)
    return block
