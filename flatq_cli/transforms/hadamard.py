"""Orthogonal matrices that spread a direction over all channels: Hadamard matrices, and random ones where none is at
hand.

A Hadamard matrix has entries ±1 and orthogonal rows, so one outlier channel becomes the same magnitude in every
channel. Known sizes are 1, 2 and multiples of 4. Built here: Sylvester's powers of two, Paley's two constructions for
q prime or the square of a prime, and Kronecker products of those: every multiple of 4 up to 88, and most after.
Source: R. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard as sylvester
from torch import Tensor

Signs = NDArray[np.int8]


class Plan(NamedTuple):
    """How a size is built: by Paley over the field of `a` elements, by Sylvester at size `a`, or as size a ⊗ size b."""

    kind: Literal["sylvester", "paley1", "paley2", "product"]
    a: int
    b: int = 1


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` can build one."""
    return _plan(n) is not None


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix over √n: orthogonal, `[n, n]`, float64, every entry ±n^-½.

    Raises:
        ValueError: if none of the constructions here gives this size.
    """
    if not has_hadamard(n):
        raise ValueError(f"no Hadamard matrix of size {n} can be built here")
    matrix: Tensor = torch.from_numpy(_signs(n).astype(np.float64)) / n**0.5
    return matrix


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix, `[n, n]`, float64: Q of a Gaussian matrix's QR with diag(R) > 0."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed.contiguous()


def spreading_matrix(n: int, generator: torch.Generator) -> Tensor:
    """`hadamard(n)` where it exists, else `random_orthogonal(n, generator)`; `[n, n]`, float64."""
    return hadamard(n) if has_hadamard(n) else random_orthogonal(n, generator)


@lru_cache(maxsize=1024)
def _plan(n: int) -> Plan | None:
    if n < 1 or (n > 2 and n % 4):
        return None
    if n & (n - 1) == 0:
        return Plan("sylvester", n)
    if (n - 1) % 4 == 3 and _is_field(n - 1):
        return Plan("paley1", n - 1)
    if (n // 2 - 1) % 4 == 1 and _is_field(n // 2 - 1):
        return Plan("paley2", n // 2 - 1)
    for a in range(2, isqrt(n) + 1):
        if n % a == 0 and has_hadamard(a) and has_hadamard(n // a):
            return Plan("product", a, n // a)
    return None


def _signs(n: int) -> Signs:
    plan = _plan(n)
    assert plan is not None, n
    signs: Signs
    if plan.kind == "product":
        signs = np.kron(_signs(plan.a), _signs(plan.b))
        return signs
    if plan.kind == "sylvester":
        return np.asarray(sylvester(n), dtype=np.int8)
    q = plan.a
    core = _jacobsthal(q)
    if plan.kind == "paley1":  # I + S with S skew: [[0, 1], [-1, Q]]
        skew = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), core]])
        signs = (np.eye(n) + skew).astype(np.int8)
        return signs
    conference = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), core]])  # symmetric, C Cᵀ = q I
    pairs = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    signs = pairs.astype(np.int8)
    return signs


def _jacobsthal(q: int) -> Signs:
    """Q[a, b] = χ(a - b) over the field of q elements: +1 where a - b is a square, -1 where not, 0 where a = b.

    For q = p² the field is that of a + b√g with g no square of the prime field. The norm a² - g·b² of an element is a
    square of the prime field exactly when the element is one, because it is the element to the power p + 1.
    """
    core: Signs
    if _is_prime(q):
        core = _character(q)[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
        return core
    p = isqrt(q)
    character = _character(p)
    g = int(np.flatnonzero(character == -1)[0])
    high, low = np.divmod(np.arange(q), p)
    norm = (low[:, None] - low[None]) ** 2 - g * (high[:, None] - high[None]) ** 2
    core = character[norm % p]
    return core


def _character(p: int) -> Signs:
    """The Legendre symbol of 0 … p-1."""
    character = np.full(p, -1, dtype=np.int8)
    character[np.arange(1, p) ** 2 % p] = 1
    character[0] = 0
    return character


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def _is_field(q: int) -> bool:
    """Whether q is an odd prime or the square of one: the fields `_jacobsthal` knows."""
    return q % 2 == 1 and (_is_prime(q) or (isqrt(q) ** 2 == q and _is_prime(isqrt(q))))
