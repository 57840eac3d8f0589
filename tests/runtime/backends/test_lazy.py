from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from flatq_cli.kernels.kron_quant import kron_quant_reference, prepare_kron
from flatq_cli.quantization.quantizers import dequantize, quantize
from flatq_cli.runtime.backends.lazy import GatedActivation, LazyTensor, QuantizedActivation, Silu


def activation(dtype: torch.dtype = torch.bfloat16, symmetric: bool = True) -> tuple[QuantizedActivation, torch.Tensor]:
    """A quantized activation [2, 5, 24] and the float tensor it stands for."""
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    codes, scale, zero = quantize(x, 4, symmetric)
    values = dequantize(codes, scale, zero).to(dtype)
    zero = None if zero is None else zero.squeeze(-1).to(torch.int32)
    return QuantizedActivation(codes.to(torch.int8), scale.squeeze(-1), zero, x.shape, dtype, 4), values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_looks_like_the_float_tensor_it_stands_for(dtype, symmetric):
    x, values = activation(dtype, symmetric)
    assert (x.shape, x.dtype, x.device, x.ndim) == (values.shape, values.dtype, values.device, 3)
    assert x.size(-1) == 24
    assert x.numel() == values.numel()
    assert not x.requires_grad
    assert torch.equal(x.values(), values)
    assert "QuantizedActivation([2, 5, 24]" in repr(x)


WEIGHT = torch.randn(7, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: functional.linear(x, WEIGHT),
    "matmul": lambda x: x @ WEIGHT.T,
    "view": lambda x: x.view(10, 24),
    "heads": lambda x: x.view(2, 5, 3, 8).transpose(1, 2),
    "residual": lambda x: x + torch.ones(2, 5, 24, dtype=torch.bfloat16),
    "residual, the other way round": lambda x: torch.ones(2, 5, 24, dtype=torch.bfloat16) + x,
    "float": lambda x: x.float(),
    "to": lambda x: x.to("cpu", torch.float32),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "row": lambda x: x[:, -1:],
    "cat": lambda x: torch.cat([x, x], 1),
    "norm": lambda x: functional.rms_norm(x, (24,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_knows_no_codes_computes_with_the_float_values(name):
    x, values = activation()
    result = OPERATIONS[name](x)
    assert torch.equal(result, OPERATIONS[name](values))
    assert isinstance(x, QuantizedActivation)


def test_what_readers_share_cannot_be_changed_in_place():
    x, values = activation()
    with pytest.raises(RuntimeError, match="clone it before"):
        x.mul_(2)
    assert torch.equal(x.values(), values)
    target = torch.zeros(2, 5, 24)
    target.copy_(x)
    assert torch.equal(target, values.float())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_it_reads_the_codes_that_the_kernel_packs(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 15, generator=generator).half()
    matrices = prepare_kron(torch.randn(3, 3, generator=generator), torch.randn(5, 5, generator=generator), x.dtype, 15)
    codes, scale, zero = kron_quant_reference(x, matrices, torch.ones(2), bits=bits, symmetric=symmetric)
    y = (x.float().view(3, 3, 5) @ matrices.right.float()).transpose(1, 2) @ matrices.left.float()
    y = y.transpose(1, 2).reshape(3, 15)
    got = QuantizedActivation(codes, scale, zero, x.shape, torch.float16, bits).values()
    error = (got.float() - y).abs() / scale.unsqueeze(-1)
    assert float(error.max()) < 0.51 + 2 ** (bits - 10)  # half a step, and the rounding of half precision


# ---- SiLU(gate) · up. ----


def gate_and_up(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(2, 5, 24, generator=generator).to(dtype) for _ in range(2))
    return gate, up


def test_silu_times_up_waits_and_is_then_what_the_stock_block_computes():
    gate, up = gate_and_up()
    for product in (Silu(gate) * up, up * Silu(gate), torch.mul(Silu(gate), up)):
        assert isinstance(product, GatedActivation)
        assert (product.gate is gate, product.up is up) == (True, True)
        assert (product.shape, product.dtype, product.device) == (up.shape, up.dtype, up.device)
        assert torch.equal(product.values(), functional.silu(gate) * up)


@pytest.mark.parametrize(
    "use",
    [
        lambda silu, up: silu * 2.0,
        lambda silu, up: 2.0 * silu,
        lambda silu, up: silu * up[0],
        lambda silu, up: silu * up.float(),
        lambda silu, up: silu * silu,
        lambda silu, up: (silu * up) * silu,
        lambda silu, up: silu + up,
        lambda silu, up: torch.mul(silu, up, out=torch.empty_like(up)),
        lambda silu, up: (silu * up).sum(-1),
        lambda silu, up: functional.linear(silu * up, up[0]),
        lambda silu, up: functional.linear(input=silu * up, weight=up[0]),
    ],
)
def test_any_other_use_computes_the_floats(use):
    gate, up = gate_and_up()
    result = use(Silu(gate), up)
    assert not isinstance(result, LazyTensor)
    expected = use(functional.silu(gate), up)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


def test_a_function_that_works_in_place_is_refused_too():
    product = Silu(gate_and_up()[0])
    for change in (torch.relu_, lambda x: functional.relu(x, inplace=True)):
        with pytest.raises(RuntimeError, match="clone it before"):
            change(product)


def test_it_can_be_copied():
    x, values = activation()
    assert torch.equal(copy.deepcopy(x).values(), values)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_passes_it_on_without_a_graph_break(backend):
    gate, up = gate_and_up()

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product = Silu(gate) * up
        codes, scale, _ = quantize(product.up + product.gate, 8, True)  # only a product that waits has these
        quantized = QuantizedActivation(codes, scale, None, up.shape, up.dtype, 8)
        sums = functional.linear(quantized, up[0]).sum(-1) + functional.linear(Silu(gate), up[0]).sum(-1)
        sums = sums + torch.mul(up, Silu(gate)).up.sum(-1) + torch.cat([product, quantized], 1)[:, :5].sum(-1)
        return sums.float() + quantized.float().sum(-1) - (1 + product)[..., 0]

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend=backend, fullgraph=True)(gate, up), run(gate, up))
