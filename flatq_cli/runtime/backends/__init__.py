"""Backends: how a quantized model computes.

    reference    pure torch; defines the result (`reference.py`)
    cpu          integer and weight-only kernels of torch on the CPU (`cpu.py`)
    cuda         flatq's own kernels

A model is loaded with `reference`; `set_backend(model, "auto")` takes the fastest that works where the model is, and
`choose_exact` names the fastest that changes no figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flatq_cli.errors import UsageError
from flatq_cli.runtime.backends.base import Backend, BackendModule
from flatq_cli.runtime.backends.cpu import Cpu
from flatq_cli.runtime.backends.cuda import Cuda
from flatq_cli.runtime.backends.lazy import QuantizedActivation
from flatq_cli.runtime.backends.reference import REFERENCE

if TYPE_CHECKING:
    from torch import nn

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (REFERENCE, Cpu(), Cuda())}
AUTO = "auto"


def available() -> dict[str, str | None]:
    """Every backend by name, with the reason why it does not work on this machine; None: it works."""
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def choose(device: torch.device | str, dtype: torch.dtype) -> str:
    """What "auto" means for a model on `device` in `dtype`: the backend of the device if it works, else `reference`."""
    device = torch.device(device)
    fast = BACKENDS.get(device.type, REFERENCE)
    return fast.name if fast.why_not(device, dtype) is None else REFERENCE.name


def choose_exact(device: torch.device | str, dtype: torch.dtype) -> str:
    """The fastest backend that gives `reference`'s results, bit for bit, for a model on `device` in `dtype`.

    Source: docs/decisions/0011-exact-sums.md.
    """
    name = choose(device, dtype)
    return name if name == Cpu.name and dtype == torch.float32 else REFERENCE.name


def check_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """UsageError where there is no backend `name`, or it does not work for a model on `device` in `dtype`."""
    if name == AUTO:
        return
    if name not in BACKENDS:
        raise UsageError(f"--backend: there is no '{name}'; there are {', '.join((AUTO, *BACKENDS))}")
    if (reason := BACKENDS[name].why_not(torch.device(device), dtype)) is not None:
        raise UsageError(f"--backend {name}: {reason}")


def set_backend(model: nn.Module, name: str) -> str:
    """Let the sites and packed linears of `model` compute through a backend, in place; its state does not change.

    A model without packed linears has no integers to multiply: it stays with `reference`.

    Args:
        name: of `available()`, or "auto".
    Returns:
        The name of the backend that the model now has.
    Raises:
        UsageError: there is no such backend, or it does not work for this model on this machine.
    """
    from flatq_cli.runtime.linear import PackedLinear

    modules = [module for module in model.modules() if isinstance(module, BackendModule)]
    device, dtype = _place(model)
    if name == AUTO:
        name = choose(device, dtype)
    check_backend(name, device, dtype)
    if not any(isinstance(module, PackedLinear) for module in modules):
        name = REFERENCE.name
    for before in {module.backend for module in modules}:
        before.detach(model)
    for module in modules:
        module.backend = BACKENDS[name]
        module.drop_prepared()
    BACKENDS[name].attach(model)
    return name


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in what `model` computes: as its first float parameter, or buffer where it has no parameters."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


__all__ = [
    "AUTO",
    "BACKENDS",
    "REFERENCE",
    "Backend",
    "BackendModule",
    "Cpu",
    "QuantizedActivation",
    "available",
    "check_backend",
    "choose",
    "choose_exact",
    "set_backend",
]
