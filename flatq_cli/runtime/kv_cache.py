"""The packed KV cache of a loaded export: keys and values are stored as the codes that fake-quant would round them to.

transformers hands post-RoPE keys and values to `cache.update`, and what that returns straight to the attention
function. So a `PackedLayer` passes each new token through the block's `key` and `value` sites once, when it arrives,
and keeps packed codes, scales and zero points; `update` returns `PackedStates`, a light reference to them, and
`flatq_attention` turns into numbers what it has to read. Keys stand in the basis of the key transform, where the query
meets them. The codes are those of `quantize`, so a model with this cache gives what the fake-quant model gives with a
stock one.

The layout is that of the CUDA kernels (`kernels/kv_quant.py`): for K and for V, codes uint8 `[batch, kv_heads,
capacity, bytes]`, scale float32 and zero uint8 `[batch, kv_heads, capacity]`; no zero where codes are symmetric. At 4
bits a row takes head_dim / 2 + 5 bytes in place of 2 · head_dim.

Here is the cache that grows. `static_cache.py` has the one that does not, for CUDA graphs and `torch.compile`, and
`pack_cache.py` puts both in the place of transformers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from flatq_cli.quantization.packing import pack, unpack
from flatq_cli.quantization.quantizers import quantize
from flatq_cli.runtime.backends.base import ordinary_tensors
from flatq_cli.transforms.kronecker import kronecker_matmul

if TYPE_CHECKING:
    from flatq_cli.runtime.sites import OnlineSite

STEP = 64
"""Rows by which capacities are rounded up. The kernels want each head's codes to begin at a multiple of 16 bytes."""


