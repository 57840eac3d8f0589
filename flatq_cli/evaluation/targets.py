"""What can be evaluated, and how its logits are had.

    a run                                        fake-quant: its fused blocks, one in memory at a time
    an exported directory (or hub id)            packed: transformers loads it with flatq's quantizer
    a model directory, hub id, preset or GGUF    float: one block at a time where flatq knows the family, else whole

Perplexity streams where it can, so that a model larger than memory can be measured; lm-eval needs the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flatq_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from flatq_cli.models.locate import ModelLocation
    from flatq_cli.models.source import BlockSource
    from flatq_cli.store.progress import Progress
    from flatq_cli.store.run import Run

Kind = Literal["float", "fake-quant", "packed"]
RUN_FILE = "run.yaml"


@dataclass
class Target:
    """A model to evaluate.

    Attributes:
        spec: what the user typed. kind: as in schema `flatq.eval/1`. recipe: the name of its recipe; None for float.
        location: its files; of a run those of the original model, whose config and tokenizer it has.
        vocabulary: how many tokens its logits are about, where its config says so.
        tokenizer: its tokenizer. device, dtype: where and in what it computes.
        load: loads the whole model, on the CPU or where it pleases.
        source: its blocks, if it can be streamed. run: the run that it is.
        backend: what a model of flatq's computes through (`runtime/backends`); None: `reference`.
    """

    spec: str
    kind: Kind
    recipe: str | None
    location: ModelLocation
    vocabulary: int | None
    tokenizer: PreTrainedTokenizerBase
    device: str
    dtype: torch.dtype
    load: Callable[[], PreTrainedModel]
    source: BlockSource | None = None
    run: Run | None = None
    backend: str | None = None
    _model: PreTrainedModel | None = field(default=None, repr=False)

    def compute_through(self, backend: str) -> None:
        """Choose the backend, before a weight is read.

        Raises:
            UsageError: it does not work here, or the target is a float model.
        """
        from flatq_cli.runtime.backends import AUTO, check_backend, choose
        from flatq_cli.runtime.fused import FusedSource

        if self.kind == "float":
            raise UsageError(f"--backend {backend}: {self.spec} is a float model; leave it out")
        check_backend(backend, self.device, self.dtype)
        self.backend = backend = choose(self.device, self.dtype) if backend == AUTO else backend
        if isinstance(self.source, FusedSource):
            self.source.backend = backend

    def model(self) -> PreTrainedModel:
        """The whole model on `device`, ready to answer; loaded the first time it is asked for."""
        if self._model is None:
            self._model = self.load().to(self.device).eval()
            if self.backend is not None:
                from flatq_cli.runtime.backends import set_backend

                set_backend(self._model, self.backend)
        return self._model

    def unload(self) -> None:
        """Let go of the model, if it was loaded."""
        self._model = None

    def logits(self, windows: Tensor, progress: Progress) -> Iterator[Tensor]:
        """Logits `[s, vocab]` of each of the windows, int64 `[n, s]`, in their order.

        A model that is not loaded is read block by block before this returns; the logits are then made one by one.
        """
        from flatq_cli.evaluation.perplexity import model_logits, streamed_logits

        if self._model is None and self.source is not None:
            return streamed_logits(self.source, windows, progress, self.device, self.dtype)
        return model_logits(self.model(), windows)


def open_target(spec: str, device: str, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Target:
    """Find out what `spec` names and open it; weights are read later.

    Args:
        spec: a run, an exported directory, a model directory, a hub id, a preset, or a `.gguf` file.
        device: "cpu" or "cuda".
        dtype: what to compute in; None: float32 on the CPU, the model's own dtype on a GPU.
    Raises:
        UsageError: there is no such thing, it is damaged, or it is a run that is not fused yet.
    """
    if (Path(spec) / RUN_FILE).is_file():
        return _run_target(spec, device, trust_remote_code, dtype)
    from flatq_cli.models.families import supported_model_types
    from flatq_cli.models.locate import load_config, load_tokenizer, locate
    from flatq_cli.runtime.integrity import check_files

    try:
        location = locate(spec)
    except UsageError as error:
        if Path(spec).exists():
            raise
        # `locate` speaks of models only; the user may have meant a run.
        raise UsageError(f"{spec}: there is no run; nor a model: {str(error).removeprefix('--model: ')}") from error
    if location.kind == "directory":
        # Before its config is believed: a damaged one may not even say that this is an export.
        check_files(location.path)
    quantization = _quantization(location)
    if quantization.get("quant_method") == "flatq":
        import flatq_cli.runtime.transformers_plugin  # noqa: F401  (registers the quantizer)
    config = load_config(location, trust_remote_code)
    tokenizer = load_tokenizer(location, trust_remote_code)
    dtype = dtype or _compute_dtype(device, getattr(config, "dtype", None))

    def load_whole() -> PreTrainedModel:
        return _load_whole(location, dtype, trust_remote_code)

    target = Target(
        spec=spec,
        kind="packed" if quantization else "float",
        recipe=_recipe_name(quantization),
        location=location,
        vocabulary=_vocabulary(config),
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        load=load_whole,
    )
    if quantization or config.model_type not in supported_model_types():
        return target
    from flatq_cli.models.source import open_source

    source = open_source(location, trust_remote_code=trust_remote_code)
    return replace(target, source=source, load=lambda: source.assemble(None, dtype, device))


def _run_target(spec: str, device: str, trust_remote_code: bool, dtype: torch.dtype | None) -> Target:
    from flatq_cli.models.locate import load_tokenizer
    from flatq_cli.runtime.fused import open_fused
    from flatq_cli.store.run import Run

    run = Run.open(Path(spec))
    source = open_fused(run, trust_remote_code=trust_remote_code)
    dtype = dtype or _compute_dtype(device, getattr(source.config, "dtype", None))
    return Target(
        spec=spec,
        kind="fake-quant",
        recipe=run.config.recipe_name,
        location=source.location,
        vocabulary=_vocabulary(source.config),
        tokenizer=load_tokenizer(source.location, trust_remote_code),
        device=device,
        dtype=dtype,
        load=lambda: source.assemble(lambda index: source.block(index, dtype, device), dtype, device),
        source=source,
        run=run,
    )


def _vocabulary(config: PreTrainedConfig) -> int | None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


def _compute_dtype(device: str, stored: Any) -> torch.dtype:
    """float32 on the CPU; on a GPU the model's own dtype, bfloat16 if it is not a 16-bit one."""
    import torch

    if device == "cpu":
        return torch.float32
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def _quantization(location: ModelLocation) -> dict[str, Any]:
    """`quantization_config` of a model directory, {} where there is none (a GGUF is dequantized as it is read)."""
    if location.kind == "gguf":
        return {}
    try:
        config = json.loads((location.path / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{location.path / 'config.json'}: not a JSON object ({error})") from error
    return quantization if isinstance(quantization, dict) else {}


def _recipe_name(quantization: dict[str, Any]) -> str | None:
    name = quantization.get("recipe_name")
    return name if isinstance(name, str) else None


def _load_whole(location: ModelLocation, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model as transformers loads it, dequantized where it is a GGUF."""
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(location.path)}
    if location.kind == "gguf":
        where = {"pretrained_model_name_or_path": str(location.path.parent), "gguf_file": location.path.name}
    try:
        return AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{location.path}: transformers cannot load it: {reason}") from error
