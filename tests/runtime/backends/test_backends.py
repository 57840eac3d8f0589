from __future__ import annotations

import pytest
import torch
from torch import nn

from flatq_cli.errors import UsageError
from flatq_cli.runtime.backends import BACKENDS, available, choose, choose_exact, set_backend
from flatq_cli.runtime.backends.reference import REFERENCE
from flatq_cli.runtime.layout import SiteLayout
from flatq_cli.runtime.sites import OnlineSite
from tests.runtime.test_linear import rounded_linear


def test_each_backend_says_whether_it_works_here():
    backends = available()
    assert list(backends) == ["reference", "cpu", "cuda"]
    assert backends["reference"] is None
    if not torch.cuda.is_available():
        assert backends["cuda"]


def test_auto_is_the_backend_of_the_device_where_it_works(monkeypatch):
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, device=None, dtype=None: None)
    assert choose("cpu", torch.float32) == "cpu"
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, device=None, dtype=None: "broken")
    assert choose("cpu", torch.float32) == "reference"
    assert choose("meta", torch.float32) == "reference"
    assert choose("cpu", torch.float64) == "reference"


def test_what_changes_no_figure_is_integers_in_float32_where_they_work(monkeypatch):
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, device=None, dtype=None: None)
    assert choose_exact("cpu", torch.float32) == "cpu"
    assert choose_exact("cpu", torch.bfloat16) == "reference"
    assert choose_exact("cuda", torch.float32) == "reference"
    monkeypatch.setattr(type(BACKENDS["cpu"]), "why_not", lambda self, device=None, dtype=None: "broken")
    assert choose_exact("cpu", torch.float32) == "reference"


def test_cpu_refuses_other_devices_and_dtypes():
    cpu = BACKENDS["cpu"]
    assert "not on the CPU" in cpu.why_not(torch.device("meta"), torch.float32)
    assert "not in torch.float64" in cpu.why_not(torch.device("cpu"), torch.float64)


def test_kernels_that_fail_or_are_wrong_are_a_reason(monkeypatch):
    from flatq_cli.runtime.backends import cpu

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    def forget() -> None:
        cpu._kernels_fail.cache_clear()
        cpu.int8_is_exact.cache_clear()

    forget()
    monkeypatch.setattr(cpu, "_int8_product", broken)
    assert available()["cpu"].endswith("no such kernel")
    forget()
    monkeypatch.setattr(cpu, "_int8_product", lambda *_: torch.zeros(2, 16))
    assert "wrongly" in available()["cpu"]
    forget()


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "there is no 'gpu'; there are auto, reference"), ("cuda", "cuda: ")]
)
def test_a_backend_that_is_not_there_is_a_usage_error(name, message):
    with pytest.raises(UsageError, match=message):
        set_backend(nn.Sequential(rounded_linear(4, 0, True)[0]), name)


def test_a_model_without_packed_linears_stays_with_the_reference():
    layout = SiteLayout("attn_in", 24, 4, 6, True, True, False, bits=4, symmetric=True, clip=True)
    model = nn.Sequential(OnlineSite(layout), nn.Linear(24, 3))
    assert set_backend(model, "auto") == "reference"
    assert model[0].backend is REFERENCE


def test_setting_a_backend_forgets_what_the_last_one_prepared():
    linear, _ = rounded_linear(4, 0, True)
    first = linear.prepared(type(linear).codes)
    set_backend(nn.Sequential(linear), "reference")
    assert linear.prepared(type(linear).codes) is not first
