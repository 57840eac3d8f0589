"""`flatq doctor` and `--device`: what is here, and what to install where something is not."""

import importlib.metadata
import platform

import pytest
import torch

from flatq_cli.cli import doctor
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.errors import UsageError


def test_doctor_reports_this_installation():
    found = doctor.examine()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["memory_bytes"] > found["memory_free_bytes"] > 0
    assert found["here_free_bytes"] > 0


def test_doctor_names_what_to_install_for_a_missing_package(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "lm-eval" else real(name))
    assert "lm-eval: pip install lm-eval" in doctor.examine()["missing"]


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "flatq[cuda12]"), ("13.0", "flatq[cuda13]")])
def test_doctor_asks_for_the_cupy_of_this_cuda_only_where_there_is_a_gpu(monkeypatch, cuda, extra):
    monkeypatch.setattr(doctor, "_gpu", lambda: {"gpus": ["H100"], "torch_cuda": cuda})
    monkeypatch.setattr(doctor, "CUPY", ())
    assert any(extra in line for line in doctor.examine()["missing"])
    monkeypatch.setattr(doctor, "_gpu", lambda: {"gpus": [], "torch_cuda": None})
    assert not any("CuPy" in line for line in doctor.examine()["missing"])


@pytest.mark.parametrize(("present", "auto"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_if_there_is_one(monkeypatch, present, auto):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert resolve_device(Device.auto) == auto
    assert resolve_device(Device.cpu) == "cpu"


@pytest.mark.parametrize(
    ("build", "remedy"), [(None, "install a CUDA build of torch"), ("12.8", "install or update the NVIDIA driver")]
)
def test_cuda_without_a_gpu_says_what_to_install(monkeypatch, build, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(UsageError, match=f"--device cuda: .*{remedy}"):
        resolve_device(Device.cuda)
