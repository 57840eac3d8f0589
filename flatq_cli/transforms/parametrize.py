"""Trainable forms of an invertible matrix.

`DirectMatrix` is the matrix itself: the fewest operations a step, and it may go anywhere. `SvdMatrix` is U diag(s) Vᵀ
with U and V kept orthogonal by Cayley maps, as the paper trains: the inverse is free, and only s can make it ill
conditioned. `OrthogonalMatrix` is one such factor alone, its own inverse transpose. All are
float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from flatq_cli.transforms.hadamard import random_orthogonal
from flatq_cli.transforms.kronecker import Invertible, invertible

Parametrization = Literal["direct", "svd", "orthogonal"]


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


class OrthogonalMatrix(MatrixModule):
    """An orthogonal matrix Q = Q₀ C(A) that starts at `init` `[n, n]`, Q₀; A is free, skew-symmetric, and starts at 0.

    Q⁻ᵀ = Q: both faces are one tensor, and the one solve a step is that of the Cayley map C(A) = (I - A/2)⁻¹ (I + A/2).
    det C(A) = 1: what starts as a rotation stays one.

    Raises:
        ValueError: if `init` is not orthogonal.
    Source: SpinQuant (arXiv 2405.16406) trains such matrices, by Cayley SGD.
    """

    base: Tensor

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        exact = init.detach().double()
        eye = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        if not torch.allclose(exact @ exact.mT, eye, rtol=0, atol=1e-5):
            raise ValueError("an orthogonal form starts at an orthogonal matrix, and this one is not")
        self.register_buffer("base", exact.to(torch.float32))
        self.skew = nn.Parameter(torch.zeros_like(self.base))  # below its diagonal; the rest is never read

    def invertible(self) -> Invertible:
        with torch.autocast(self.skew.device.type, enabled=False):  # a rounded product would not be orthogonal
            lower = self.skew.tril(-1)
            half = (lower - lower.mT) / 2
            eye = torch.eye(len(half), dtype=half.dtype, device=half.device)
            matrix = self.base @ torch.linalg.solve(eye - half, eye + half)
        return Invertible(matrix, matrix)


def make_matrix(kind: Parametrization, init: Tensor) -> MatrixModule:
    """A trainable matrix of the given form that starts at `init`, `[n, n]` and invertible.

    Raises:
        ValueError: the form is `orthogonal` and `init` is not.
    """
    forms: dict[Parametrization, type[DirectMatrix | SvdMatrix | OrthogonalMatrix]] = {
        "direct": DirectMatrix,
        "svd": SvdMatrix,
        "orthogonal": OrthogonalMatrix,
    }
    return forms[kind](init)
