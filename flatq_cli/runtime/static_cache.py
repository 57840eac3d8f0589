"""A packed KV cache of a fixed size: what a CUDA graph or a compiled decode step can write to, again and again.

A captured step repeats its launches on the same memory, and a compiled one is compiled again when a Python number that
it has seen changes. So the host knows nothing of this cache that a token changes: the rows are allocated once, for
`max_cache_len` tokens, and how many are in use stands on the device, where the kernel that writes new rows, and the one
that attends, read it. The mask, which transformers makes on the device from the same number, says which rows are seen.

It takes the place of transformers' `StaticLayer`, keeps its manners, and holds the codes of `kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from flatq_cli.runtime.backends.base import ordinary_tensors
from flatq_cli.runtime.kv_cache import PackedStates, packed_rows

if TYPE_CHECKING:
    from flatq_cli.runtime.sites import OnlineSite

STEP = 16
"""Rows by which capacities are rounded up: the kernels want each head's codes to begin at a multiple of 16 bytes."""


class StaticRows:
    """The keys or the values of a block in rows that stay where they are.

    Attributes:
        parts: codes, scale and, for asymmetric codes, zero, as in `PackedStates`; empty until `allocate`. Rows that
            nothing was written to are 0.
    """

    def __init__(self, site: OnlineSite, rows: int) -> None:
        self.site, self.rows = site, rows
        self.width = 0
        self.parts: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticRows:
        """A copy with tensors of its own. The site stays the model's: the copy of a cache is for the same model."""
        twin = StaticRows(self.site, self.rows)
        twin.width = self.width
        with ordinary_tensors():
            twin.parts = tuple(part.clone() for part in self.parts)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    def allocate(self, like: Tensor) -> None:
        """Make room for rows like `like`, `[batch, kv_heads, any, head_dim]`."""
        capacity = -(-self.rows // STEP) * STEP
        with ordinary_tensors():
            one = packed_rows(self.site, like.new_zeros(*like.shape[:2], 1, like.shape[3]))
            self.parts = tuple(part.new_zeros(*part.shape[:2], capacity, *part.shape[3:]) for part in one)
        self.width = like.shape[3]

    @torch.no_grad()
    def write(self, x: Tensor, lengths: Tensor, positions: Tensor) -> None:
        """Transform, quantize and store `x`, `[batch, kv_heads, tokens, head_dim]`, any float dtype.

        Args:
            lengths: int32 `[batch]`, the row of each sequence's first token. positions: int64 `[tokens]`, the same as
                the rows of all tokens.
        """
        if not self.site.backend.store_at(self.site, x, self.parts, lengths):
            for part, rows in zip(self.parts, packed_rows(self.site, x), strict=True):
                part.index_copy_(2, positions, rows)

    def states(self, lengths: Tensor) -> PackedStates:
        """All rows, without a copy; those beyond `lengths` mean nothing."""
        codes, scale, *zero = self.parts
        zeros = zero[0] if zero else None
        return PackedStates(codes, scale, zeros, 0, self.rows, self.site.bits, self.width, lengths)


class PackedStaticLayer(StaticLayer):  # type: ignore[misc]
    """One block's part of a `StaticCache`, packed. Behaves as `StaticLayer` does, but `keys` and `values` stay None:
    what is stored is `key_rows` and `value_rows`.

    Args:
        key, value: the block's sites; below 16 bits.
        max_cache_len: tokens that there is room for.
        is_sliding: whether the layer it replaces has a window, which is then not shorter than `max_cache_len`.
    """

    def __init__(self, key: OnlineSite, value: OnlineSite, max_cache_len: int, is_sliding: bool = False) -> None:
        super().__init__(max_cache_len)
        self.key_rows, self.value_rows = StaticRows(key, max_cache_len), StaticRows(value, max_cache_len)
        self.is_sliding = is_sliding

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return self.key_rows.nbytes + self.value_rows.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, like the states, and tell `torch.compile` that it stays where it is."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.key_rows.allocate(key_states)
        self.value_rows.allocate(value_states)
        with ordinary_tensors():
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.lengths = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in self._tensors():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.key_rows.parts, *self.value_rows.parts, self.cumulative_length, self.lengths)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedStates, PackedStates]:
        """Store post-RoPE keys and values of new tokens.

        Args:
            key_states, value_states: `[batch, kv_heads, tokens, head_dim]`.
        Returns:
            All rows, for `flatq_attention`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        positions = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.key_rows.write(key_states, self.lengths, positions)
        self.value_rows.write(value_states, self.lengths, positions)
        # In place: a captured step goes on from what the last one left here.
        self.cumulative_length.add_(tokens)
        self.lengths.add_(tokens)
        return self.key_rows.states(self.lengths), self.value_rows.states(self.lengths)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is minus their number."""
        super().crop(tokens_to_remove)
        self.lengths.sub_(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        if self.is_initialized:
            for tensor in self._tensors():
                tensor.zero_()

    def offload(self) -> None:
        """A packed layer stays where it is."""

    def prefetch(self) -> None:
        """A packed layer is where it was."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequence `beam_idx[b]` for sequence b, in place."""
        if self.is_initialized:
            self._rearrange(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def _rearrange(self, pick: Callable[[Tensor], Tensor]) -> None:
        for part in (*self.key_rows.parts, *self.value_rows.parts):
            part.copy_(pick(part))
