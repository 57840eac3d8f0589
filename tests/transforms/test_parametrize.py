import pytest
import torch

from flatq_cli.transforms.hadamard import hadamard, random_orthogonal
from flatq_cli.transforms.parametrize import OrthogonalMatrix, SvdMatrix, make_matrix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def starts():
    flip = torch.eye(6, dtype=torch.float64)
    flip[0, 0] = -1  # an eigenvalue -1, which a bare Cayley map does not reach
    yield "identity", torch.eye(6)
    yield "one", torch.full((1, 1), -2.0)
    yield "reflection", flip
    yield "minus identity", -torch.eye(6)
    yield "hadamard", hadamard(12)
    yield "orthogonal", random_orthogonal(9, generator())
    yield "general", torch.randn(8, 8, generator=generator(1))
    yield (
        "ill conditioned",
        random_orthogonal(5, generator(2)) @ torch.diag(torch.tensor([30, 3, 1, 0.3, 0.03]).double()),
    )


@pytest.mark.parametrize("kind", ["direct", "svd"])
@pytest.mark.parametrize(("name", "init"), list(starts()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_trainable_matrix_starts_at_its_init_and_knows_its_inverse(kind, name, init):
    matrix, inverse_transpose = make_matrix(kind, init).invertible()
    assert matrix.dtype == inverse_transpose.dtype == torch.float32
    torch.testing.assert_close(matrix, init.float(), atol=1e-5 * init.abs().max().item(), rtol=0)
    torch.testing.assert_close(matrix @ inverse_transpose.T, torch.eye(len(init)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "init"),
    [(name, init) for name, init in starts() if torch.allclose(init @ init.T, torch.eye(len(init)).to(init))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_orthogonal_form_starts_at_its_init_which_is_its_own_inverse_transpose(name, init):
    matrix, inverse_transpose = OrthogonalMatrix(init).invertible()
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, init.float())
    assert inverse_transpose is matrix


@pytest.mark.parametrize(
    "init", [torch.full((1, 1), -2.0), 1.001 * torch.eye(3), torch.randn(8, 8, generator=generator(1))]
)
def test_the_orthogonal_form_refuses_to_start_elsewhere(init):
    with pytest.raises(ValueError, match="starts at an orthogonal matrix"):
        make_matrix("orthogonal", init)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [hadamard(64), random_orthogonal(64, generator(3)), torch.eye(64)])
def test_the_orthogonal_form_learns_a_far_rotation_and_stays_orthogonal(init, precision):
    """In float32, and where the loss runs under bf16 autocast. Two matrices of one determinant can be turned into each
    other.
    """
    target = random_orthogonal(64, generator(1)).float()
    if torch.linalg.det(init) * torch.linalg.det(target.double()) < 0:
        target[0] *= -1
    x = torch.randn(128, 64, generator=generator(2))
    module = make_matrix("orthogonal", init)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
            matrix, inverse_transpose = module.invertible()
            assert matrix.dtype == torch.float32
            loss = (x @ matrix).float().sub(x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    matrix, inverse_transpose = module.invertible()
    assert (matrix - init.float()).abs().max() > 0.1
    torch.testing.assert_close(matrix @ inverse_transpose.T, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.linalg.det(init).float(), atol=1e-4, rtol=0)


def test_the_orthogonal_form_is_a_cayley_map_from_its_start():
    init, skew = random_orthogonal(7, generator()), torch.randn(7, 7, generator=generator(1)).double()
    module = make_matrix("orthogonal", init)
    with torch.no_grad():
        module.skew.copy_(skew)
    a, eye = torch.tril(skew, -1) - torch.tril(skew, -1).T, torch.eye(7).double()
    expected = init @ torch.linalg.inv(eye - a / 2) @ (eye + a / 2)
    torch.testing.assert_close(module.invertible().matrix, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["direct", "svd"])
def test_training_keeps_the_two_faces_each_others_inverse(kind):
    target = torch.randn(6, 6, generator=generator(1))
    module = make_matrix(kind, random_orthogonal(6, generator()))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        matrix, inverse_transpose = module.invertible()
        loss = (matrix - target).square().mean() + 1e-3 * inverse_transpose.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    matrix, inverse_transpose = module.invertible()
    torch.testing.assert_close(matrix @ inverse_transpose.T, torch.eye(6), atol=1e-4, rtol=0)


def test_the_orthogonal_factors_of_the_svd_form_stay_orthogonal():
    module = SvdMatrix(torch.randn(7, 7, generator=generator()))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(1)))
    for factor in (module.u, module.v):
        torch.testing.assert_close(factor @ factor.T, torch.eye(7), atol=1e-5, rtol=0)


def test_the_svd_form_starts_at_given_factors():
    u, s, v = (
        random_orthogonal(5, generator(0)),
        torch.rand(5, generator=generator(1)) + 0.5,
        random_orthogonal(5, generator(2)),
    )
    module = SvdMatrix.from_factors(u, s, v)
    torch.testing.assert_close(module.invertible().matrix, ((u * s) @ v.T).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(module.u.detach(), u.float(), atol=1e-6, rtol=0)


def test_the_published_start_is_a_product_of_cayley_maps_of_random_orthogonal_triangles():
    def cayley(q):
        skew = torch.tril(q) - torch.tril(q).T
        eye = torch.eye(len(q), dtype=q.dtype)
        return torch.linalg.inv(eye - skew / 2) @ (eye + skew / 2)

    g = generator(4)
    expected = cayley(random_orthogonal(8, g)) @ cayley(random_orthogonal(8, g)).T
    start = SvdMatrix.published_start(8, generator(4)).invertible()
    torch.testing.assert_close(start.matrix, expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(start.inverse_transpose, expected.float(), atol=1e-5, rtol=0)  # orthogonal


@pytest.mark.parametrize("kind", ["direct", "svd", "orthogonal"])
def test_parameters_can_be_replaced_through_functional_call(kind):
    class Faces(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_matrix(kind, torch.eye(4))

        def forward(self):
            return self.inner.invertible()

    faces = Faces()
    other = {name: p.detach() + 0.1 * torch.arange(p.numel()).view(p.shape) for name, p in faces.named_parameters()}
    matrix, inverse_transpose = torch.func.functional_call(faces, other, ())
    assert not torch.allclose(matrix, torch.eye(4))
    torch.testing.assert_close(matrix @ inverse_transpose.T, torch.eye(4), atol=1e-4, rtol=0)
    assert torch.equal(faces().matrix, faces().matrix)


@pytest.mark.parametrize("kind", ["direct", "svd", "orthogonal"])
def test_autocast_does_not_coarsen_the_matrix(kind):
    init = (
        random_orthogonal(8, generator()).float() if kind == "orthogonal" else torch.randn(8, 8, generator=generator())
    )
    module = make_matrix(kind, init)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matrix, inverse_transpose = module.invertible()
    torch.testing.assert_close(matrix, init, atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix @ inverse_transpose.T, torch.eye(8), atol=1e-4, rtol=0)
