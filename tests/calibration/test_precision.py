import pytest
import torch
from torch import nn

from flatq_cli.calibration.precision import fast_matmuls, matmul_dtype, with_fast_linears

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [({"amx_bf16": True}, torch.bfloat16), ({"avx2": True, "avx512_bf16": False}, torch.float32), ({}, torch.float32)],
)
def test_matmuls_are_bf16_where_the_cpu_has_them(monkeypatch: pytest.MonkeyPatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    with fast_matmuls(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_torch_that_knows_no_features_stays_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with fast_matmuls(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_fast_linears_give_the_same_bits_and_hold_half(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4, bias=False)), torch.randn(3, 8)
    with fast_matmuls(CPU), torch.no_grad():
        expected = module(x)
        assert torch.equal(with_fast_linears(module, CPU)(x), expected)
    assert [p.dtype for p in module.parameters()] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert matmul_dtype(CPU) == torch.bfloat16
