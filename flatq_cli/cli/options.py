"""What commands share: options under one name with one help text, the run that is meant when none is named, and JSON
files of results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flatq_cli.cli.console import log
from flatq_cli.cli.devices import Device
from flatq_cli.cli.tables import show_json
from flatq_cli.errors import UsageError


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


TASKS = "How tasks are asked"
"""The heading of options that are about tasks alone."""

_MODEL = typer.Option("--model", "-m", help="A preset (`flatq models`), a hub id, a model directory, or a .gguf file.")
Model = Annotated[str, _MODEL]
AnyModel = Annotated[str | None, _MODEL]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A bundled recipe (`flatq recipes`) or a YAML file.")]
RunDir = Annotated[Path | None, typer.Option("--run", help="The run's directory. (default: ./runs/MODEL-RECIPE)")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=V", help="Change a recipe key. Repeatable.")]
RunArgument = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run. (default: the last one used here)")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU if there is one.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repository brings.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Format = Annotated[str, typer.Option("--format", "-f", help="Format of the exported directory.")]
Tasks = Annotated[list[str], typer.Option("--tasks", help="lm-eval tasks, separated by commas; lastword:FILE is one.")]
Ppl = Annotated[list[str], typer.Option("--ppl", metavar="NAME|FILE", help="A text for perplexity. Repeatable.")]
Seqlen = Annotated[int, typer.Option("--seqlen", min=2, help="Tokens in a window of perplexity.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many windows, and questions of a task.")]
Batch = Annotated[
    str, typer.Option("--batch", metavar="N|auto", help="Questions in a forward pass; auto: as many as fit.")
]
Fewshot = Annotated[
    int | None,
    typer.Option("--num-fewshot", min=0, rich_help_panel=TASKS, help="Examples before each question of a task."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        rich_help_panel=TASKS,
        help="A folder with the tasks' questions as JSON lines: no network (docs/evaluation.md).",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        "--include-path", metavar="DIR", rich_help_panel=TASKS, help="A folder with lm-eval YAML files of your own."
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", rich_help_panel=TASKS, help="Put questions into the model's chat template."),
]
SystemInstruction = Annotated[
    str | None,
    typer.Option("--system-instruction", metavar="TEXT", rich_help_panel=TASKS, help="Text before every question."),
]
OneTurn = Annotated[
    bool,
    typer.Option(
        "--no-fewshot-as-multiturn",
        rich_help_panel=TASKS,
        help="Examples and question are one turn of the chat, not many.",
    ),
]
LogSamples = Annotated[
    Path | None,
    typer.Option(
        "--log-samples", metavar="FILE", rich_help_panel=TASKS, help="Write every question and answer, as JSON lines."
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Take every N-th question and window; `flatq eval merge` joins them."),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Ask everything again: neither keep answers nor take kept ones.")
]
Baseline = Annotated[str | None, typer.Option("--baseline", metavar="TARGET", help="A model to compare with.")]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write flatq.eval/1 JSON; - is stdout.")]
Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[TARGET]", help="A run, an exported or model directory, a hub id, a GGUF. (default: the last run)"
    ),
]


def last_run() -> Path:
    """The run that this folder used last; said on stderr, because the user did not name it."""
    from flatq_cli.store.last import last_run

    path = last_run()
    log(f"run: {path}")
    return path


def split_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names that were separated by commas, given in one option or several."""
    return tuple(name.strip() for group in names for name in group.split(",") if name.strip())


def read_batch(text: str) -> int | Literal["auto"]:
    """What `--batch` says.

    Raises:
        UsageError: it is neither a number above 0 nor `auto`.
    """
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch {text}: give a number of questions, 1 or more, or auto")
    return int(text)


def check_writable(file: str | Path | None, option: str = "--json") -> None:
    """Make the folder of the results; refuse a place that cannot be written before hours are spent on them."""
    if file is None or file == "-":
        return
    path = Path(file)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {file}: cannot write a file there")


def write_json(data: Mapping[str, Any], json_file: str) -> None:
    """Write a result to a file; `-` is stdout.

    Raises:
        UsageError: the file cannot be written.
    """
    if json_file == "-":
        show_json(data)
        return
    try:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {json_file}: {error.strerror}") from error
