"""`flatq generate`: text from any target, as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flatq_cli.cli.console import duration, log, open_progress
from flatq_cli.cli.devices import Device, resolve_device
from flatq_cli.cli.errors import command_errors
from flatq_cli.cli.options import (
    Backend,
    Debug,
    DeviceOption,
    Dtype,
    RemoteCode,
    Target,
    check_writable,
    last_run,
    write_json,
)
from flatq_cli.cli.tables import size
from flatq_cli.errors import UsageError

if TYPE_CHECKING:
    from flatq_cli.stages.generate import GenerateResult

INTERRUPTED = 130
"""What a shell gives for a process that SIGINT ended."""


def generate(
    target: Target = None,
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
    device: DeviceOption = Device.auto,
    backend: Annotated[
        Backend, typer.Option("--backend", help="What computes a packed model (`flatq doctor` lists what works here).")
    ] = Backend.auto,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="(default: float32 on the CPU, the model's own on a GPU)")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write flatq.generate/1 JSON; - is stdout.")
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The text alone.")] = False,
    debug: Debug = False,
) -> None:
    """Go on from a prompt with text, as it comes, and say how fast it came.

    The text goes to stdout, all else to stderr. Ctrl-C ends it early.
    """
    with command_errors(debug), open_progress(quiet) as progress:
        text = _prompt(prompt)
        check_writable(json_file)
        target = target or str(last_run())
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
        if json_file is not None:
            write_json(result.to_json(), json_file)
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
