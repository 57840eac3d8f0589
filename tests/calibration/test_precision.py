import pytest
import torch

from flatq_cli.calibration.precision import fast_matmuls

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
