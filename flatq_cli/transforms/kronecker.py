"""Transforms: invertible linear maps that flatten what a linear layer reads.

A transform has two faces. `apply(x)` maps an activation, `apply_inverse_transpose(w)` maps the rows of a weight, and
the layer's output does not change: (x T)(w T^-T)ᵀ = x wᵀ. T = diag(d) (L ⊗ R), so that x T costs 2·n·(n1 + n2) FLOP a
row and not 2·n². Training sees parameters (`parametrize.py`); everything after it, and everything here, sees plain
matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Invertible(NamedTuple):
    """A square matrix and the transpose of its inverse, both `[n, n]`."""

    matrix: Tensor
    inverse_transpose: Tensor


def invertible(matrix: Tensor) -> Invertible:
    """Pair `[n, n]` `matrix` with its inverse transpose, in its own dtype; differentiable.

    Raises:
        torch.linalg.LinAlgError: if the matrix is singular.
    """
    return Invertible(matrix, torch.linalg.inv(matrix).mT.contiguous())


def kronecker_matmul(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Multiply the rows of `x` by `left ⊗ right` without forming the product.

    Args:
        x: `[..., n1 * n2]`, any float dtype.
        left: `[n1, n1]`. right: `[n2, n2]`; both of x's dtype and device. None is the identity of the size that is
        left.
    Returns:
        `[..., n1 * n2]`: row-major reshape r of a row to `[n1, n2]`, then `leftᵀ r right`.
    Raises:
        ValueError: if n1 * n2 differs from the last size of `x`.
    Source: FlatQuant (arXiv 2410.09426), eq. 3. Cost 2·n1·n2·(n1 + n2) FLOP a row.
    """
    n1, n2 = _sizes(x.shape[-1], left, right)
    result = x
    if right is not None:
        result = result.reshape(-1, n2) @ right
    if left is not None:
        # A batch of small products with one broadcast operand (batch stride 0): nothing is transposed or copied.
        # Measured on one CPU core, 4096 rows of 32·48: 7 ms, where forms that fold the batch into one large matmul
        # take 13 to 44 ms.
        rows = result.reshape(-1, n1, n2)
        result = torch.bmm(left.mT.expand(rows.shape[0], n1, n1), rows)
    return result.reshape(x.shape)


@dataclass(frozen=True)
class Transform:
    """T = diag(diag) (left ⊗ right) of a site that is `width` wide. A part that is None is the identity.

    Args:
        width: n.
        left: of size n1. right: of size n2, n1 · n2 = n. diag: `[n]`.
    Raises:
        ValueError: if the sizes do not multiply to the width.
    """

    width: int
    left: Invertible | None = None
    right: Invertible | None = None
    diag: Tensor | None = None

    def __post_init__(self) -> None:
        _sizes(self.width, self.left and self.left.matrix, self.right and self.right.matrix)
        if self.diag is not None and self.diag.shape != (self.width,):
            raise ValueError(f"a diagonal of shape {tuple(self.diag.shape)} does not fit a width of {self.width}")

    @property
    def sizes(self) -> tuple[int, int]:
        """(n1, n2)."""
        return _sizes(self.width, self.left and self.left.matrix, self.right and self.right.matrix)

    def apply(self, x: Tensor) -> Tensor:
        """X T for rows `[..., width]`; in x's dtype."""
        return self.apply_online(x if self.diag is None else x * self.diag.to(x.dtype))

    def apply_online(self, x: Tensor) -> Tensor:
        """X (L ⊗ R): what is left to do when `diag` is folded into whatever produces x."""
        left = None if self.left is None else self.left.matrix.to(x.dtype)
        right = None if self.right is None else self.right.matrix.to(x.dtype)
        return kronecker_matmul(x, left, right)

    def apply_inverse_transpose(self, w: Tensor) -> Tensor:
        """W T^-T for rows `[..., width]` of a weight; in w's dtype."""
        scaled = w if self.diag is None else w / self.diag.to(w.dtype)
        left = None if self.left is None else self.left.inverse_transpose.to(w.dtype)
        right = None if self.right is None else self.right.inverse_transpose.to(w.dtype)
        return kronecker_matmul(scaled, left, right)


def transform_from_matrices(
    width: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
    diag: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Transform:
    """A transform from `[n1, n1]`, `[n2, n2]` and `[width]`; the inverses are computed in `dtype` (None: their own)."""

    def pair(matrix: Tensor | None) -> Invertible | None:
        return None if matrix is None else invertible(matrix.to(dtype or matrix.dtype))

    return Transform(width, pair(left), pair(right), None if diag is None else diag.to(dtype or diag.dtype))


def _sizes(width: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int]:
    """(n1, n2) of a Kronecker product of these factors; ValueError if it is not `width` wide."""
    for matrix in (left, right):
        if matrix is not None and (matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]):
            raise ValueError(f"a factor of a Kronecker product must be a square matrix, not {tuple(matrix.shape)}")
    n1 = left.shape[0] if left is not None else width // right.shape[0] if right is not None else 1
    n2 = right.shape[0] if right is not None else width // n1
    if n1 * n2 != width:
        factors = " ⊗ ".join(str(matrix.shape[0]) for matrix in (left, right) if matrix is not None)
        raise ValueError(f"a Kronecker product {factors} does not fit a width of {width}")
    return n1, n2
