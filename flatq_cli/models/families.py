"""Families: what the stages must know about an architecture, as data.

A block of a decoder-only transformer is flatq's unit of work. Which of its linears read which activation, where that
activation is produced, and what may absorb its per-channel scale is the same for every block of a family, so it is a
row of the table below and nothing else: no stage branches on a family. Adding one: `docs/adding-a-family.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flatq_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class InputSite:
    """A site whose activation is transformed online, and the linears that read it. Names are relative to the block."""

    name: str
    """attn_in, attn_out, mlp_in or mlp_out."""
    readers: tuple[str, ...]
    """The linears that multiply this activation."""
    producer: str | None
    """The module whose output is the activation (a norm shared by its readers); None: the single reader's input."""
    diag_into: str | None
    """The norm whose weight, or the linear whose output rows (bias too), absorb the diagonal; None: there is none."""


@dataclass(frozen=True)
class Family:
    """One architecture. `base` to `head` are module paths from the model, the projections from the block."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` of the configs that this row describes."""
    sites: tuple[InputSite, ...]
    base: str = "model"
    """The decoder: embedding, blocks and final norm, without the head."""
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    query_proj: str = "self_attn.q_proj"
    key_proj: str = "self_attn.k_proj"
    value_proj: str = "self_attn.v_proj"
    output_proj: str = "self_attn.o_proj"

    def site(self, name: str) -> InputSite:
        """The site called `name`; raises KeyError where the family has none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized linear of a block, in the order of the sites."""
        return tuple(reader for site in self.sites for reader in site.readers)


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    sites=(
        InputSite(
            name="attn_in",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            producer="input_layernorm",
            diag_into="input_layernorm",
        ),
        InputSite(name="attn_out", readers=("self_attn.o_proj",), producer=None, diag_into=None),
        InputSite(
            name="mlp_in",
            readers=("mlp.gate_proj", "mlp.up_proj"),
            producer="post_attention_layernorm",
            diag_into="post_attention_layernorm",
        ),
        InputSite(name="mlp_out", readers=("mlp.down_proj",), producer=None, diag_into="mlp.up_proj"),
    ),
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    replace(LLAMA, name="mistral", model_types=("mistral",)),
    replace(LLAMA, name="qwen2", model_types=("qwen2",)),  # Qwen2 and Qwen2.5: biased q/k/v
    replace(LLAMA, name="qwen3", model_types=("qwen3",)),  # norms on q and k, inside the attention
)


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` that some family describes."""
    return tuple(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(config: PreTrainedConfig) -> Family:
    """The family that describes `config`.

    Raises:
        UsageError: if none does; the message lists those there are.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise UsageError(
        f"unsupported architecture '{model_type or 'unknown'}': supported are {', '.join(supported_model_types())} "
        "(adding one: docs/adding-a-family.md)"
    )


@dataclass(frozen=True)
class Shapes:
    """The widths of a block."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shapes:
        """The widths a transformers config sets; `head_dim` is the config's own wherever it sets one.

        Raises:
            UsageError: if a width is missing or heads and widths do not fit together.
        """
        try:
            hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
            intermediate = int(config.intermediate_size)
        except (AttributeError, TypeError) as error:
            raise UsageError(f"config.json lacks a width that flatq needs: {error}") from error
        # Null in the file means the default, as transformers reads it.
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        if heads % kv_heads:
            raise UsageError(
                f"config.json: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
            )
        return cls(hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate)

    def linears(self, family: Family) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of a block, keyed by its name in the block, in the order of the sites."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        site_width = {
            "attn_in": self.hidden,
            "attn_out": attention,
            "mlp_in": self.hidden,
            "mlp_out": self.intermediate,
        }
        outputs = {
            family.query_proj: attention,
            family.key_proj: kv,
            family.value_proj: kv,
            family.output_proj: self.hidden,
            **dict.fromkeys(family.site("mlp_in").readers, self.intermediate),
            **dict.fromkeys(family.site("mlp_out").readers, self.hidden),
        }
        return {reader: (outputs[reader], site_width[site.name]) for site in family.sites for reader in site.readers}
