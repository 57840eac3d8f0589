"""Trainable forms of an invertible matrix.

`DirectMatrix` is the matrix itself: the fewest operations a step, and it may go anywhere. `SvdMatrix` is U diag(s) Vᵀ
with U and V kept orthogonal by Cayley maps, as the paper trains: the inverse is free, and only s can make it ill
conditioned. Both are float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from flatq_cli.transforms.hadamard import random_orthogonal
from flatq_cli.transforms.kronecker import Invertible, invertible


class MatrixModule(nn.Module):
    """A module that holds the parameters of one invertible matrix."""

    def invertible(self) -> Invertible:
        """The matrix and its inverse transpose, `[n, n]` float32, differentiable in the parameters."""
        raise NotImplementedError


class DirectMatrix(MatrixModule):
    """A free matrix that starts at `init` `[n, n]`; its inverse by LU."""

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(init.detach().to(torch.float32, copy=True))

    def invertible(self) -> Invertible:
        return invertible(self.matrix)


class SvdMatrix(MatrixModule):
    """U diag(s) Vᵀ that starts at `init` `[n, n]`, any invertible matrix.

    U = U₀ C(A), with C the Cayley map of a free skew-symmetric A that starts at 0, and V likewise: the Cayley map
    alone reaches no matrix with an eigenvalue -1, U₀ C(A) starts anywhere.
    Source: FlatQuant (arXiv 2410.09426), §3.1; trivializations: arXiv 1909.09501.
    """

    u: Tensor
    v: Tensor

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(init.detach().double())
        self._set(u, s, vh.mT)

    @classmethod
    def from_factors(cls, u: Tensor, s: Tensor, v: Tensor) -> SvdMatrix:
        """Start at u diag(s) vᵀ: `[n, n]` orthogonal, `[n]` non-zero, `[n, n]` orthogonal."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(u, s, v)
        return module

    @classmethod
    def published_start(cls, size: int, generator: torch.Generator) -> SvdMatrix:
        """The start of the paper's published code: U = C(tril(Q) - tril(Q)ᵀ), Q random orthogonal, V alike, s = 1.

        There the Cayley map has no U₀ (`use_trivialization=False`), so U is a moderate rotation and not Q itself.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        draw = [random_orthogonal(size, generator) for _ in range(2)]
        module._set(draw[0], torch.ones(size), draw[1], based=False)
        return module

    def _set(self, u: Tensor, s: Tensor, v: Tensor, *, based: bool = True) -> None:
        self.s = nn.Parameter(s.detach().to(torch.float32, copy=True))
        for name, value in (("u", u), ("v", v)):
            self.register_parameter(name, nn.Parameter(value.detach().to(torch.float32, copy=True)))
            orthogonal(self, name, orthogonal_map="cayley", use_trivialization=based)

    def invertible(self) -> Invertible:
        with torch.autocast(self.s.device.type, enabled=False):  # both products must stay each other's inverse
            u, v = self.u, self.v
            return Invertible((u * self.s) @ v.mT, (u / self.s) @ v.mT)


def make_matrix(kind: Literal["direct", "svd"], init: Tensor) -> MatrixModule:
    """A trainable matrix of the given form that starts at `init`, `[n, n]` and invertible."""
    return DirectMatrix(init) if kind == "direct" else SvdMatrix(init)
