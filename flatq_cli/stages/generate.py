"""`flatq generate`: what any target says to a prompt, handed on as it comes, and how fast it came.

Prefill is the time until the first token is there, decode the time from there to the last: a prompt of many tokens and
a long answer cost different things. Of a model's own `generation_config` only the special tokens count. Its defaults
for sampling, which differ from model to model, are left out, so that a temperature of 0 is greedy and two targets
compare.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer, set_seed

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.targets import Kind, open_target
from flatq_cli.runtime.backends import AUTO, set_backend
from flatq_cli.store.memory import Peak, take_peak
from flatq_cli.store.progress import Progress
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "flatq.generate/1"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate.

    Attributes:
        target: a run, an exported directory, a model directory, a hub id, a preset or a GGUF file.
        temperature: 0 is greedy. top_p: sample from the likeliest tokens of so much probability.
        chat: the prompt is a user's message, put into the model's chat template.
        device: "cpu" or "cuda". backend: of a packed target, "auto" or a name of `runtime.backends`.
        dtype: one of DTYPES; None: float32 on the CPU, the model's own on a GPU.
    """

    target: str
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    device: str = "cpu"
    backend: str = AUTO
    dtype: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class GenerateResult:
    """What came; `to_json` gives schema `flatq.generate/1`.

    Attributes:
        text: what was written, without special tokens. new_tokens: with them.
        prefill_seconds: until the first token. decode_seconds: from the first to the last.
        backend: of a packed target; None for others. interrupted: by Ctrl-C; the rest is as far as it got.
    """

    target: str
    kind: Kind
    prompt_tokens: int
    new_tokens: int
    text: str
    prefill_seconds: float
    decode_seconds: float
    device: str
    dtype: str
    backend: str | None = None
    peak: Peak = field(default_factory=Peak)
    interrupted: bool = False

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds if self.new_tokens and self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after the first; None where there was one at most."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else None

    def to_json(self) -> dict[str, Any]:
        """The result in schema `flatq.generate/1`, ready for `json.dumps`."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "kind": self.kind,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "text": self.text,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "peak_memory_bytes": self.peak.resident,
            "peak_gpu_memory_bytes": self.peak.gpu,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "versions": package_versions(),
        }


def generate(request: GenerateRequest, write: Callable[[str], object], progress: Progress) -> GenerateResult:
    """Generate text and hand it to `write` piece by piece. Ctrl-C ends it early, with what there is by then.

    Raises:
        UsageError: a number that makes no sense, a target that cannot be opened, an empty prompt, a chat template that
            is not there, or a backend that the target does not have or that does not work here.
    """
    _check(request)
    take_peak()  # what was needed before is not the generation's
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    target = open_target(request.target, request.device, request.trust_remote_code, dtype)
    if target.kind != "packed" and request.backend != AUTO:
        raise UsageError(
            f"--backend {request.backend}: is for packed models, and {request.target} is {target.kind}; "
            "leave it out, or give an exported directory"
        )
    inputs = _encode(request, target.tokenizer)
    model = target.model()
    backend = _set_backend(model, request) if target.kind == "packed" else None
    model.generation_config = _settings(request, model, target.tokenizer)
    _warn_of_length(inputs, request, model, progress)
    set_seed(request.seed)
    stream = _Stream(target.tokenizer, write)
    interrupted = not _run(model, inputs.to(model.device), stream)
    return GenerateResult(
        target=request.target,
        kind=target.kind,
        prompt_tokens=inputs.shape[1],
        new_tokens=len(stream.moments) - 1,
        text="".join(stream.pieces),
        prefill_seconds=round(stream.first - stream.moments[0], 6),
        decode_seconds=round(stream.moments[-1] - stream.first, 6),
        device=request.device,
        dtype=str(target.dtype).removeprefix("torch."),
        backend=backend,
        peak=take_peak(),
        interrupted=interrupted,
    )


def _check(request: GenerateRequest) -> None:
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: {request.max_new_tokens} is less than 1")
    if request.temperature < 0:
        raise UsageError(f"--temperature: {request.temperature} is less than 0")
    if not 0 < request.top_p <= 1:
        raise UsageError(f"--top-p: {request.top_p} is not in (0, 1]")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UsageError(f"--dtype {request.dtype}: not one of {', '.join(DTYPES)}")


def _encode(request: GenerateRequest, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [1, tokens] of the prompt."""
    if request.chat:
        if not tokenizer.chat_template:
            raise UsageError(f"--chat: the tokenizer of {request.target} has no chat template; leave it out")
        message = [{"role": "user", "content": request.prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(request.prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"].long()
    if ids.shape[1] == 0:
        raise UsageError(f"the prompt is empty, and the tokenizer of {request.target} adds no token of its own to it")
    return ids


def _set_backend(model: PreTrainedModel, request: GenerateRequest) -> str | None:
    """Give a packed model of flatq's the backend that was asked for; its name, None for other methods' models."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method != "flatq":
        if request.backend == AUTO:
            return None
        raise UsageError(f"--backend {request.backend}: {request.target} is not in the format of flatq; leave it out")
    return set_backend(model, request.backend)


def _settings(request: GenerateRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How to choose tokens, as asked; where to stop, as the model says."""
    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0} if request.temperature else {}
    return GenerationConfig(
        max_new_tokens=request.max_new_tokens,
        do_sample=bool(sampling),
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=first_end if own.pad_token_id is None else own.pad_token_id,
        **sampling,
    )


def _warn_of_length(inputs: Tensor, request: GenerateRequest, model: PreTrainedModel, progress: Progress) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    asked = inputs.shape[1] + request.max_new_tokens
    if longest is not None and asked > longest:
        progress.log(f"{asked:,} tokens with the prompt's; {request.target} was made for {longest:,} at most")


def _run(model: PreTrainedModel, inputs: Tensor, stream: _Stream) -> bool:
    """Generate into `stream`; False where it was interrupted."""
    stream.begin()
    with _Interrupt() as interrupt:
        try:
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([interrupt]),
            )
        except KeyboardInterrupt:
            stream.end()  # what waited for the end of a word
            return False
    return not interrupt.came


class _Interrupt(StoppingCriteria):  # type: ignore[misc]  # transformers' criteria have no types
    """Ctrl-C as a reason to stop: an exception that comes where Python ignores it, in a destructor or in a callback of
    a library, would be lost, and the text would go on. Only the main thread is told of signals.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.came = True
        raise KeyboardInterrupt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.came, device=input_ids.device)


class _Stream(TextStreamer):  # type: ignore[misc]  # transformers' streamers have no types
    """Hands text on as soon as it is sure, and notes when each token came.

    Attributes:
        pieces: the text. moments: when it began, and when each new token was there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self.moments: list[float] = []
        self._write = write

    @property
    def first(self) -> float:
        """When the first token was there; when it began, if none came."""
        return self.moments[min(1, len(self.moments) - 1)]

    def begin(self) -> None:
        self.moments.append(time.perf_counter())

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.moments += [time.perf_counter()] * value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            self._write(text)
