"""How the folded weights of a block become codes.

`nearest` looks at a weight alone. `gptq` looks at what its linear reads when everything before it is quantized already:
the block runs on the quantized prefix's output, the second moment of each site's quantized output is taken, the linears
that read it are rounded, and the next site of the same block then sees them rounded.

The block runs site by site over all sequences. What does not change any more is not computed again: attention ends in
o_proj and the MLP in down_proj, so once one of these is rounded, its output is kept and stands for the module around
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatq_cli.calibration.learnable import WEIGHT_CLIP, transforms_from_plain
from flatq_cli.calibration.moments import SecondMoment, gptq_stride
from flatq_cli.calibration.precision import fast_matmuls, matmul_dtype, with_fast_linears
from flatq_cli.config.recipe import WeightSpec
from flatq_cli.models.families import Family, InputSite, Shapes
from flatq_cli.models.source import run_block
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
        block: the stock block with its sites attached; its own tensors are not used and may be on `meta`, and it is of
            no use afterwards.
        hidden: [samples, tokens, hidden], what the quantized blocks before this one put out, on any device; becomes
            what this one puts out.
        kwargs: what the block is called with besides.
        batch: samples in a forward pass.
    Raises:
        WorkError: inputs that are not numbers.
    """
    running = _BySite(running_block(block, running_tensors(folded)), family, hidden, kwargs, batch)
    rounded: Rounded = {}
    for site in family.sites:
        parts = _round_together(folded, site.readers, running.input_moment(site), spec)
        running.settle(site, {linear: dequantize_weight(parts[linear]) for linear in site.readers})
        rounded |= parts
    running.finish()
    return rounded


def _round_together(folded: FoldedBlock, linears: tuple[str, ...], moment: Tensor, spec: WeightSpec) -> Rounded:
    """The linears that read one input, as the rows of one weight."""
    weights = [folded.parameters[f"{linear}.weight"].float() for linear in linears]
    clips = [folded.weight_clips[linear] for linear in linears if linear in folded.weight_clips]
    together = gptq_weight(
        torch.cat(weights),
        moment,
        bits=spec.bits,
        group=spec.group,
        symmetric=spec.symmetric,
        clip=torch.cat(clips) if clips else None,
    )
    rows = [len(weight) for weight in weights]
    parts = {name: torch.split(tensor, rows) for name, tensor in together.items()}
    return {linear: {name: tensors[i].clone() for name, tensors in parts.items()} for i, linear in enumerate(linears)}


def running_tensors(folded: FoldedBlock, rounded: Rounded | None = None) -> dict[str, Tensor]:
    """What the block with its sites runs with, float32: folded parameters, rounded weights in their place, sites."""
    tensors = {name: tensor.float() for name, tensor in folded.parameters.items()}
    tensors |= {f"{linear}.weight": dequantize_weight(parts) for linear, parts in (rounded or {}).items()}
    return tensors | {f"sites.{name}": tensor for name, tensor in folded.sites.items()}


def running_block(block: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """`block` with all of its parameters, and the tensors of its sites, set to `tensors`; in place. Its linears are in
    bf16 where that is faster: what is rounded against is a model's inputs, which have more noise than that.
    """
    block.load_state_dict(dict(tensors), strict=True, assign=True)
    return with_fast_linears(block, next(iter(tensors.values())).device)


@torch.no_grad()
def run_running(block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The output of a `running_block` for a batch [samples, tokens, hidden] on its device."""
    with fast_matmuls(hidden.device):
        return run_block(block, hidden, dict(kwargs))


class _BySite:
    """A block that runs as far as a site, on all sequences, while what comes behind it is still to be rounded.

    Args:
        block: a `running_block`; its modules are replaced. Others: as in `round_gptq`.
    """

    def __init__(self, block: nn.Module, family: Family, hidden: Tensor, kwargs: Mapping[str, Any], batch: int) -> None:
        self.block, self.family, self.hidden, self.kwargs, self.batch = block, family, hidden, kwargs, batch
        self.device = next(block.parameters()).device
        self.known = _Known(self.device)

    def input_moment(self, site: InputSite) -> Tensor:
        """The second moment, float32 [width, width], of what the readers of `site` read: of many tokens, of some."""
        linear: Any = self.block.get_submodule(site.readers[0])
        windows, length, _ = self.hidden.shape
        every = gptq_stride(windows, length, linear.in_features)
        moment = SecondMoment(linear.in_features, self.device, every)
        kept = self.known.batches[site.name] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            moment.add(arguments[0].flatten(0, -2))
            kept.append(arguments[0].to(matmul_dtype(self.device)).to(self.hidden.device))
            raise _ReachedError  # what comes after it in the block does not matter here

        hook = linear.register_forward_pre_hook(note)
        for rows in self._batches():
            with contextlib.suppress(_ReachedError):
                run_running(self.block, self.hidden[rows].to(self.device), self.kwargs)
        hook.remove()
        return moment.total() / moment.rows

    def settle(self, site: InputSite, weights: Mapping[str, Tensor]) -> None:
        """Give the readers of `site` the weights they keep; what comes before them is not computed again."""
        for linear, weight in weights.items():
            module: Any = self.block.get_submodule(linear)
            module.weight.data = weight.to(module.weight.dtype)
        if site.producer is not None:
            self.block.set_submodule(site.producer, _StandIn(self.known, site.name))
            return
        # The reader is the last step of the module around it: its output is that module's.
        (reader,) = site.readers
        around = reader.rpartition(".")[0]
        for batch, read in enumerate(self.known.batches[site.name]):
            # Not through the module: its hook would quantize what is quantized.
            with fast_matmuls(self.device):
                output = nn.functional.linear(read.to(self.device), module.weight, module.bias)
            self.known.batches[site.name][batch] = output.to(read.device)
        self.block.set_submodule(around, _StandIn(self.known, site.name, around == self.family.attention))
        for earlier in self.family.sites:
            if earlier.producer is not None and earlier.name in self.known.batches:
                self.block.set_submodule(earlier.producer, nn.Identity())
                del self.known.batches[earlier.name]

    def finish(self) -> None:
        """When all sites are settled: `hidden` becomes the block's output."""
        for rows in self._batches():
            output = run_running(self.block, self.hidden[rows].to(self.device), self.kwargs)
            self.hidden[rows] = output.to(self.hidden)

    def _batches(self) -> Iterator[slice]:
        """The sequences of each batch, which is also `known`'s while it is worked on."""
        for number, first in enumerate(range(0, self.hidden.shape[0], self.batch)):
            self.known.number = number
            yield slice(first, first + self.batch)


class _Known:
    """What modules put out, for the stand-ins. Apart from the block, so that no cycle keeps this alive when the block
    is rounded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.number = 0
        """The batch that runs at the moment."""
        self.batches: dict[str, list[Tensor]] = {}
        """By site, for each batch: [samples, tokens, width], in the dtype of matmuls, where the hidden states are."""

    def of(self, site: str) -> Tensor:
        """What is known of `site` in the batch that runs at the moment."""
        return self.batches[site][self.number].to(self.device)


class _StandIn(nn.Module):
    """Stands for a module whose output is known; attention's comes in a tuple."""

    def __init__(self, known: _Known, site: str, attention: bool = False) -> None:
        super().__init__()
        self.known, self.site, self.attention = known, site, attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.known.of(self.site)
        return (output, None) if self.attention else output


class _ReachedError(Exception):
    """A forward pass has come as far as it was wanted."""
