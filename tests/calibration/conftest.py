from __future__ import annotations

import pytest
import torch

from tests.calibration.prepare import Prepared, prepared
from tests.tiny import bpe_tokenizer, random_model, save_model, source_of, tiny_config


@pytest.fixture(scope="session")
def with_outliers(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A Llama in which a few channels of the activations are far larger than the others, as in real models."""
    model = random_model(tiny_config("llama", hidden_size=64, intermediate_size=96, initializer_range=0.08))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[5, 40]] *= 40
            layer.post_attention_layernorm.weight[[5, 17]] *= 40
            layer.mlp.up_proj.weight[[3, 70]] *= 20
    directory = save_model(model, bpe_tokenizer(), tmp_path_factory.mktemp("outliers") / "model")
    return prepared(source_of(directory), samples=32, seqlen=32)
