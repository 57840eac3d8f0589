import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq_cli.transforms.kronecker import (
    Invertible,
    Transform,
    invertible,
    kronecker_matmul,
    transform_from_matrices,
)

sizes = st.integers(1, 7)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(n1=sizes, n2=sizes, leading=st.sampled_from([(), (3,), (2, 3), (0,)]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_kronecker_matmul_equals_the_dense_product(n1, n2, leading, seed):
    x, left, right = randn(*leading, n1 * n2, seed=seed), randn(n1, n1, seed=seed + 1), randn(n2, n2, seed=seed + 2)
    torch.testing.assert_close(kronecker_matmul(x, left, right), x @ torch.kron(left, right))
    torch.testing.assert_close(kronecker_matmul(x, left, None), x @ torch.kron(left, torch.eye(n2).double()))
    torch.testing.assert_close(kronecker_matmul(x, None, right), x @ torch.kron(torch.eye(n1).double(), right))
    assert kronecker_matmul(x, None, None) is x or torch.equal(kronecker_matmul(x, None, None), x)


def test_kronecker_matmul_accepts_a_strided_input():
    x, left, right = randn(12, 5).T, randn(3, 3, seed=1), randn(4, 4, seed=2)
    torch.testing.assert_close(kronecker_matmul(x, left, right), x @ torch.kron(left, right))


def test_gradients_reach_the_input_and_both_factors():
    inputs = [t.requires_grad_() for t in (randn(2, 6), randn(2, 2, seed=1), randn(3, 3, seed=2))]
    assert torch.autograd.gradcheck(kronecker_matmul, inputs)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 2), (4, 4)), ((5, 5), None), (None, (7, 7)), ((13, 13), None), (None, (13, 13)), ((2, 3), None)],
)
def test_factors_that_do_not_fit_are_refused(left, right):
    left, right = (None if shape is None else randn(*shape) for shape in (left, right))
    with pytest.raises(ValueError, match=r"width of 12|square"):
        kronecker_matmul(randn(2, 12), left, right)
    with pytest.raises(ValueError, match=r"width of 12|square"):
        Transform(12, *(None if m is None else Invertible(m, m) for m in (left, right)))


def test_a_diagonal_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="width of 12"):
        Transform(12, diag=torch.ones(11))


@pytest.mark.parametrize("parts", ["", "l", "r", "d", "lr", "ld", "rd", "lrd"])
def test_the_two_faces_of_a_transform_leave_a_layer_unchanged(parts):
    x, w = randn(5, 12, seed=1), randn(7, 12, seed=2)
    transform = transform_from_matrices(
        12,
        randn(3, 3, seed=3) if "l" in parts else None,
        randn(4, 4, seed=4) if "r" in parts else None,
        randn(12, seed=5).exp() if "d" in parts else None,
    )
    assert transform.sizes == {"l": (3, 4), "r": (3, 4)}.get(parts[:1], (1, 12))
    torch.testing.assert_close(transform.apply(x) @ transform.apply_inverse_transpose(w).T, x @ w.T)


def test_a_transform_is_its_diagonal_then_its_factors():
    x, left, right, diag = randn(5, 12), randn(3, 3, seed=1), randn(4, 4, seed=2), randn(12, seed=3).exp()
    transform = transform_from_matrices(12, left, right, diag)
    dense = torch.diag(diag) @ torch.kron(left, right)
    torch.testing.assert_close(transform.apply(x), x @ dense)
    torch.testing.assert_close(transform.apply_inverse_transpose(x), x @ torch.linalg.inv(dense).T)
    torch.testing.assert_close(transform.apply_online(x * diag), transform.apply(x))


def test_inverses_are_computed_in_the_dtype_asked_for():
    left = randn(3, 3).float()
    pair = transform_from_matrices(12, left, dtype=torch.float64).left
    assert pair.matrix.dtype == pair.inverse_transpose.dtype == torch.float64
    torch.testing.assert_close(pair.matrix @ pair.inverse_transpose.T, torch.eye(3).double(), atol=1e-12, rtol=0)


def test_a_transform_works_in_the_dtype_of_what_it_maps():
    transform = transform_from_matrices(12, randn(3, 3), randn(4, 4), randn(12).exp())
    assert transform.apply(torch.zeros(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert transform.apply_inverse_transpose(torch.zeros(2, 12)).dtype == torch.float32


def test_the_inverse_is_differentiable():
    assert torch.autograd.gradcheck(lambda m: invertible(m).inverse_transpose, randn(4, 4).requires_grad_())
