"""The fused model of a run, block by block: what `flatq eval` runs as fake-quant.

A `FusedSource` is a block source whose blocks are stock modules with their sites attached and their linears packed,
as in an export, and its cache is packed when it generates. It reads RUN/fuse alone; the original model gives only its
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatq_cli.config.recipe import Recipe
from flatq_cli.models.checkpoint import Checkpoint, SafetensorsCheckpoint
from flatq_cli.models.locate import locate
from flatq_cli.models.source import BlockSource, open_source
from flatq_cli.quantization.quantizers import FLOAT_BITS
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight
from flatq_cli.runtime.backends import REFERENCE, set_backend
from flatq_cli.runtime.layout import block_layout
from flatq_cli.runtime.linear import pack_linears, packed_tensors
from flatq_cli.runtime.pack_cache import use_packed_cache
from flatq_cli.runtime.sites import ATTENTION, attach_sites, online_sites
from flatq_cli.store.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGE = "fuse"


class FusedSource(BlockSource):
    """Embedding, blocks and head of a run's fuse stage.

    `backend`: what its blocks compute through (`runtime/backends`).
    """

    attention = ATTENTION
    backend = REFERENCE.name

    def __init__(self, original: BlockSource, checkpoint: Checkpoint, recipe: Recipe) -> None:
        super().__init__(original.location, original.config, checkpoint)
        self.layouts = block_layout(recipe, original.family, original.shapes)
        self.weights, self.kv_bits = recipe.weights, recipe.kv_cache.bits

    def block(
        self,
        i: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> nn.Module:
        """As `BlockSource.block`, computing through `backend`; UsageError where that does not work."""
        block = super().block(i, dtype, device, attention)
        set_backend(block, self.backend)
        return block

    def assemble(
        self,
        make_block: Callable[[int], nn.Module] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str | None = None,
    ) -> PreTrainedModel:
        """As `BlockSource.assemble`; the KV cache is packed as an export's.

        A stock cache is transformed and rounded anew at every step, all its rows at once: in sums of another order, of
        which a token's codes are others than when it came.
        """
        model = super().assemble(make_block, dtype, device, attention)
        if self.kv_bits < FLOAT_BITS:
            blocks: Any = model.get_submodule(self.family.layers)
            use_packed_cache(model.get_submodule(self.family.base), blocks)
        return model

    def _prepared(self, block: nn.Module) -> nn.Module:
        for linear in pack_linears(block, self.family.linears, self.weights):
            linear.stays_unpacked = True  # to be measured, and as large as the float model at most
        return attach_sites(block, self.family, online_sites(self.layouts))

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        return packed_tensors(super()._tensors(prefix), self.weights.bits)


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused tensors of a block with each linear's codes and scales replaced by one float32 `weight`."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((CODES, SCALE, ZERO))}
    for name in tensors:
        if name.endswith(f".{CODES}"):
            linear = name.removesuffix(f".{CODES}")
            parts = {
                part: tensors[f"{linear}.{part}"] for part in (CODES, SCALE, ZERO) if f"{linear}.{part}" in tensors
            }
            plain[f"{linear}.weight"] = dequantize_weight(parts)
    return plain


def open_fused(run: Run, trust_remote_code: bool = False) -> FusedSource:
    """The fused model of `run`; UsageError if its fuse stage is not finished, or damaged."""
    stage = run.stage(STAGE)
    stage.require_done("flatq eval")
    stage.verify()
    original = open_source(locate(run.config.model.location), trust_remote_code=trust_remote_code)
    return FusedSource(original, SafetensorsCheckpoint(stage.path), run.config.recipe)
