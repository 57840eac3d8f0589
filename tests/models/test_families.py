from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from flatq_cli.errors import UsageError
from flatq_cli.models.families import FAMILIES, Shapes, family_of


def test_the_table_names_modules_that_exist_and_covers_every_linear_of_a_block(any_config):
    family = family_of(any_config)
    model = AutoModelForCausalLM.from_config(any_config)
    for path in (family.base, family.embedding, family.layers, family.final_norm, family.head):
        model.get_submodule(path)
    block = model.get_submodule(f"{family.layers}.0")
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(family.linears) == linears
    for site in family.sites:
        for name in (site.producer, site.diag_into):
            if name is not None:
                block.get_submodule(name)


def test_shapes_are_those_of_the_modules(any_config):
    family = family_of(any_config)
    block = AutoModelForCausalLM.from_config(any_config).get_submodule(f"{family.layers}.0")
    expected = {
        name: (module.out_features, module.in_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert Shapes.of(any_config).linears(family) == expected


def test_a_norm_produces_what_several_linears_read():
    for family in FAMILIES:
        for site in family.sites:
            assert (site.producer is not None) == (len(site.readers) > 1)


def test_head_dim_is_the_configs_where_it_sets_one():
    assert Shapes.of(LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=12)).head_dim == 12
    assert Shapes.of(LlamaConfig(hidden_size=32, num_attention_heads=4)).head_dim == 8


def test_an_unsupported_architecture_is_refused_with_the_supported_ones():
    with pytest.raises(UsageError, match="'gpt2': supported are llama, mistral, qwen2, qwen3"):
        family_of(GPT2Config())
