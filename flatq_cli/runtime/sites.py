"""Sites: where a stock transformer block is transformed and quantized, without a copy of its code.

`attach_sites` hangs modules on a block through hooks: what a norm puts out, or what a linear reads, passes through
its site; post-RoPE queries, keys and values pass through theirs in an attention function registered with transformers
as `flatq`. A site is any module from tensor to tensor: `OnlineSite` transforms and quantizes; calibration
attaches others that only record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flatq_cli.models.families import Family
from flatq_cli.runtime.backends.base import BackendModule
from flatq_cli.runtime.backends.reference import REFERENCE
from flatq_cli.runtime.kv_cache import PackedStates
from flatq_cli.runtime.layout import KEY, QUERY, VALUE, SiteLayout
from flatq_cli.runtime.linear import PackedLinear

ATTENTION = "flatq"


class OnlineSite(BackendModule):
    """The online part of a site: x → Q(x (L ⊗ R)), with the diagonal already folded into what produces x.

    `feeds_packed`: whether packed linears, and nothing else, read what it puts out, so that it may hand them codes.
    Buffers, float32, `None` where the layout has no such part: `left` [n1, n1], `right` [n2, n2], `clip` [2] (factors
    of max and min in (0, 1)). They hold plain tensors; calibration swaps differentiable ones in through
    `torch.func.functional_call`.
    """

    left: Tensor | None
    right: Tensor | None
    clip: Tensor | None

    def __init__(self, layout: SiteLayout) -> None:
        super().__init__()
        self.backend = REFERENCE
        self.feeds_packed = False
        self.width = layout.width
        self.bits, self.symmetric = layout.bits, layout.symmetric
        self.register_buffer("left", torch.eye(layout.n1, dtype=torch.float32) if layout.left else None)
        self.register_buffer("right", torch.eye(layout.n2, dtype=torch.float32) if layout.right else None)
        self.register_buffer("clip", torch.ones(2, dtype=torch.float32) if layout.clip else None)

    def forward(self, x: Tensor) -> Tensor:
        """Transform and quantize the last axis of `x`, through the backend; shape and dtype stay."""
        return self.backend.site(self, x)


def online_sites(layouts: Mapping[str, SiteLayout]) -> dict[str, nn.Module]:
    """The sites that run online for a block's layouts; `query` is the other face of `key`'s transform and quantizes
    nothing.
    """
    sites: dict[str, nn.Module] = {name: OnlineSite(_online(layout)) for name, layout in layouts.items()}
    if KEY in layouts and layouts[KEY].right:
        sites[QUERY] = OnlineSite(replace(layouts[KEY], name=QUERY, bits=16, clip=False))
    return sites


def _online(layout: SiteLayout) -> SiteLayout:
    """`layout` without what is folded: the matrix of `value` goes into v_proj."""
    return replace(layout, right=False) if layout.name == VALUE else layout


def attach_sites(block: nn.Module, family: Family, sites: Mapping[str, nn.Module]) -> nn.Module:
    """Hang `sites` (by site name) on a stock `block` of `family`, in place; returns the block.

    The sites become `block.sites.<name>`, so their tensors are part of the block's state.

    Raises:
        ValueError: if the block has sites already; their hooks would stay.
    """
    if hasattr(block, "sites"):
        raise ValueError("the block has sites already")
    block.sites = nn.ModuleDict(dict(sites))
    for site in family.sites:
        if site.name not in block.sites:
            continue
        module = block.sites[site.name]
        if isinstance(module, OnlineSite):
            module.feeds_packed = all(isinstance(block.get_submodule(reader), PackedLinear) for reader in site.readers)
        if site.producer is not None:
            block.get_submodule(site.producer).register_forward_hook(_After(module))
        else:
            for reader in site.readers:
                block.get_submodule(reader).register_forward_pre_hook(_Before(module))
    attention: Any = block.get_submodule(family.attention)
    # A plain attribute: registering the sites a second time would store their tensors twice.
    attention.__dict__["flatq_sites"] = block.sites
    attention.config._attn_implementation = ATTENTION
    return block


class _After:
    """Forward hook: what the module puts out passes through the site. A class, so that a deepcopy of the block copies
    it too.
    """

    def __init__(self, site: nn.Module) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.site(output)  # type: ignore[no-any-return]


def site_behind(module: nn.Module) -> nn.Module | None:
    """The site that what `module` puts out passes through; None: there is none."""
    hooks = module._forward_hooks.values()
    return next((hook.site for hook in hooks if isinstance(hook, _After)), None)


class _Before:
    """Forward pre-hook: what the module reads passes through the site."""

    def __init__(self, site: nn.Module) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.site(args[0]), *args[1:])


def site_before(module: nn.Module) -> nn.Module | None:
    """The site that what `module` reads passes through; None: there is none."""
    hooks = module._forward_pre_hooks.values()
    return next((hook.site for hook in hooks if isinstance(hook, _Before)), None)


def flatq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedStates,
    value: Tensor | PackedStates,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function `flatq`: post-RoPE query, key and value through their sites, then sdpa.

    Shapes as transformers gives them: query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, tokens,
    head_dim], or what a packed cache holds of them (`runtime/kv_cache.py`): that has been through its sites.
    """
    sites = module.__dict__.get("flatq_sites", {})
    if QUERY in sites:
        query = sites[QUERY](query)
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        tokens = query.shape[2]
        key, value = key.seen(tokens, attention_mask), value.seen(tokens, attention_mask)
        backend = sites[KEY].backend
        attended = backend.attend(query, key, value, attention_mask, kwargs.get("scaling"))
        if attended is not None:
            return attended.transpose(1, 2).contiguous(), None
    if isinstance(key, PackedStates):
        key = key.dequantize(query.dtype)
    elif KEY in sites:
        key = sites[KEY](key)
    if isinstance(value, PackedStates):
        value = value.dequantize(query.dtype)
    elif VALUE in sites:
        value = sites[VALUE](value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(ATTENTION, flatq_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
