"""How the folded weights of a block become codes.

`nearest` looks at a weight alone. `gptq` looks at what its linear reads when everything before it is quantized already:
the block runs on the quantized prefix's output, the second moment of each site's quantized output is taken, the linears
that read it are rounded, and the next site of the same block then sees them rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatq_cli.calibration.learnable import WEIGHT_CLIP, transforms_from_plain
from flatq_cli.calibration.moments import Recorder
from flatq_cli.calibration.precision import fast_matmuls
from flatq_cli.config.recipe import WeightSpec
from flatq_cli.models.families import Family, Shapes
from flatq_cli.quantization.gptq import gptq_weight
from flatq_cli.quantization.weights import dequantize_weight, round_weight
from flatq_cli.runtime.folding import fold, online_tensors
from flatq_cli.runtime.layout import SiteLayout

Rounded = dict[str, dict[str, Tensor]]
"""Codes and scales by linear."""


class FoldedBlock(NamedTuple):
    """A block after folding, before rounding.

    `parameters`: float64, by name inside the block. `sites`: float32 online matrices and clips, `attn_in.left`,
    `attn_in.clip`. `weight_clips`: [out, groups, 2] by linear.
    """

    parameters: dict[str, Tensor]
    sites: dict[str, Tensor]
    weight_clips: dict[str, Tensor]


def fold_block(
    stored: Mapping[str, Tensor],
    calibrated: Mapping[str, Tensor],
    layouts: Mapping[str, SiteLayout],
    family: Family,
    shapes: Shapes,
    device: torch.device,
) -> FoldedBlock:
    """Fold a block in float64.

    Args:
        stored: the block's parameters as the model has them. calibrated: the block's tensors of the calibrate stage.
    """
    parameters = {name: tensor.to(device, torch.float64) for name, tensor in stored.items()}
    plain = {name: tensor.to(device) for name, tensor in calibrated.items()}
    transforms = transforms_from_plain(plain, layouts, torch.float64)
    sites = {name: tensor.float() for name, tensor in online_tensors(transforms).items()}
    sites |= {f"{name}.clip": plain[f"{name}.clip"] for name, layout in layouts.items() if layout.clip}
    clips = {
        linear: plain[f"{linear}.{WEIGHT_CLIP}"] for linear in family.linears if f"{linear}.{WEIGHT_CLIP}" in plain
    }
    return FoldedBlock(fold(parameters, transforms, family, shapes), sites, clips)


def round_nearest(folded: FoldedBlock, family: Family, spec: WeightSpec) -> Rounded:
    """Each weight to its nearest codes."""
    return {
        linear: round_weight(
            folded.parameters[f"{linear}.weight"].float(),
            spec.bits,
            spec.group,
            spec.symmetric,
            folded.weight_clips.get(linear),
        )
        for linear in family.linears
    }


@torch.no_grad()
def round_gptq(
    folded: FoldedBlock,
    block: nn.Module,
    family: Family,
    spec: WeightSpec,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    batch: int,
) -> Rounded:
    """Each weight by GPTQ, site after site in the order in which the block runs them.

    Args:
        block: the stock float32 block with its sites attached, on the device that works; its own tensors are not used.
        hidden: [samples, tokens, hidden], what the quantized blocks before this one put out, on any device.
        kwargs: what the block is called with besides.
        batch: samples in a forward pass.
    Raises:
        WorkError: inputs that are not numbers.
    """
    tensors = running_tensors(folded)
    rounded: Rounded = {}
    for site in family.sites:
        moment = _input_moment(block, site.readers[0], tensors, hidden, kwargs, batch)
        for linear in site.readers:
            rounded[linear] = gptq_weight(
                folded.parameters[f"{linear}.weight"].float(),
                moment,
                bits=spec.bits,
                group=spec.group,
                symmetric=spec.symmetric,
                clip=folded.weight_clips.get(linear),
            )
            tensors[f"{linear}.weight"] = dequantize_weight(rounded[linear])
    return rounded


def running_tensors(folded: FoldedBlock, rounded: Rounded | None = None) -> dict[str, Tensor]:
    """What the block with its sites runs with, float32: folded parameters, rounded weights in their place, sites."""
    tensors = {name: tensor.float() for name, tensor in folded.parameters.items()}
    tensors |= {f"{linear}.weight": dequantize_weight(parts) for linear, parts in (rounded or {}).items()}
    return tensors | {f"sites.{name}": tensor for name, tensor in folded.sites.items()}


@torch.no_grad()
def run_with(
    block: nn.Module, tensors: Mapping[str, Tensor], hidden: Tensor, kwargs: Mapping[str, Any], batch: int
) -> Tensor:
    """The block's output [samples, tokens, hidden] with `tensors` in place of its own; where `hidden` is.

    Matmuls are in bf16 where that is faster: what is rounded against is a model's inputs, which have more noise than
    that.
    """
    device = next(iter(tensors.values())).device
    outputs = torch.empty_like(hidden)
    for first in range(0, hidden.shape[0], batch):
        rows = slice(first, first + batch)
        with fast_matmuls(device):
            output = functional_call(block, dict(tensors), (hidden[rows].to(device),), dict(kwargs))
        outputs[rows] = (output[0] if isinstance(output, tuple) else output).to(outputs)
    return outputs


def _input_moment(
    block: nn.Module,
    linear: str,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    batch: int,
) -> Tensor:
    """The second moment, float32 [in, in], of what `linear` reads (behind its site's hook)."""
    recorder = Recorder(tensors[f"{linear}.weight"].shape[1])

    def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        recorder(arguments[0])
        raise _ReachedError  # what comes after it in the block does not matter here

    hook = block.get_submodule(linear).register_forward_pre_hook(record)
    try:
        for rows in torch.split(hidden, batch):
            with contextlib.suppress(_ReachedError):
                run_with(block, tensors, rows, kwargs, batch)
    finally:
        hook.remove()
    return recorder.moment.float()


class _ReachedError(Exception):
    """A forward pass has come as far as it was wanted."""
