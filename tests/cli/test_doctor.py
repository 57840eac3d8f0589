"""`flatq doctor` and `--device`: what is here, and what to install where something is not."""

import importlib.metadata
import platform
from types import SimpleNamespace

import pytest
import torch

from flatq_cli.cli import doctor
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.errors import UsageError
from flatq_cli.kernels import compiler
from flatq_cli.kernels.errors import KernelError
from flatq_cli.runtime import backends


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
    monkeypatch.setattr(doctor, "_gpu", lambda: {"gpus": ["H100"], "archs": [90], "torch_cuda": cuda})
    monkeypatch.setattr(doctor, "CUPY", ())
    assert any(extra in line for line in doctor.examine()["missing"])
    monkeypatch.setattr(doctor, "_gpu", lambda: {"gpus": [], "archs": [], "torch_cuda": None})
    assert not any("CuPy" in line for line in doctor.examine()["missing"])


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"gpus": [], "archs": []}, "compile (NVRTC 13.1), but run as torch code on the CPU: no GPU"),
        ({"gpus": ["H100"], "archs": [90]}, "yes (NVRTC 13.1)"),
        ({"gpus": ["V100"], "archs": [70]}, "no: this NVRTC does not compile for sm_70 (only sm_75, sm_80, sm_90)"),
    ],
)
def test_doctor_says_whether_the_kernels_can_run_here(monkeypatch, gpu, said):
    monkeypatch.setattr(compiler, "load_nvrtc", lambda: SimpleNamespace(getVersion=lambda: (13, 1)))
    monkeypatch.setattr(compiler, "supported_archs", lambda: (75, 80, 90))
    monkeypatch.setattr(doctor, "_gpu", lambda: {**gpu, "torch_cuda": "13.0"})
    assert doctor.examine()["kernels"].startswith(said)


def test_doctor_says_what_the_kernels_lack(monkeypatch):
    def missing():
        raise KernelError("CUDA kernels need CuPy")

    monkeypatch.setattr(compiler, "load_nvrtc", missing)
    assert doctor.examine()["kernels"] == "no: CUDA kernels need CuPy"


def test_doctor_says_of_each_backend_whether_it_works_here(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: {"reference": None, "cuda": "no GPU"})
    assert doctor.examine()["backends"] == {"reference": "yes", "cuda": "no: no GPU"}


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
