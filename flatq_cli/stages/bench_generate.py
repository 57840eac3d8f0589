"""`flatq bench generate`: how fast an export runs through each backend, beside the model it was made from.

Models take turns, prompt after prompt, so that what else the machine does falls on all of them alike; a figure is the
median of its turns, and what counts are the ratios to the float model's in the same run. Prefill is a prompt up to its
first token; decode are the tokens after it, one at a time, with the cache that `generate` would use.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.targets import Target, open_target
from flatq_cli.runtime.backends import available, set_backend
from flatq_cli.runtime.kv_cache import PackedLayer
from flatq_cli.runtime.linear import PackedLinear
from flatq_cli.runtime.pack_cache import CACHE_NAMES
from flatq_cli.store.progress import Progress
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "flatq.bench-generate/1"
BFLOAT16 = 2  # bytes
FLOAT = "float"


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        target: an exported directory. baseline: a float target to compare with; None: the export alone.
        backends: names of `runtime.backends`; empty: those that work here.
        prompt: tokens of the prompt. new: tokens after it. turns: how often each model is measured.
        threads: of torch on the CPU; 0: as it chooses.
    """

    target: str
    baseline: str | None = None
    backends: tuple[str, ...] = ()
    prompt: int = 512
    new: int = 64
    turns: int = 3
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    threads: int = 0


def bench_generate(request: BenchRequest, progress: Progress) -> dict[str, Any]:
    """Measure; the figures in schema `flatq.bench-generate/1`.

    Raises:
        UsageError: a target that is no export, or a backend that does not work here.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    models = _models(request)
    ids = _prompt(request, next(iter(models.values())))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in progress.track(range(request.turns + 1), "bench"):
        for name, model in models.items():
            measured = _time(model, ids, request.new)
            if turn:  # the first one prepares weights and kernels
                times[name].append(measured)
    rows = [_row(name, model, times[name], request) for name, model in models.items()]
    _add_ratios(rows)
    return {
        "schema": SCHEMA,
        "target": request.target,
        "baseline": request.baseline,
        "prompt_tokens": request.prompt,
        "new_tokens": request.new,
        "dtype": str(request.dtype).removeprefix("torch."),
        "device": request.device,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "cache": _cache_bytes(next(model for name, model in models.items() if name != FLOAT), request),
        "versions": package_versions(),
    }


def _models(request: BenchRequest) -> dict[str, PreTrainedModel]:
    """The float model, if there is one, and the export once for each backend."""
    reasons = available()
    names = request.backends or tuple(name for name, why_not in reasons.items() if why_not is None)
    models: dict[str, PreTrainedModel] = {}
    if request.baseline is not None:
        models[FLOAT] = _open(request.baseline, request).model()
    for name in names:
        target = _open(request.target, request)
        if target.kind != "packed":
            raise UsageError(f"{request.target} is {target.kind}; this measures an exported directory")
        model = target.model()
        # Named by what it runs through: without packed linears that is `reference`, whatever was asked for.
        models[set_backend(model, name)] = model
    return models


def _open(spec: str, request: BenchRequest) -> Target:
    return open_target(spec, request.device, dtype=request.dtype)


def _prompt(request: BenchRequest, model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, request.prompt), generator=generator)
    return ids.to(model.device)


@torch.no_grad()
def _time(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after the first."""
    cache = {_cache_name(model): DynamicCache(config=model.config)}
    started = _now(ids.device)
    output = model(ids, **cache, use_cache=True, logits_to_keep=1)
    first = _now(ids.device)
    for _ in range(new):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, **cache, use_cache=True)
    return first - started, _now(ids.device) - first


def _cache_name(model: PreTrainedModel) -> str:
    """What this version of transformers calls the cache in a model's forward."""
    decoder: Any = model.base_model
    names = inspect.signature(decoder.forward).parameters
    return next(name for name in CACHE_NAMES if name in names)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _row(
    name: str, model: PreTrainedModel, times: Sequence[tuple[float, float]], request: BenchRequest
) -> dict[str, Any]:
    prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
    packed, unpacked = linear_bytes(model)
    return {
        "model": name,
        "prefill_tokens_per_second": request.prompt / prefill,
        "decode_tokens_per_second": request.new / decode,
        "linear_bytes": packed or unpacked,
        "linear_ratio": packed / unpacked if packed else None,
    }


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each row's speed over the float model's."""
    base = next((row for row in rows if row["model"] == FLOAT), None)
    if base is None:
        return
    for row in rows:
        for what in ("prefill", "decode"):
            key = f"{what}_tokens_per_second"
            row[f"{what}_ratio"] = row[key] / base[key]


def linear_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the state of the packed linears (codes, scales, zero points, biases), and of as many weights in bf16.

    A model without packed linears: 0, and the bytes of its blocks' linears in bf16.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    stored = sum(tensor.untyped_storage().nbytes() for module in packed for tensor in module.buffers())
    if packed:
        weights = sum(module.in_features * module.out_features for module in packed)
    else:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        weights = sum(module.weight.numel() for module in linears)
    return stored, BFLOAT16 * weights


@torch.no_grad()
def _cache_bytes(model: PreTrainedModel, request: BenchRequest) -> dict[str, Any]:
    """What the cache of the prompt and its continuation takes, allocated, against bf16."""
    tokens = request.prompt + request.new
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model(ids, **{_cache_name(model): cache}, use_cache=True, logits_to_keep=1)
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 2 * BFLOAT16 * tokens * config.num_key_value_heads * head_dim * config.num_hidden_layers
    stored = sum(layer.nbytes for layer in layers) if layers else plain
    return {"tokens": tokens, "bytes": stored, "bf16_bytes": plain, "ratio": stored / plain}
