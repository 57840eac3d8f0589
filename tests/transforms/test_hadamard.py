import pytest
import torch

from flatq_cli.transforms.hadamard import hadamard, has_hadamard, random_orthogonal, spreading_matrix

# Of the multiples of 4 up to 256, those that neither Paley nor Kronecker products of smaller ones give.
UNREACHABLE = {92, 116, 156, 172, 184, 188, 232, 236}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, *range(4, 257, 4)])
def test_hadamard_is_orthogonal_with_entries_of_one_magnitude(n):
    if n in UNREACHABLE:
        assert not has_hadamard(n)
        return
    matrix = hadamard(n)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5))


@pytest.mark.parametrize("n", [0, 3, 6, 7, 86, 92, 98])
def test_sizes_without_a_construction_are_refused(n):
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"size {n} "):
        hadamard(n)


@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_random_orthogonal_is_orthogonal_and_follows_its_generator(n):
    q = random_orthogonal(n, generator(1))
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(q, random_orthogonal(n, generator(1)))
    if n > 2:
        assert not torch.equal(q, random_orthogonal(n, generator(2)))


def test_random_orthogonal_prefers_no_orientation_and_no_direction():
    g = generator()
    draws = torch.stack([random_orthogonal(3, g) for _ in range(300)])
    assert 110 < (torch.linalg.det(draws) > 0).sum() < 190
    assert draws.mean(0).abs().max() < 0.15  # standard error 0.033
    torch.testing.assert_close((draws**2).mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.08, rtol=0)


def test_spreading_is_hadamard_where_there_is_one_and_random_elsewhere():
    assert torch.equal(spreading_matrix(24, generator()), hadamard(24))
    assert torch.equal(spreading_matrix(9, generator(3)), random_orthogonal(9, generator(3)))


def test_spreading_turns_an_outlier_channel_into_equal_magnitudes():
    x = torch.zeros(36, dtype=torch.float64)
    x[7] = 60.0
    torch.testing.assert_close((x @ spreading_matrix(36, generator())).abs(), torch.full_like(x, 10.0))
