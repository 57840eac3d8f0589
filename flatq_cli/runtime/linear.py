"""The linear layer of an export: its weight stays packed in memory and is floating point only during a forward.

    codes = unpack(weight_packed)    weight = scale · (codes − zero) in float32    y = x · cast(weight)ᵀ + cast(bias)

`cast` goes to x's dtype; where x is codes too, they are multiplied by codes, and both scales applied to the sum. So
the backend `reference` does (`runtime/backends/reference.py`), which runs the fake-quant model of a run and an export
alike; others compute the same faster. Scales are part of the codes' meaning and stay float32 (docs/format.md):
`.to(torch.bfloat16)` moves this layer and casts nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatq_cli.config.recipe import WeightSpec
from flatq_cli.quantization.packing import pack, packed_width, unpack
from flatq_cli.quantization.quantizers import FLOAT_BITS
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight
from flatq_cli.runtime.backends.base import BackendModule
from flatq_cli.runtime.backends.reference import REFERENCE

PACKED = "weight_packed"


class PackedLinear(BackendModule):
    """y = x Wᵀ + b with W as packed integer codes.

    Buffers: `weight_packed` uint8 [out, ceil(in / codes per byte)], `weight_scale` float32 [out, groups], `weight_zero`
    int32 [out, groups] or None (symmetric codes), `bias` float32 [out] or None. A fresh one holds zeros.

    `stays_unpacked`: whether the backend `reference` keeps what it unpacks, a float a weight, for the next forward.

    Args:
        group: inputs that share a scale; 0 for one scale a row.
    Raises:
        ValueError: if `group` does not divide `in_features`, or bits are not 2 to 8.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        symmetric: bool,
        bias: bool,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.backend = REFERENCE
        if group and in_features % group:
            raise ValueError(f"a group of {group} weights does not divide a row of {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.symmetric = bits, symmetric
        self.stays_unpacked = False
        groups = in_features // group if group else 1
        width = packed_width(in_features, bits)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer(PACKED, zeros(out_features, width, dtype=torch.uint8))
        self.register_buffer(SCALE, zeros(out_features, groups, dtype=torch.float32))
        self.register_buffer(ZERO, None if symmetric else zeros(out_features, groups, dtype=torch.int32))
        self.register_buffer("bias", zeros(out_features, dtype=torch.float32) if bias else None)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        bits: int,
        symmetric: bool,
    ) -> PackedLinear:
        """The layer of a rounded weight.

        Args:
            codes: integers [out, in]. scale: [out, groups].
            zero: [out, groups], None where `symmetric`. bias: [out] or None.
        """
        if symmetric != (zero is None):
            raise ValueError("asymmetric codes have a zero point, symmetric codes have none")
        out_features, in_features = codes.shape
        group = in_features // scale.shape[1]
        linear = cls(in_features, out_features, bits, group, symmetric, bias is not None, codes.device)
        linear.weight_packed = pack(codes, bits)
        linear.weight_scale = scale.detach().float()
        linear.weight_zero = None if zero is None else zero.to(torch.int32)
        linear.bias = None if bias is None else bias.detach().float()
        return linear

    def codes(self) -> Tensor:
        """The integer codes [out, in]: int8, or uint8 for asymmetric 8-bit codes."""
        return unpack(self.weight_packed, self.bits, self.in_features, self.symmetric)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]: scale · (codes − zero)."""
        parts = {CODES: self.codes(), SCALE: self.weight_scale}
        return dequantize_weight(parts if self.weight_zero is None else {**parts, ZERO: self.weight_zero})

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in x's dtype, through the backend."""
        return self.backend.linear(self, x)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        groups = self.weight_scale.shape[1]
        kind = "symmetric" if self.symmetric else "asymmetric"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.bits} bits {kind}, {groups=}"


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [out, in] that `linear` stands for: a packed one's in float32, another's as it is."""
    weight: Tensor = linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight  # type: ignore[assignment]
    return weight.detach()


def pack_linears(block: nn.Module, names: Iterable[str], spec: WeightSpec) -> list[PackedLinear]:
    """Replace the linears `names` of `block` by packed ones of their sizes, still empty; in place.

    Args:
        spec: the bits, groups and kind of the codes; of 16 bits: nothing is replaced.
    Returns:
        The packed ones.
    """
    made: list[PackedLinear] = []
    for name in names if spec.bits < FLOAT_BITS else ():
        parent, _, child = name.rpartition(".")
        linear: Any = block.get_submodule(name)
        packed = PackedLinear(
            linear.in_features,
            linear.out_features,
            spec.bits,
            spec.group,
            spec.symmetric,
            linear.bias is not None,
            linear.weight.device,
        )
        setattr(block.get_submodule(parent), child, packed)
        made.append(packed)
    return made


def packed_tensors(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Tensors as the fuse stage stores them, with every `weight_codes` as `weight_packed`."""
    return {
        name.removesuffix(CODES) + PACKED if name.endswith(f".{CODES}") else name: (
            pack(tensor, bits) if name.endswith(f".{CODES}") else tensor
        )
        for name, tensor in tensors.items()
    }
