"""The balanced start: the transform that makes the quantization noise of both sides least, in closed form.

Rounding x T and W T^-T to a few bits adds noise to the output that grows with tr(Tᵀ Σx T) · tr(T⁻¹ Σw T⁻ᵀ), Σx the
second moment of the input and Σw that of the weights. It is least where both moments become the same matrix: T Tᵀ =
Σx⁻¹ # Σw, the geometric mean. A Kronecker form needs Kronecker moments, so Σx ≈ A ⊗ B and Σw ≈ C ⊗ D are fitted first
(maximum likelihood, by turns), then each pair is balanced. A Hadamard matrix on the right keeps the traces and
spreads what outliers remain. docs/method.md has the maths.

Everything here works on accumulated second moments, and nothing sees a token. What is as large as a moment keeps the
moment's dtype, which may be float32; what is as large as a factor is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatq_cli.transforms.hadamard import spreading_matrix

RIDGE = 1e-4  # of the mean diagonal, added to moments before they are inverted
MAX_LOG_DIAG = math.log(1e4)  # a diagonal beyond this means a dead channel, not a scale


def geometric_mean(a: Tensor, b: Tensor, ridge: float = 0.0) -> Tensor:
    """A # B = A^½ (A^-½ B A^-½)^½ A^½ of symmetric positive definite matrices, `[n, n]`, float64.

    `ridge` times the mean diagonal is added to each first. Symmetric in A and B; its square root equalises A⁻¹ and B.
    Source: R. Bhatia, "Positive Definite Matrices" (2007), ch. 4.
    """
    root, inverse_root = _roots(_ridged(a, ridge))
    return _mean_from_roots(root, inverse_root, _ridged(b, ridge))


def balanced_matrix(sigma_x: Tensor, sigma_w: Tensor, ridge: float = RIDGE) -> Tensor:
    """The symmetric T with T Tᵀ ∝ Σx⁻¹ # Σw and |det T| = 1; `[n, n]`, float64.

    Up to a factor, Tᵀ Σx T and T⁻¹ Σw T⁻ᵀ are then the same matrix, and the product of their traces is the least that
    any T gives.
    """
    root, inverse_root = _roots(_ridged(sigma_x, ridge))
    # A # B with A = Σx⁻¹, of which root and inverse root swap their places: nothing is inverted twice.
    values, vectors = torch.linalg.eigh(_mean_from_roots(inverse_root, root, _ridged(sigma_w, ridge)))
    logs = values.clamp(min=values[-1] * 1e-14).log() / 2
    balanced: Tensor = (vectors * (logs - logs.mean()).exp()) @ vectors.mT
    return balanced


def balanced_diag(second_x: Tensor, second_w: Tensor) -> Tensor:
    """The diagonal (mean W² / mean x²)^¼ of each channel, scaled to a geometric mean of 1; `[n]`, float64.

    A channel that is zero in the activations or in the weights gets 1: nothing depends on it.
    """
    second_x, second_w = second_x.double(), second_w.double()
    alive = (second_x > 0) & (second_w > 0)
    logs = torch.where(alive, second_w, 1.0).log() / 4 - torch.where(alive, second_x, 1.0).log() / 4
    logs = logs - logs.sum() / alive.sum().clamp(min=1)
    return torch.where(alive, logs.clamp(-MAX_LOG_DIAG, MAX_LOG_DIAG), 0.0).exp()


def kronecker_fit(
    sigma: Tensor, n1: int, n2: int, iterations: int = 10, ridge: float = RIDGE, tolerance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Fit Σ ≈ A ⊗ B by maximum likelihood of a matrix-normal distribution: given B, A has a closed form, and the
    reverse.

    Args:
        sigma: `[n1 * n2, n1 * n2]`, symmetric positive semidefinite; float32 or float64.
        iterations: at most this many rounds; fewer when no entry changes by more than `tolerance` of the largest.
        ridge: this times the mean diagonal is added to A and B, so that moments of few tokens stay invertible.
    Returns:
        A `[n1, n1]` with mean diagonal 1, B `[n2, n2]`; float64.
    Source: P. Dutilleul, "The MLE algorithm for the matrix normal distribution" (1999). Reads Σ twice a round and
    never copies it.
    """
    rows = sigma.contiguous().view(n1 * n2, n1, n2)  # rows[(i, j), k, l] = Σ[(i, j), (k, l)]
    a = torch.eye(n1, dtype=torch.float64, device=rows.device)
    b = _fit_right(rows, a, ridge)
    for _ in range(iterations):
        before = a, b
        a = _fit_left(rows, b, ridge)
        a = a / a.diagonal().mean()
        b = _fit_right(rows, a, ridge)
        if all((new - old).abs().max() <= tolerance * new.abs().max() for new, old in zip((a, b), before, strict=True)):
            break
    return a, b


