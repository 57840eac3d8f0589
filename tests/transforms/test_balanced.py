import numpy as np
import pytest
import scipy.linalg
import torch

from flatq_cli.transforms.balanced import (
    balanced_diag,
    balanced_factors,
    balanced_matrix,
    geometric_mean,
    kronecker_fit,
)
from flatq_cli.transforms.hadamard import hadamard, random_orthogonal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(n, seed=0, spread=1.0):
    """A moment with correlated channels whose scales are log-normal: a few of them are outliers."""
    g = generator(seed)
    mixed = torch.randn(4 * n, n, generator=g).double() @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g)).double()
    rows = mixed * (spread * torch.randn(n, generator=g)).exp()
    return rows.T @ rows / len(rows)


def noise(transform, sigma_x, sigma_w):
    """tr(Tᵀ Σx T) · tr(T⁻¹ Σw T⁻ᵀ): what the quantization noise of both sides grows with."""
    inverse = torch.linalg.inv(transform)
    return (torch.trace(transform.T @ sigma_x @ transform) * torch.trace(inverse @ sigma_w @ inverse.T)).item()


def balanced(sigma_x, sigma_w, n1, n2, *, with_diag, **options):
    """The balanced transform, as a dense matrix: the diagonal, then the factors for what is left behind it."""
    diag = torch.ones(n1 * n2).double()
    if with_diag:
        diag = balanced_diag(sigma_x.diagonal(), sigma_w.diagonal())
    behind = diag[:, None] * sigma_x * diag, sigma_w / diag / diag[:, None]
    left, right = balanced_factors(*behind, n1, n2, generator=generator(), **options)
    return diag[:, None] * torch.kron(left, right)


def least_noise(sigma_x, sigma_w):
    """The least over all T: tr((Σx Σw)^½)²."""
    eigenvalues = np.linalg.eigvals((sigma_x @ sigma_w).numpy())
    return np.sqrt(eigenvalues.real).sum() ** 2


def test_the_geometric_mean_of_commuting_matrices_is_the_root_of_their_product():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 1.0]).double()
    torch.testing.assert_close(geometric_mean(torch.diag(a), torch.diag(b)), torch.diag((a * b).sqrt()))


def test_the_geometric_mean_solves_its_riccati_equation_and_is_symmetric_in_its_arguments():
    a, b = spd(7, 0), spd(7, 1)
    mean = geometric_mean(a, b)
    torch.testing.assert_close(mean @ torch.linalg.inv(a) @ mean, b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean, geometric_mean(b, a), rtol=1e-6, atol=1e-8)


def test_the_geometric_mean_agrees_with_scipy():
    a, b = spd(6, 2).numpy(), spd(6, 3).numpy()
    reference = a @ scipy.linalg.sqrtm(np.linalg.inv(a) @ b)
    np.testing.assert_allclose(geometric_mean(torch.from_numpy(a), torch.from_numpy(b)), reference.real, rtol=1e-6)


def test_balancing_makes_both_moments_the_same_matrix():
    sigma_x, sigma_w = spd(9, 0), spd(9, 1)
    matrix = balanced_matrix(sigma_x, sigma_w, ridge=0.0)
    inverse = torch.linalg.inv(matrix)
    x, w = matrix.T @ sigma_x @ matrix, inverse @ sigma_w @ inverse.T
    torch.testing.assert_close(x / torch.trace(x), w / torch.trace(w), rtol=1e-6, atol=1e-9)
    assert abs(torch.linalg.slogdet(matrix).logabsdet) < 1e-9
    torch.testing.assert_close(matrix, matrix.T)


def test_no_matrix_has_less_noise_than_the_balanced_one():
    sigma_x, sigma_w = spd(8, 2), spd(8, 3)
    balanced = balanced_matrix(sigma_x, sigma_w, ridge=0.0)
    least = noise(balanced, sigma_x, sigma_w)
    assert least == pytest.approx(least_noise(sigma_x, sigma_w), rel=1e-9)
    for seed in range(20):
        nearby = balanced + 0.05 * torch.randn(8, 8, generator=generator(seed)).double()
        assert noise(nearby, sigma_x, sigma_w) > least


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_moments_of_few_tokens_still_give_an_invertible_matrix(rank):
    rows = torch.randn(rank, 8, generator=generator()).double()
    matrix = balanced_matrix(rows.T @ rows, spd(8))
    assert torch.isfinite(matrix).all()
    assert torch.linalg.cond(matrix) < 1e3


def test_the_diagonal_balances_each_channel():
    second_x, second_w = torch.rand(10, generator=generator()).double(), torch.rand(10, generator=generator(1)).double()
    d = balanced_diag(second_x, second_w)
    after = second_x * d**2 / (second_w / d**2)
    torch.testing.assert_close(after, after[:1].expand(10))
    assert d.log().mean().abs() < 1e-12


