"""Who packs the cache of a loaded export: a hook on the decoder, which exchanges the layers of an empty stock cache.

`generate`, and callers who make their own cache, need to know nothing: a `DynamicCache` gets layers that grow
(`kv_cache.py`), a `StaticCache` layers that do not (`static_cache.py`), in place. Every other cache stays as it is, and
the sites fake-quantize what is read from it: the same result from more memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import logging

from flatq_cli.runtime.kv_cache import PackedLayer
from flatq_cli.runtime.layout import KEY, VALUE
from flatq_cli.runtime.static_cache import PackedStaticLayer

if TYPE_CHECKING:
    from flatq_cli.runtime.sites import OnlineSite

    Sites: TypeAlias = Sequence[tuple[OnlineSite, OnlineSite]]

CACHE_NAMES = ("cache", "past_key_values")
"""What a decoder's forward calls its cache: now, and in earlier versions of transformers 5."""

logger = logging.get_logger(__name__)


def pack_cache(cache: Any, sites: Sites) -> bool:
    """Give an empty stock cache packed layers, in place; whether that was done.

    It is not done for a cache that holds something, be it packed already or floating point, nor for one of another
    class, nor for one that moves its layers to the CPU: what is in them stays right as it is.

    Args:
        sites: `key` and `value` of each block.
    """
    offloading = getattr(cache, "offloading", False)
    if type(cache) is DynamicCache and not offloading:
        return _pack_dynamic(cache, sites)
    if type(cache) is StaticCache and not offloading:
        return _pack_static(cache, sites)
    kind = type(cache).__name__ + (" with offloading" if offloading else "")
    _stays_float(f"flatq packs DynamicCache and StaticCache, not {kind}")
    return False


def _stays_float(why: str) -> None:
    if not torch.compiler.is_compiling():
        logger.warning_once(f"keys and values stay floating point in memory: {why}")


def _pack_dynamic(cache: Any, sites: Sites) -> bool:
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, PackedLayer) for layer in cache.layers)
    if not known or len(cache.layers) not in (0, len(sites)) or cache.get_seq_length():
        return False
    replaced = cache.layers or [DynamicLayer() for _ in sites]
    cache.layers = [
        PackedLayer(key, value, getattr(layer, "sliding_window", None))
        for (key, value), layer in zip(sites, replaced, strict=True)
    ]
    cache.layer_class_to_replicate = None
    if any(getattr(layer, "record_past", False) for layer in replaced):
        cache.activate_past_recording()
    return True


def _pack_static(cache: Any, sites: Sites) -> bool:
    """Layer by layer: all but those with a window that is shorter than the cache, which transformers rolls."""
    if len(cache.layers) != len(sites):
        return False
    packable = [_packable(layer, key) for layer, (key, _) in zip(cache.layers, sites, strict=True)]
    # A layer's length is on the device: it is asked for only where something could be packed, before the prompt.
    if not any(packable) or any(layer.is_initialized and bool(layer.get_seq_length()) for layer in cache.layers):
        return False
    cache.layers = [
        _packed(layer, *pair) if wanted else layer
        for layer, pair, wanted in zip(cache.layers, sites, packable, strict=True)
    ]
    return True


def _packable(layer: Any, key: OnlineSite) -> bool:
    if type(layer) is PackedStaticLayer:
        return layer.key_rows.site is not key  # emptied, and used with another model now
    if type(layer) is StaticSlidingWindowLayer and not layer.is_croppable:
        _stays_float("of a static cache, layers with a sliding window that is shorter than it")
        return False
    return type(layer) in (StaticLayer, StaticSlidingWindowLayer)


def _packed(layer: Any, key: OnlineSite, value: OnlineSite) -> PackedStaticLayer:
    packed = PackedStaticLayer(key, value, layer.max_cache_len, layer.is_sliding)
    if layer.keys is not None:  # allocated ahead of its first token
        packed.lazy_initialization(layer.keys, layer.values)
    return packed


class _PackTheCache:
    """Forward pre-hook of a decoder: the cache it is called with, or would make, is packed. A class, so that a deepcopy
    of the model copies it too.
    """

    def __init__(self, decoder: nn.Module, sites: Sequence[tuple[OnlineSite, OnlineSite]]) -> None:
        self.sites = sites
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.name = next(name for name in CACHE_NAMES if name in self.names)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
        cache = next((each for each in given if each is not None), None)
        use_cache = kwargs.get("use_cache")
        if cache is None and (getattr(module.config, "use_cache", False) if use_cache is None else use_cache):
            cache = DynamicCache(config=module.config)
        # Codes have no gradient; a model in training keeps the stock cache.
        if cache is not None and not module.training:
            pack_cache(cache, self.sites)
        return (), {**kwargs, self.name: cache}


def use_packed_cache(decoder: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let `decoder` keep keys and values packed, by a hook on its forward.

    Args:
        decoder: the model without its head. blocks: its blocks, with their sites attached (`runtime/sites.py`).
    """
    sites: list[Any] = [
        (block.get_submodule(f"sites.{KEY}"), block.get_submodule(f"sites.{VALUE}")) for block in blocks
    ]
    decoder.register_forward_pre_hook(_PackTheCache(decoder, sites), with_kwargs=True)
