import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.errors import WorkError
from flatq_cli.quantization.gptq import error_feedback, gptq_weight
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight, groups_of, round_weight


def correlated_inputs(tokens, width, seed=0):
    """Inputs with outlier channels and strong correlations between channels, as a norm's output has them."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 8, generator=g, dtype=torch.float64) @ torch.randn(8, width, generator=g).double()
    x = shared + 0.5 * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    x[:, ::7] *= 5
    return x


def output_error(weight, rounded, x):
    return float(((dequantize_weight(rounded).double() - weight.double()) @ x.T).pow(2).sum())


def gptq_by_elimination(weight, moment, scale, zero, low, high, order, group):
    """Optimal brain quantization in plain numpy: at each step the inverse of what is left, by elimination."""
    w, inverse = weight.copy(), np.linalg.inv(moment)
    codes = np.zeros_like(w)
    left = list(order)
    for j in order:
        k = j // group
        q = np.clip(np.round(w[:, j] / scale[:, k]) + zero[:, k], low, high)
        codes[:, j] = q
        error = (w[:, j] - (q - zero[:, k]) * scale[:, k]) / inverse[j, j]
        left.remove(j)
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse = inverse - np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 0, True), (4, 12, False), (3, 24, True), (8, 0, False)])
def test_codes_are_those_of_elimination_without_any_cholesky(bits, group, symmetric, act_order):
    x = correlated_inputs(200, 48)
    moment = x.T @ x / 200
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clip = 0.7 + 0.3 * torch.rand(10, groups_of(48, group), 2, generator=torch.Generator().manual_seed(2))
    rounded = gptq_weight(
        weight, moment, bits=bits, group=group, symmetric=symmetric, clip=clip, damping=0.01, act_order=act_order
    )
    plain = round_weight(weight.float(), bits, group, symmetric, clip)
    assert torch.equal(rounded[SCALE], plain[SCALE])
    assert (ZERO in rounded) != symmetric
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    diagonal = moment.diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(48)
    zero = plain[ZERO].double().numpy() if ZERO in plain else np.zeros(plain[SCALE].shape)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    expected = gptq_by_elimination(
        weight.numpy(), damped.numpy(), plain[SCALE].double().numpy(), zero, low, high, order.tolist(), group or 48
    )
    assert np.array_equal(rounded[CODES].numpy(), expected)


@given(seed=st.integers(0, 999), width=st.sampled_from([8, 130, 257]), bits=st.sampled_from([3, 4]))
def test_the_layers_output_moves_less_than_with_the_nearest_codes(seed, width, bits):
    x = correlated_inputs(4 * width, width, seed)
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    nearest = round_weight(weight, bits, 0, True, None)
    rounded = gptq_weight(weight, (x.T @ x).float(), bits=bits, group=0, symmetric=True, clip=None)
    assert output_error(weight, rounded, x) < output_error(weight, nearest, x)


@pytest.mark.parametrize(("group", "symmetric"), [(0, True), (16, False)])
def test_linears_that_read_one_input_may_be_rounded_as_one(group, symmetric):
    x = correlated_inputs(300, 96)
    weights = [torch.randn(out, 96, generator=torch.Generator().manual_seed(out)) for out in (7, 12)]
    options = {"bits": 4, "group": group, "symmetric": symmetric, "clip": None}
    together = gptq_weight(torch.cat(weights), x.T @ x, **options)
    alone = [gptq_weight(weight.double(), x.T @ x, **options) for weight in weights]
    for name, tensor in together.items():
        assert torch.equal(tensor, torch.cat([parts[name] for parts in alone]))


def test_independent_inputs_of_equal_size_leave_nothing_to_compensate():
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    rounded = gptq_weight(weight, torch.eye(32), bits=4, group=8, symmetric=True, clip=None)
    assert torch.equal(rounded[CODES], round_weight(weight, 4, 8, True, None)[CODES])


def test_an_input_that_is_always_zero_costs_nothing_and_gets_the_code_of_zero():
    x = correlated_inputs(100, 16)
    x[:, 3] = 0
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    rounded = gptq_weight(weight, x.T @ x, bits=4, group=0, symmetric=True, clip=None)
    assert not rounded[CODES][:, 3].any()


def test_a_singular_moment_is_damped_until_it_has_a_factor():
    x = correlated_inputs(3, 64)  # rank 3
    moment = (x.T @ x).float()
    feedback = error_feedback(moment, damping=0.0)
    assert torch.isfinite(feedback).all()
    assert torch.equal(feedback, feedback.tril())
    assert torch.equal(feedback.diagonal(), torch.ones(64))


@pytest.mark.parametrize("moment", [torch.full((4, 4), torch.nan), torch.zeros(4, 4), -torch.eye(4)])
def test_what_is_no_moment_is_an_error_that_says_what_to_do(moment):
    with pytest.raises(WorkError, match=r"GPTQ.*4 wide.*calibration.data or weights.rounding=nearest"):
        gptq_weight(torch.ones(2, 4), moment, bits=4, group=0, symmetric=True, clip=None)