def balanced_factors(
    sigma_x: Tensor,
    sigma_w: Tensor,
    n1: int,
    n2: int,
    *,
    generator: torch.Generator,
    iterations: int = 10,
    ridge: float = RIDGE,
) -> tuple[Tensor, Tensor]:
    """The balanced Kronecker factors of a site, each spread by a Hadamard matrix.

    Args:
        sigma_x: E[xᵀx] of the site's input, behind the diagonal if it has one. sigma_w: Σ WᵀW over the linears that
        read it, likewise. Both `[n, n]`, n = n1 · n2, float32 or float64; any scale.
        generator: on the CPU; draws an orthogonal matrix for a size that has no Hadamard matrix.
    Returns:
        left `[n1, n1]` and right `[n2, n2]` with |det| = 1; float64 on the device of the moments.
    """
    n = n1 * n2
    if sigma_x.shape != (n, n) or sigma_w.shape != (n, n):
        raise ValueError(f"second moments must be [{n}, {n}], not {tuple(sigma_x.shape)} and {tuple(sigma_w.shape)}")
    x_left, x_right = kronecker_fit(sigma_x, n1, n2, iterations, ridge)
    w_left, w_right = kronecker_fit(sigma_w, n1, n2, iterations, ridge)
    left, right = (
        balanced_matrix(x, w, ridge) @ spreading_matrix(x.shape[0], generator).to(x.device)
        for x, w in ((x_left, w_left), (x_right, w_right))
    )
    return left, right


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """Symmetrised, in float64, with `ridge` times the mean diagonal on it; the identity for a matrix that is zero."""
    matrix = (matrix + matrix.mT).double() / 2
    mean = matrix.diagonal().mean()
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.where(mean > 0, matrix + ridge * mean * eye, eye)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=values[-1] * 1e-14).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _mean_from_roots(root: Tensor, inverse_root: Tensor, b: Tensor) -> Tensor:
    """A # B, given A^½ and A^-½."""
    inner = inverse_root @ b @ inverse_root
    mean = root @ _roots((inner + inner.mT) / 2)[0] @ root
    return (mean + mean.mT) / 2


def _fit_left(rows: Tensor, b: Tensor, ridge: float) -> Tensor:
    """A[i, k] = (1/n2) Σ_jl (B⁻¹)[j, l] Σ[(i, j), (k, l)]."""
    _, n1, n2 = rows.shape
    inverse = torch.linalg.inv(b).to(rows.dtype).repeat(n1, 1).unsqueeze(-1)  # [(i, j), l, 1]
    return _ridged(torch.bmm(rows, inverse).view(n1, n2, n1).mean(1), ridge)


def _fit_right(rows: Tensor, a: Tensor, ridge: float) -> Tensor:
    """B[j, l] = (1/n1) Σ_ik (A⁻¹)[i, k] Σ[(i, j), (k, l)]."""
    _, n1, n2 = rows.shape
    inverse = torch.linalg.inv(a).to(rows.dtype).repeat_interleave(n2, 0).unsqueeze(1)  # [(i, j), 1, k]
    return _ridged(torch.bmm(inverse, rows).view(n1, n2, n2).mean(0), ridge)
