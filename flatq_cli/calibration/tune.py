"""Tuning after rounding: the weight codes are fixed, and everything that is not a code learns to make up for them.

Once the codes of all blocks are chosen, much of a quantized model is still free: the online matrices (which no longer
need to be the inverse of what was folded into the weights), the clips of activations, keys and values, the norms'
weights and the scale of each row of a weight. All of them together learn, end to end, to give the full-precision
model's next-token distribution; what is written afterwards has the same names, shapes and dtypes as before.

The model need not be in memory as a whole: a step runs the blocks one after the other and keeps only their inputs,
then goes back through them, each run again with gradients (activation checkpointing by hand). As many of the last
blocks as memory allows keep what they need for that, and are not run twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatq_cli.calibration.divergence import head_gradient
from flatq_cli.calibration.precision import fast_matmuls, matmul_dtype
from flatq_cli.errors import WorkError
from flatq_cli.models.families import Family
from flatq_cli.quantization.weights import CODES, SCALE, ZERO, dequantize_weight

ROW_SCALE = "row_scale"
CLIP_LIMIT = 1e-4
"""Clips train as logits: a clip of exactly 0 or 1 starts this far inside."""


class TuneSettings(NamedTuple):
    """How tuning learns: AdamW without decay, a linear warm-up, then a cosine to zero."""

    steps: int
    learning_rate: float
    clip_rate: float
    """Clips learn this many times faster."""
    warmup: int
    gradient_norm: float = 1.0
    """A step's gradient is scaled down to this norm."""


