"""Activations that wait: each stands for a float tensor and computes it only when something asks for its numbers.

A stock block hands on what a norm, an activation function or a product put out. Where a kernel can take the parts
instead, these objects travel through the block in the tensor's place, and the kernel takes them apart:

    QuantizedActivation   integer codes and scales: what a site puts out and a packed linear multiplies
    Silu                  silu(gate): what an MLP multiplies next
    GatedActivation       silu(gate) · up: what a site in front of the last linear of an MLP reads

Any operation that knows nothing of them, a method, an operator or a function of torch, computes with the floats. They
are no subclasses of `Tensor`: `torch.compile` cannot make one of those inside a graph, while a plain object is gone
from the graph once it is traced, and its parts stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from flatq_cli.quantization.packing import unpack
from flatq_cli.quantization.quantizers import dequantize

if TYPE_CHECKING:
    Likeness = Tensor  # whoever is given one may use it as the tensor it stands for
else:
    Likeness = object


PRODUCTS = (operator.mul, torch.mul, Tensor.mul, Tensor.__mul__)
"""How torch says a · b."""


class LazyTensor(Likeness):
    """Stands for a float tensor of `shape` and `dtype` on `device`; no gradient passes through it.

    A subclass says in `compute` what the numbers are.
    """

    requires_grad = False

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Tensor | None = None
    ) -> None:
        self.shape, self.dtype, self.device, self.ndim = shape, dtype, device, len(shape)
        self._floats = values

    def compute(self) -> Tensor:
        """The float tensor."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The float tensor; computed once, and not to be changed."""
        if self._floats is None:
            self._floats = self.compute()
        return self._floats

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has: of the floats."""
        if name.startswith("__"):
            raise AttributeError(name)  # protocols that tensors do not need: copying asks for several
        if name.endswith("_") and not name.startswith("_"):
            raise _in_place(name)
        return getattr(self.values(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A function of torch that is given one: on the floats."""
        kwargs = dict(kwargs or {})
        # The compiler does not tell the name of every function.
        if not torch.compiler.is_compiling() and args and isinstance(args[0], LazyTensor):
            name = getattr(func, "__name__", "")
            if name.rstrip("_") == name[:-1] or kwargs.get("inplace"):
                raise _in_place(name)
        args, kwargs = pytree.tree_map(_values, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"


def _values(argument: Any) -> Any:
    return argument.values() if isinstance(argument, LazyTensor) else argument


def _in_place(name: str) -> RuntimeError:
    return RuntimeError(f"{name}: an activation that others read too cannot be changed in place; clone it before")


def _operator(name: str) -> Callable[..., Any]:
    def on_values(self: LazyTensor, *others: Any) -> Any:
        return getattr(self.values(), name)(*map(_values, others))

    return on_values


# Python looks operators up in the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    setattr(LazyTensor, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(LazyTensor, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "getitem", "len", "bool"):
    setattr(LazyTensor, f"__{_name}__", _operator(f"__{_name}__"))


class QuantizedActivation(LazyTensor):
    """An activation as integer codes: (code - zero) · scale.

    Args:
        codes: int8 or a float dtype, as many as the float has, or bytes as `kernels.kron_quant` packs them: uint8 rows.
        scale: float32, float64 with float64 codes; one a row. zero: int32, one a row; None: 0. Leading axes may be
            folded into one.
        shape, dtype: of the float. bits: of a code. values: the float tensor, if it is there already.
        symmetric: whether codes are of a symmetric quantizer, and so reach half as far.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        shape: torch.Size,
        dtype: torch.dtype,
        bits: int,
        values: Tensor | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__(shape, dtype, codes.device, values)
        self.codes, self.scale, self.zero, self.bits = codes, scale, zero, bits
        self.largest = 2 ** (bits - 1) if symmetric else 2**bits

    def compute(self) -> Tensor:
        """The codes, dequantized in their scale's dtype and cast."""
        return dequantize(self.centred(), self.scale.reshape(-1, 1)).to(self.dtype).reshape(self.shape)

    def centred(self) -> Tensor:
        """code - zero, one by one: `[rows, width]`, int8 or floats without a fraction."""
        codes = self.codes.reshape(-1, self.codes.shape[-1])
        if codes.dtype == torch.uint8:
            codes = unpack(codes, self.bits, self.shape[-1], self.zero is None)
        return codes if self.zero is None else codes.float() - self.zero.reshape(-1, 1)


class Silu(LazyTensor):
    """silu(gate), as torch computes it; its product with a tensor like it is a `GatedActivation`."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__(gate.shape, gate.dtype, gate.device)
        self.gate = gate

    def compute(self) -> Tensor:
        """silu(gate), rounded to gate's dtype."""
        return functional.silu(self.gate)

    def __mul__(self, other: Any) -> Tensor:
        if type(other) is Tensor and (other.shape, other.dtype) == (self.shape, self.dtype):
            return GatedActivation(self, other)
        return self.values() * _values(other)  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A product, if it is one; `torch.compile` takes operators for functions of torch."""
        if func in PRODUCTS and len(args) == 2 and not kwargs:
            silu, other = args if isinstance(args[0], cls) else reversed(args)
            return silu.__mul__(other)
        return super().__torch_function__(func, types, args, kwargs)


class GatedActivation(LazyTensor):
    """silu(gate) · up: `activation` and a tensor of its shape and dtype."""

    def __init__(self, activation: Silu, up: Tensor) -> None:
        super().__init__(up.shape, up.dtype, up.device)
        self.activation, self.up = activation, up

    @property
    def gate(self) -> Tensor:
        """What silu is taken of."""
        return self.activation.gate

    def compute(self) -> Tensor:
        """The product, rounded twice as the stock block rounds it."""
        return self.activation.values() * self.up
