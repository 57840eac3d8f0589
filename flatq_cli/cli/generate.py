"""`flatq generate`: text from any target, as it comes."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flatq_cli.cli.console import duration, log, open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.tables import show_json, size
from flatq_cli.errors import UsageError

if TYPE_CHECKING:
    from flatq_cli.stages.generate import GenerateResult

INTERRUPTED = 130
"""What a shell gives for a process that SIGINT ended."""


class Backend(str, Enum):
    """What `--backend` takes; auto is the fastest that works here."""

    auto = "auto"
    reference = "reference"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """What `--dtype` takes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def generate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]", help="A run, an exported or model directory, a hub id, a GGUF. (default: the last run)"
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to go on from; - or none: from a pipe.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0, help="0: always the likeliest token; 1: as likely as it is.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest tokens of so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at random.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Annotated[
        Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")
    ] = Device.auto,
    backend: Annotated[
        Backend, typer.Option("--backend", help="What computes a packed model (`flatq doctor` lists what works here).")
    ] = Backend.auto,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="(default: float32 on the CPU, the model's own on a GPU)")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write flatq.generate/1 JSON; - is stdout.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository brings.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text alone.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Go on from a prompt with text, as it comes, and say how fast it came.

    The text goes to stdout, all else to stderr. Ctrl-C ends it early.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        text = _prompt(prompt)
        target = target or _last_run()
        from flatq_cli.stages import generate as stage

        request = stage.GenerateRequest(
            target=target,
            prompt=text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat,
            device=resolve_device(device),
            backend=backend.value,
            dtype=None if dtype is None else dtype.value,
            trust_remote_code=trust_remote_code,
        )
        result = stage.generate(request, _drop if json_file == "-" else _show, progress)
        if json_file != "-":
            print(flush=True)  # the text does not end its last line
        if not quiet:
            log(figures(result))
        _write(result, json_file)
        if result.interrupted:
            raise typer.Exit(INTERRUPTED)


def figures(result: GenerateResult) -> str:
    """Tokens, tokens a second and memory in a line."""
    parts = [
        f"prompt {result.prompt_tokens:,} tokens{_speed(result.prefill_rate)}",
        f"new {result.new_tokens:,} tokens{_speed(result.decode_rate)}",
        duration(result.prefill_seconds + result.decode_seconds),
    ]
    for name, peak in (("memory", result.peak.resident), ("GPU memory", result.peak.gpu)):
        if peak is not None:
            parts.append(f"{name} {size(peak)}")
    computed = f"{result.kind}, {result.dtype} on {result.device}"
    parts.append(computed if result.backend is None else f"{computed}, backend {result.backend}")
    return " · ".join([*parts, "interrupted"] if result.interrupted else parts)


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:,.1f}/s"


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _drop(piece: str) -> None:
    """The JSON has the text."""


def _prompt(prompt: str | None) -> str:
    """The prompt that was typed, or what comes from a pipe, without its last line break."""
    if prompt is not None and prompt != "-":
        return prompt
    missing = UsageError('no prompt: `flatq generate TARGET "PROMPT"`, or send it through a pipe')
    if prompt is None and sys.stdin.isatty():
        raise missing
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt that came through the pipe is not UTF-8 ({error})") from error
    if not text:
        raise missing
    return text.removesuffix("\n")


def _last_run() -> str:
    """The run that this folder used last; said on stderr, because the user did not name it."""
    from flatq_cli.store.last import last_run

    path = last_run()
    log(f"run: {path}")
    return str(path)


def _write(result: GenerateResult, json_file: str | None) -> None:
    if json_file == "-":
        show_json(result.to_json())
    elif json_file is not None:
        text = json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n"
        try:
            Path(json_file).parent.mkdir(parents=True, exist_ok=True)
            Path(json_file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--json {json_file}: {error.strerror}") from error
