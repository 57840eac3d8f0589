"""Modules whose tensors keep their dtype: `.to(torch.bfloat16)` moves them and casts nothing.

Scales, clips and online matrices are part of what codes mean (docs/format.md): they are float32 in every model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


class OwnDtype(nn.Module):
    """A module that follows `.to(device)` and ignores `.to(dtype)`, `.half()` and `.bfloat16()`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.cuda`, `.bfloat16`, … run over every tensor: follow to another device, not to another dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-any-return,no-untyped-call]
