"""Fitting one block: its transforms and clips learn to reproduce the block's own full-precision output.

Each step folds the transforms into the weights, quantizes them, runs the stock block with its sites attached, and
compares with the target: what is trained is what runs after fuse. Weights stay frozen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatq_cli.calibration.learnable import BlockParameters
from flatq_cli.calibration.precision import fast_matmuls, matmul_dtype
from flatq_cli.config.recipe import CalibrationSpec, WeightSpec
from flatq_cli.errors import WorkError
from flatq_cli.models.families import Family, Shapes
from flatq_cli.quantization.quantizers import fake_quantize_grouped
from flatq_cli.runtime.folding import fold, online_tensors

ErrorMeasure = Callable[[Tensor, Tensor], Tensor]


class FitResult(NamedTuple):
    """Output error of a block at its start and after training, by the recipe's measure, and the steps taken."""

    loss_before: float
    loss_after: float
    steps: int


class QuantizedBlock:
    """A stock block with its sites attached, run with tensors that a `BlockParameters` gives.

    Args:
        block: float32 stock block with `OnlineSite`s attached; its own tensors are never changed.
        weights: how linears are quantized.
    """

    def __init__(self, block: nn.Module, family: Family, shapes: Shapes, weights: WeightSpec) -> None:
        self.block, self.family, self.shapes, self.spec = block, family, shapes, weights
        self.parameters = {
            name: tensor.detach() for name, tensor in block.named_parameters() if not name.startswith("sites.")
        }

    def tensors(self, learnable: BlockParameters) -> dict[str, Tensor]:
        """Everything the block runs with, by name: folded and quantized parameters, online matrices, clips."""
        transforms = learnable.transforms()
        tensors = fold(self.parameters, transforms, self.family, self.shapes)
        if self.spec.bits < 16:
            clips = learnable.linear_clips()
            for linear in self.family.linears:
                name = f"{linear}.weight"
                tensors[name] = fake_quantize_grouped(
                    tensors[name], self.spec.bits, self.spec.group, self.spec.symmetric, clips.get(linear)
                )
        tensors |= {f"sites.{name}": tensor for name, tensor in online_tensors(transforms).items()}
        return tensors | {f"sites.{name}.clip": clip for name, clip in learnable.activation_clips().items()}

    def run(self, tensors: Mapping[str, Tensor], hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The block's output [batch, tokens, hidden] with `tensors` in place of its own."""
        output = functional_call(self.block, dict(tensors), (hidden,), dict(kwargs))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def fit_block(
    block: QuantizedBlock,
    learnable: BlockParameters,
    inputs: Tensor,
    targets: Tensor,
    kwargs: Mapping[str, Any],
    spec: CalibrationSpec,
    *,
    index: int,
    device: torch.device,
) -> FitResult:
    """Train `learnable` in place.

    Args:
        inputs, targets: [samples, tokens, hidden], the full-precision block's input and output, on any device.
        index: the block's number, for messages.
    Returns:
        The errors over all samples; over the first window alone where the recipe trains nothing.
    Raises:
        WorkError: a loss that is not a number, or a transform that has no inverse (block, step and the parameters
            concerned).
    Source: FlatQuant (arXiv 2410.09426), eq. 4: min ‖F(X) − F̂(X; Θ)‖²; the measures: `error_measure`.
    """
    measure = error_measure(spec.loss, targets)
    steps = spec.epochs * math.ceil(inputs.shape[0] / spec.batch) if any(True for _ in learnable.parameters()) else 0
    # Nothing is decided by the error of a block that is not trained: one window tells enough.
    looked_at = slice(None if steps else 1)
    with _singular_is_an_error(index, 0, learnable):
        before = evaluate_block(
            block, learnable, inputs[looked_at], targets[looked_at], kwargs, measure, spec.batch, device
        )
    if not math.isfinite(before):
        raise WorkError(_not_finite(index, 0, learnable))
    if steps == 0:
        return FitResult(before, before, 0)
    start = {name: tensor.detach().clone() for name, tensor in learnable.state_dict().items()}
    optimizer, scheduler = _optimizer(learnable, spec, steps)
    for step in range(steps):
        rows = _batch(step, inputs.shape[0], spec.batch)
        hidden, target = inputs[rows].to(device), targets[rows].to(device)
        with _singular_is_an_error(index, step, learnable):
            tensors = block.tensors(learnable)
        with _autocast(device):
            output = block.run(tensors, hidden, kwargs)
        loss = measure(output.float(), target.float())
        if not torch.isfinite(loss):
            raise WorkError(_not_finite(index, step, learnable))
        optimizer.zero_grad(set_to_none=True)
        minimized: Tensor = loss.log() if spec.loss == "log" and loss > 0 else loss
        minimized.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    with _singular_is_an_error(index, steps, learnable):
        after = evaluate_block(block, learnable, inputs, targets, kwargs, measure, spec.batch, device)
    if not math.isfinite(after):
        raise WorkError(_not_finite(index, steps, learnable))
    if after > before:
        # A start in closed form can be better than what a few coarse steps reach: then it stays.
        learnable.load_state_dict(start)
        after = before
    return FitResult(before, after, steps)


def error_measure(loss: str, targets: Tensor) -> ErrorMeasure:
    """How far an output is from its target, both float32 [batch, tokens, hidden], as a scalar.

    `token`: each token's squared error relative to that token's own output, averaged. The norms that follow scale every
    token to the same size, so a share of its own size is what a token passes on; a few tokens with massive activations
    would otherwise make up nearly all of the loss.
    `relative`, `log`: squared error over the mean power of all of the block's outputs, as in the paper up to a factor.
    """
    if loss == "token":
        return _token_error
    power = float(targets.float().pow(2).mean()) or 1.0
    return lambda output, target: (output - target).pow(2).mean() / power


def _token_error(output: Tensor, target: Tensor) -> Tensor:
    power = target.pow(2).sum(-1)
    return ((output - target).pow(2).sum(-1) / torch.where(power > 0, power, 1.0)).mean()


@torch.no_grad()
def evaluate_block(
    block: QuantizedBlock,
    learnable: BlockParameters,
    inputs: Tensor,
    targets: Tensor,
    kwargs: Mapping[str, Any],
    measure: ErrorMeasure,
    batch: int,
    device: torch.device,
) -> float:
    """The mean of `measure` over all samples."""
    tensors = block.tensors(learnable)
    # Cast once, not in every batch.
    weights = {f"{linear}.weight" for linear in block.family.linears}
    tensors |= {name: tensors[name].to(matmul_dtype(device)) for name in weights}
    total = 0.0
    for first in range(0, inputs.shape[0], batch):
        target = targets[first : first + batch].to(device).float()
        with fast_matmuls(device):
            output = block.run(tensors, inputs[first : first + batch].to(device), kwargs)
        total += float(measure(output.float(), target)) * target.shape[0]
    return total / inputs.shape[0]


def _batch(step: int, samples: int, batch: int) -> slice:
    """Batches in order, epoch after epoch; the last of an epoch may be smaller."""
    first = (step % math.ceil(samples / batch)) * batch
    return slice(first, min(first + batch, samples))


def _optimizer(
    learnable: BlockParameters, spec: CalibrationSpec, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a rate for transforms and one for clips, both decaying by a cosine to a thousandth."""
    groups = [
        {"params": list(learnable.transform_parameters()), "lr": spec.learning_rate},
        {"params": list(learnable.clip_parameters()), "lr": spec.clip_learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=spec.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=spec.learning_rate * 1e-3)
    return optimizer, cosine


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matmuls on CUDA; the folding and the quantizers' scales stay in float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _singular_is_an_error(index: int, step: int, learnable: BlockParameters) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise WorkError(_not_finite(index, step, learnable, "a transform has no inverse")) from error


def _not_finite(index: int, step: int, learnable: BlockParameters, what: str = "the loss is not a number") -> str:
    """What went wrong, which parameters are to blame (the largest, where all are numbers still), and what to do."""
    named = dict(learnable.named_parameters())
    bad = [name for name, value in named.items() if not torch.isfinite(value).all()]
    if not bad and named:
        largest = max(named, key=lambda name: float(named[name].detach().abs().max()))
        bad = [f"largest parameter: {largest}, {float(named[largest].detach().abs().max()):.1e}"]
    where = f" ({', '.join(bad[:3])})" if bad else ""
    return (
        f"block {index}, step {step}: {what}{where}; earlier blocks are saved: lower "
        f"calibration.learning_rate or use transform.init=balanced, with another --run"
    )
