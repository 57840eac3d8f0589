from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from flatq_cli.kernels.kron_quant import kron_quant_reference, prepare_kron
from flatq_cli.quantization.quantizers import dequantize, quantize
from flatq_cli.runtime.backends.base import QuantizedActivation
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.sites import OnlineSite
from tests.runtime.test_linear import rounded_linear


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


# ---- What a module keeps for its backend. ----


def counted() -> tuple[Callable[[PackedLinear], torch.Tensor], list[PackedLinear]]:
    calls: list[PackedLinear] = []

    def make(linear: PackedLinear) -> torch.Tensor:
        calls.append(linear)
        return linear.codes().float()

    return make, calls


def test_what_is_prepared_is_made_once():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    first = linear.prepared(make)
    assert linear.prepared(make) is first
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.to(torch.bfloat16),
        lambda linear: linear.load_state_dict(linear.state_dict()),
        lambda linear: setattr(linear, "weight_scale", linear.weight_scale * 2),
        lambda linear: linear.drop_prepared(),
        lambda linear: linear.prepared(lambda other: None),
    ],
)
def test_it_is_made_again_when_the_module_changes(change):
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    linear.prepared(make)
    change(linear)
    linear.prepared(make)
    assert len(calls) == 2


def test_a_module_that_holds_this_one_makes_it_forget_too():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    model = nn.Sequential(nn.ModuleDict({"inner": linear}))
    linear.prepared(make)
    model.load_state_dict(model.state_dict())
    linear.prepared(make)
    model.to(torch.float16)
    linear.prepared(make)
    assert len(calls) == 3


def test_a_copy_prepares_for_itself():
    make, calls = counted()
    linear, _ = rounded_linear(4, 0, True)
    linear.prepared(make)
    twin = copy.deepcopy(linear)
    assert twin.backend is linear.backend
    twin.weight_packed.zero_()
    assert not torch.equal(twin.prepared(make), linear.prepared(make))
    assert calls == [linear, twin]


def test_what_is_prepared_is_no_part_of_the_state():
    make, _ = counted()
    linear, _ = rounded_linear(4, 8, False)
    before = list(linear.state_dict())
    linear.prepared(make)
    assert list(linear.state_dict()) == before
    assert isinstance(linear.prepared(make), torch.Tensor)
    assert len(list(linear.buffers())) == len(before)


def test_sites_and_linears_are_what_a_backend_runs():
    from flatq_cli.runtime.backends import BackendModule

    assert issubclass(PackedLinear, BackendModule)
    assert issubclass(OnlineSite, BackendModule)