def test_dead_channels_leave_the_diagonal_at_one_and_the_others_alone():
    second_x, second_w = torch.tensor([0.0, 1.0, 16.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(balanced_diag(second_x, second_w), torch.tensor([1, 2**0.5, 0.5**0.5, 1]).double())
    assert torch.equal(balanced_diag(torch.zeros(3), torch.zeros(3)), torch.ones(3).double())


@pytest.mark.parametrize(("n1", "n2"), [(3, 4), (4, 3), (1, 6), (6, 1)])
def test_a_kronecker_moment_is_recovered(n1, n2):
    a, b = spd(n1, 0), spd(n2, 1)
    fitted_a, fitted_b = kronecker_fit(torch.kron(a, b), n1, n2, ridge=0.0)
    assert fitted_a.shape == (n1, n1)
    assert fitted_b.shape == (n2, n2)
    torch.testing.assert_close(torch.kron(fitted_a, fitted_b), torch.kron(a, b), rtol=1e-6, atol=1e-9)
    assert fitted_a.diagonal().mean().item() == pytest.approx(1)


def test_the_fit_is_the_maximum_likelihood_one():
    n1, n2 = 3, 5
    sigma = spd(n1 * n2, 4)
    a, b = kronecker_fit(sigma, n1, n2, iterations=200, ridge=0.0, tolerance=1e-12)

    def loss(a, b):  # of a matrix-normal distribution, per sample
        trace = torch.trace(torch.linalg.inv(torch.kron(a, b)) @ sigma)
        return (n2 * torch.logdet(a) + n1 * torch.logdet(b) + trace).item()

    # The definition, by loops over rows and columns.
    inverse = torch.linalg.inv(b)
    blocks = sigma.view(n1, n2, n1, n2)
    expected = torch.stack(
        [torch.stack([(inverse * blocks[i, :, k, :]).sum() / n2 for k in range(n1)]) for i in range(n1)]
    )
    torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-8)
    for seed in range(10):
        bend_a = torch.eye(n1).double() + 0.02 * torch.randn(n1, n1, generator=generator(seed)).double()
        bend_b = torch.eye(n2).double() + 0.02 * torch.randn(n2, n2, generator=generator(seed + 50)).double()
        assert loss(bend_a @ a @ bend_a.T, bend_b @ b @ bend_b.T) > loss(a, b)


def test_a_moment_of_a_few_tokens_is_fitted_by_invertible_factors():
    rows = torch.randn(2, 12, generator=generator()).double()
    a, b = kronecker_fit(rows.T @ rows, 3, 4)
    assert torch.linalg.eigvalsh(a).min() > 0
    assert torch.linalg.eigvalsh(b).min() > 0


@pytest.mark.parametrize("with_diag", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_balanced_start_has_less_noise_than_the_usual_ones(seed, with_diag):
    n1, n2 = 4, 6
    n = n1 * n2
    # Close to Kronecker products, as measured moments are, but not equal to one.
    sigma_x = torch.kron(spd(n1, seed), spd(n2, seed + 10)) * (1 + 0.1 * spd(n, seed + 20, spread=0.1))
    sigma_w = torch.kron(spd(n1, seed + 30), spd(n2, seed + 40)) + 0.1 * spd(n, seed + 50, spread=0.1)
    found = noise(balanced(sigma_x, sigma_w, n1, n2, with_diag=with_diag), sigma_x, sigma_w)
    smooth = (sigma_w.diagonal() / sigma_x.diagonal()) ** 0.25
    assert found < noise(torch.eye(n).double(), sigma_x, sigma_w)
    assert found < noise(torch.diag(smooth), sigma_x, sigma_w)
    assert found < noise(torch.kron(hadamard(4), random_orthogonal(6, generator())), sigma_x, sigma_w)
    assert found >= least_noise(sigma_x, sigma_w)


def test_the_diagonal_helps_where_single_channels_stand_out():
    sigma_x, sigma_w = spd(24, 1, spread=2.0), spd(24, 2, spread=0.1)
    with_diag, without = (noise(balanced(sigma_x, sigma_w, 4, 6, with_diag=d), sigma_x, sigma_w) for d in (True, False))
    assert with_diag < without / 2


@pytest.mark.parametrize("with_diag", [True, False])
@pytest.mark.parametrize("sizes", [(1, 12), (12, 1)])
def test_with_one_dense_factor_the_start_is_the_optimum(sizes, with_diag):
    sigma_x, sigma_w = spd(12, 5), spd(12, 6)
    found = balanced(sigma_x, sigma_w, *sizes, with_diag=with_diag, ridge=1e-12)
    assert noise(found, sigma_x, sigma_w) == pytest.approx(least_noise(sigma_x, sigma_w), rel=1e-6)


def test_the_scale_of_the_moments_does_not_matter():
    first, scaled = (balanced(s * spd(12, 5), spd(12, 6) / s, 3, 4, with_diag=True) for s in (1.0, 1e6))
    torch.testing.assert_close(first, scaled, rtol=1e-6, atol=1e-9)


def test_moments_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\[12, 12\]"):
        balanced_factors(spd(10), spd(10), 3, 4, generator=generator())