class FreeNumbers(nn.Module):
    """What is free in one fused block, as parameters; `tensors()` are the values the block runs with.

    Args:
        fused: the block's fused tensors by name inside the block; float32 but for codes and zero points.
        family: which modules are linears.
    """

    def __init__(self, fused: Mapping[str, Tensor], family: Family) -> None:
        super().__init__()
        self.start: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.learned = nn.ParameterDict()
        for name, tensor in fused.items():
            kind = _kind(name, family)
            if kind is None:
                continue
            self.start[name], self.kinds[name] = tensor, kind
            self.learned[_key(name)] = nn.Parameter(_initial(kind, tensor))

    def tensors(self) -> dict[str, Tensor]:
        """Differentiable values by the name the running block knows them by (`self_attn.q_proj.row_scale`)."""
        return {
            name.replace(f".{SCALE}", f".{ROW_SCALE}"): _value(kind, self.start[name], self.learned[_key(name)])
            for name, kind in self.kinds.items()
        }

    def fused(self) -> dict[str, Tensor]:
        """The tuned tensors as they are stored, by their fused names."""
        with torch.no_grad():
            tuned = {
                name: _value(kind, self.start[name], self.learned[_key(name)]) for name, kind in self.kinds.items()
            }
            return {
                name: (self.start[name] * value[:, None] if self.kinds[name] == "rows" else value).detach().clone()
                for name, value in tuned.items()
            }

    def rates(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that learn at the plain rate, and clips."""
        clips = [self.learned[_key(name)] for name, kind in self.kinds.items() if kind == "clip"]
        others = [self.learned[_key(name)] for name, kind in self.kinds.items() if kind != "clip"]
        return others, clips


def _key(name: str) -> str:
    return name.replace(".", "/")


def _kind(name: str, family: Family) -> str | None:
    """How a fused tensor is tuned: a `matrix` T(I + Δ), a `clip` as a logit, a `norm` or the scales of `rows` as
    multipliers; None: not at all.
    """
    if name.startswith("sites."):
        return "clip" if name.endswith(".clip") else "matrix"
    module, _, leaf = name.rpartition(".")
    if module in family.linears:
        return "rows" if leaf == SCALE else None
    return "norm" if leaf == "weight" else None


def _initial(kind: str, start: Tensor) -> Tensor:
    if kind == "matrix":
        return torch.zeros_like(start)
    if kind == "clip":
        return torch.logit(start.clamp(CLIP_LIMIT, 1 - CLIP_LIMIT))
    return torch.ones(start.shape[0], dtype=start.dtype, device=start.device)


def _value(kind: str, start: Tensor, learned: Tensor) -> Tensor:
    if kind == "matrix":
        return start + start @ learned
    if kind == "clip":
        return torch.sigmoid(learned)
    return start * learned if kind == "norm" else learned


class RunningBlock:
    """A fused block that runs with `FreeNumbers`.

    Its matmuls are in bf16 where that is faster, and so are its weights.

    Args:
        block: the stock block with its sites attached; its own parameters are never read and may be on `meta`.
        fused: its fused tensors, as for `FreeNumbers`, all of them, on the device that works.
    """

    def __init__(self, block: nn.Module, fused: Mapping[str, Tensor], family: Family) -> None:
        self.block = block
        self.fixed = {name: t.float() for name, t in fused.items() if not name.endswith((CODES, SCALE, ZERO))}
        for linear in family.linears:
            module: Any = block.get_submodule(linear)
            weight = f"{linear}.weight"
            parts = {part: fused[f"{linear}.{part}"] for part in (CODES, SCALE, ZERO) if f"{linear}.{part}" in fused}
            if CODES in parts:
                self.fixed[weight] = dequantize_weight(parts)
                module.register_buffer(ROW_SCALE, torch.ones(module.out_features, device=parts[SCALE].device))
                module.register_forward_hook(_scale_rows)
            self.fixed[weight] = self.fixed[weight].to(matmul_dtype(self.fixed[weight].device))

    def run(self, tensors: Mapping[str, Tensor], hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The block's output, float32 [batch, tokens, hidden]."""
        with fast_matmuls(hidden.device):
            output = functional_call(self.block, {**self.fixed, **tensors}, (hidden,), dict(kwargs))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.float()


def _scale_rows(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """m·(W x) + b: the gradient of a row's scale from the output, without one for the whole weight."""
    scaled: Tensor = output * module.row_scale
    return scaled if module.bias is None else scaled + module.bias * (1 - module.row_scale)


def graph_bytes(block: RunningBlock, numbers: FreeNumbers, hidden: Tensor, kwargs: Mapping[str, Any]) -> int:
    """What a block keeps for its backward pass on `hidden` [batch, tokens, hidden], its own weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in block.fixed.values()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Held until the count is done: a freed tensor's place may be given to the next.
        output = block.run(numbers.tensors(), hidden.detach().requires_grad_(), kwargs)
    del output
    return sum(found.values())


class Tuner:
    """Trains the free numbers of all blocks together, one step at a time.

    Args:
        free: one for each block, trained in place.
        kept: so many blocks keep their graph between the two passes; results do not depend on it.
    """

    def __init__(self, free: Sequence[FreeNumbers], settings: TuneSettings, kept: int = 0) -> None:
        self.free, self.settings, self.steps_done, self.kept = free, settings, 0, kept
        pairs = [numbers.rates() for numbers in free]
        groups: list[dict[str, Any]] = [
            {"params": [p for others, _ in pairs for p in others], "lr": settings.learning_rate},
            {"params": [p for _, clips in pairs for p in clips], "lr": settings.learning_rate * settings.clip_rate},
        ]
        groups = [group for group in groups if group["params"]]
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.bases = [float(group["lr"]) for group in groups]

    def step(
        self,
        blocks: Callable[[int], RunningBlock],
        head: nn.Module,
        hidden: Tensor,
        target: Tensor,
        kwargs: Sequence[Mapping[str, Any]],
    ) -> float:
        """One step; returns the divergence before it.

        Args:
            blocks: block i, ready to run, on hidden's device; asked for once or twice in a step.
            head: final norm and head, hidden → logits.
            hidden: [batch, tokens, hidden], what block 0 reads. target: what the full-precision model's last block puts
                out for the same tokens.
            kwargs: what each block is called with.
        Raises:
            WorkError: a divergence that is not a number; what was learned before is kept.
        """
        factor = _rate(self.steps_done, self.settings)
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = base * factor
        loss = _gradients(self.free, blocks, head, hidden, target, kwargs, self.kept)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_norm)
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            raise WorkError(
                f"tuning, step {self.steps_done}: the divergence is not a number; what was rounded is saved: lower "
                "tune.learning_rate, with another --run"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return loss

    def state(self) -> dict[str, Tensor]:
        """Everything that a later process needs to go on: learned numbers, AdamW's moments, steps done."""
        tensors = {"steps_done": torch.tensor(self.steps_done)}
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{name}": moments[name].clone() for name in ("exp_avg", "exp_avg_sq", "step") if moments}
            tensors[f"{i}.value"] = parameter.detach().clone()
        return tensors

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state` of the same blocks and settings."""
        self.steps_done = int(state["steps_done"])
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(state[f"{i}.value"])
                names = [name for name in ("exp_avg", "exp_avg_sq", "step") if f"{i}.{name}" in state]
                if names:
                    # The fused AdamW counts its steps where the parameter is.
                    self.optimizer.state[parameter] = {n: state[f"{i}.{n}"].clone().to(parameter.device) for n in names}


def _rate(step: int, settings: TuneSettings) -> float:
    """Factor on the learning rate at `step`."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _gradients(
    free: Sequence[FreeNumbers],
    blocks: Callable[[int], RunningBlock],
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    kwargs: Sequence[Mapping[str, Any]],
    kept: int = 0,
) -> float:
    """Accumulate the gradient of the divergence into `free`; returns the divergence."""

    def run(index: int, entry: Tensor) -> Tensor:
        return blocks(index).run(free[index].tensors(), entry, kwargs[index])

    passed: list[tuple[Tensor, Tensor | None]] = []
    for i in range(len(free)):
        entry = hidden.detach()
        keep = i >= len(free) - kept
        with torch.set_grad_enabled(keep):
            hidden = run(i, entry.requires_grad_(keep))
        passed.append((entry, hidden if keep else None))
    loss, gradient = head_gradient(head, hidden, target)
    for i in reversed(range(len(free))):
        entry, output = passed.pop()
        if output is None:
            with torch.enable_grad():
                output = run(i, entry.requires_grad_())
        output.backward(gradient)  # type: ignore[no-untyped-call]
        assert entry.grad is not None
        gradient = entry.grad
    return loss