def capacity_for(tokens: int) -> int:
    """Rows to allocate for `tokens`: a 32nd more, rounded up to `STEP`.

    A full store moves, so an appended token costs 32 rows of copying on average however long the text is: less than
    attention, which reads all of them at every step, by the time that it counts. At 2,048 tokens at most 3% are unused.
    """
    return -(-(tokens + tokens // 32) // STEP) * STEP


@dataclass(frozen=True)
class PackedStates:
    """Keys or values as a packed layer's `update` returns them: transformed and quantized, rows `start` to `end` of a
    store.

    Args:
        codes: uint8 `[batch, kv_heads, capacity, bytes]`. scale: float32 `[batch, kv_heads, capacity]`.
        zero: uint8 `[batch, kv_heads, capacity]`; None: symmetric codes.
        width: head_dim.
        lengths: int32 `[batch]`, on the device: of the rows from 0 to `end`, so many of each sequence are in use, which
            the host does not know (`static_cache.py`); None: all from `start` to `end` are.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    start: int
    end: int
    bits: int
    width: int
    lengths: Tensor | None = None

    def seen(self, tokens: int, mask: Tensor | None) -> PackedStates:
        """The rows that the newest `tokens` attend to.

        Args:
            mask: as sdpa takes it. Of rows whose number only the device knows it says which are seen; without a mask
                they are those of a cache that was empty before (transformers gives every other call a mask).
        """
        if self.lengths is None:
            return self
        end, lengths = (tokens, None) if mask is None else (mask.shape[-1], self.lengths)
        return PackedStates(self.codes, self.scale, self.zero, 0, end, self.bits, self.width, lengths)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers, `[batch, kv_heads, end - start, width]`, computed in float32 and cast to `dtype`."""
        rows = slice(self.start, self.end)
        codes = unpack(self.codes[:, :, rows], self.bits, self.width, symmetric=self.zero is None)
        numbers = codes.to(torch.float32)
        if self.zero is not None:
            numbers.sub_(self.zero[:, :, rows, None])
        return numbers.mul_(self.scale[:, :, rows, None]).to(dtype)


class PackedRows:
    """The keys or the values of a block: packed rows that grow at the end and may be forgotten at both.

    Attributes:
        parts: codes, scale and, for asymmetric codes, zero, as in `PackedStates`; empty until the first append.
        start, end: the rows in use; the others mean nothing.
    """

    def __init__(self, site: OnlineSite) -> None:
        self.site = site
        self.parts: tuple[Tensor, ...] = ()
        self.start = self.end = 0

    def __len__(self) -> int:
        return self.end - self.start

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedRows:
        """A copy with tensors of its own. The site stays the model's: the copy of a cache is for the same model."""
        twin = copy.copy(self)
        twin.rearrange(torch.clone)
        return twin

    @property
    def capacity(self) -> int:
        """Rows that are allocated."""
        return self.parts[0].shape[2] if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @torch.no_grad()
    def append(self, x: Tensor) -> None:
        """Transform, quantize and store new rows `x`: `[batch, kv_heads, tokens, head_dim]`, any float dtype."""
        if self.end + x.shape[2] > self.capacity:
            self._move(capacity_for(len(self) + x.shape[2]), self.parts or packed_rows(self.site, x[:, :, :1]))
        end = self.end + x.shape[2]
        if not self.site.backend.store(self.site, x, self.parts, self.end):
            for part, rows in zip(self.parts, packed_rows(self.site, x), strict=True):
                part[:, :, self.end : end] = rows
        self.end = end

    def last(self, tokens: int, width: int) -> PackedStates:
        """The last `tokens` rows, or as many as there are, without a copy; `width` is head_dim."""
        codes, scale, *zero = self.parts
        start = max(self.start, self.end - tokens)
        return PackedStates(codes, scale, zero[0] if zero else None, start, self.end, self.site.bits, width)

    def drop_last(self, tokens: int) -> None:
        """Forget the newest rows."""
        self.end -= tokens

    def keep_last(self, tokens: int) -> None:
        """Forget the oldest rows, and free what a long prompt took if that is more than twice what stays."""
        self.start = max(self.start, self.end - tokens)
        if self.capacity > 2 * capacity_for(len(self)):
            self._move(capacity_for(len(self)), self.parts)

    def clear(self) -> None:
        """Forget and free everything."""
        self.parts, self.start, self.end = (), 0, 0

    def rearrange(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Put `pick(part)` in the place of every part: other sequences along the first axis."""
        with ordinary_tensors():
            self.parts = tuple(pick(part) for part in self.parts)

    def _move(self, capacity: int, like: Sequence[Tensor]) -> None:
        """Move the rows to the beginning of new tensors, with the sizes of `like` but for `capacity`."""
        with ordinary_tensors():
            fresh = tuple(part.new_zeros(*part.shape[:2], capacity, *part.shape[3:]) for part in like)
            for part, old in zip(fresh, self.parts, strict=False):
                part[:, :, : len(self)] = old[:, :, self.start : self.end]
        self.parts, self.start, self.end = fresh, 0, len(self)


def packed_rows(site: OnlineSite, x: Tensor) -> tuple[Tensor, ...]:
    """Rows `[batch, kv_heads, tokens, head_dim]` as `site` would fake-quantize them: codes, scale[, zero].

    Returns:
        codes uint8 `[batch, kv_heads, tokens, bytes]`, scale float32 and zero uint8 `[batch, kv_heads, tokens]`. A row
        with a NaN or an infinity has codes of zero and a scale that is not finite, and so is read as NaN.
    """
    if site.right is not None:
        x = kronecker_matmul(x, None, site.right.to(x.dtype))
    codes, scale, zero = quantize(x, site.bits, site.symmetric, site.clip)
    parts = pack(codes.nan_to_num(0), site.bits), scale.squeeze(-1).float()
    return parts if zero is None else (*parts, zero.nan_to_num(0).squeeze(-1).to(torch.uint8))


class PackedLayer(DynamicLayer):  # type: ignore[misc]
    """One block's part of a `DynamicCache`, packed; with a window, only the rows that a later token sees are kept.

    Behaves as transformers' `DynamicLayer` and `DynamicSlidingWindowLayer` do, but `keys` and `values` stay None:
    what is stored is `key_rows` and `value_rows`.

    Args:
        key, value: the block's sites; below 16 bits.
        sliding_window: keys that a query sees at most, its own included; None: all.
    """

    def __init__(self, key: OnlineSite, value: OnlineSite, sliding_window: int | None = None) -> None:
        super().__init__()
        self.key_rows, self.value_rows = PackedRows(key), PackedRows(value)
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.cumulative_length = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return self.key_rows.nbytes + self.value_rows.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note where the states live; rows are allocated when they come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedStates, PackedStates]:
        """Append post-RoPE keys and values of new tokens.

        Args:
            key_states, value_states: `[batch, kv_heads, tokens, head_dim]`.
        Returns:
            What the new tokens attend to, for `flatq_attention`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_rows.append(key_states)
        self.value_rows.append(value_states)
        tokens = key_states.shape[-2]
        self.cumulative_length += tokens
        seen = len(self.key_rows) if self.sliding_window is None else self.sliding_window - 1 + tokens
        states = (
            self.key_rows.last(seen, key_states.shape[-1]),
            self.value_rows.last(seen, value_states.shape[-1]),
        )
        if not self.record_past:
            self._forget()
        return states

    def _forget(self) -> None:
        """Drop the rows that no later token sees."""
        if self.sliding_window is not None:
            self.key_rows.keep_last(self.sliding_window - 1)
            self.value_rows.keep_last(self.sliding_window - 1)

    def get_seq_length(self) -> int:
        """Tokens of the text so far, those that a window has left behind included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `query_length` tokens see, and the position of the first."""
        window = self.sliding_window
        first = 0 if window is None else max(self.cumulative_length - window + 1, 0)
        return self.cumulative_length - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 where there is none."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Let `crop` decide what a window forgets: it may have to go back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, and what a window need not keep.

        Args:
            tokens_to_remove: minus their number; a positive number is the length to keep, as earlier versions say it.
        Raises:
            RuntimeError: the rows to go back to have left the window and were not recorded.
        """
        length = self.cumulative_length
        removed = min(-tokens_to_remove, length) if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if not removed and not self.record_past:
            return
        needed = length - removed
        if self.sliding_window is not None:
            needed = min(needed, self.sliding_window - 1)
        if len(self.key_rows) - removed < needed:
            raise RuntimeError(
                f"the cache cannot go back {removed} tokens: a sliding window of {self.sliding_window} has dropped "
                "what was before them; call activate_past_recording() on the cache first"
            )
        self.key_rows.drop_last(removed)
        self.value_rows.drop_last(removed)
        self.cumulative_length -= removed
        self._forget()

    def reset(self) -> None:
        """Forget and free everything."""
        self.key_rows.clear()
        self.value_rows.clear()
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequence `beam_idx[b]` for sequence b."""
        self._rearrange(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._rearrange(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._rearrange(lambda part: part[indices])

    def _rearrange(self, pick: Callable[[Tensor], Tensor]) -> None:
        self.key_rows.rearrange(pick)
        self.value_rows.rearrange(pick)
