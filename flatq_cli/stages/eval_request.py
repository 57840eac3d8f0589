"""What `flatq eval` is asked: its settings, what is wrong with them, and the name that the answer is kept under."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flatq_cli.config.gate_files import Gate
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.shard import WHOLE, Shard

_READABLE = 110
"""Characters of a name before its digits: file systems end names at 255 bytes."""


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        target: a run, an exported directory, a model directory, a hub id, a preset or a GGUF file.
        tasks: lm-eval tasks, and `lastword:TEXT`. ppl: texts for perplexity, by name or file.
        data_dir: the folder with the questions of the tasks; None: they come from the hub.
        include_path: a folder with YAML files of tasks.
        seqlen: tokens in a window of a text. limit: windows of each text and questions of each task; None for all.
        baseline: a second target, measured in the same way.
        batch: questions in a forward pass; "auto": as many as fit.
        prompting: how questions are put. device: "cpu" or "cuda".
        backend: what a quantized target computes through; None: the fastest that gives `reference`'s figures.
        cache: whether answers are kept, and those that are kept taken.
        shard: the part of the windows and questions to take. log_samples: a file for every question, in JSON lines.
        gates: limits on the figures (`config/gate_files.py`).
    """

    target: str
    tasks: tuple[str, ...] = ()
    ppl: tuple[str, ...] = ()
    seqlen: int = 2048
    limit: int | None = None
    baseline: str | None = None
    batch: int | Literal["auto"] = 1
    device: str = "cpu"
    prompting: Prompting = field(default_factory=Prompting)
    trust_remote_code: bool = False
    data_dir: Path | None = None
    include_path: Path | None = None
    backend: str | None = None
    cache: bool = True
    shard: Shard = WHOLE
    log_samples: Path | None = None
    gates: tuple[Gate, ...] = ()


def check_request(request: EvalRequest) -> None:
    """Find what is wrong with a request without opening a model: its numbers, and the questions in its `data_dir`.

    Raises:
        UsageError: nothing to measure was asked for, a number makes no sense, an option has nothing to work on,
            `data_dir` lacks a task's questions, or a gate needs what will not be measured.
    """
    from flatq_cli.evaluation.harness import local_questions

    if not request.tasks and not request.ppl:
        raise UsageError(
            "nothing to evaluate: give a text (--ppl FILE, --ppl wikitext2) or lm-eval tasks (--tasks piqa,arc_easy; "
            "--tasks lastword:FILE needs no network)"
        )
    _check_numbers(request)
    _check_tasks(request)
    _check_gates(request)
    if request.data_dir is not None:
        local_questions(request.tasks, request.data_dir)


def result_name(request: EvalRequest, texts: Sequence[str], contents: Mapping[str, str]) -> str:
    """The file name of a result, from all that decides its figures: `ppl-wikitext2-eval-2048-limit-8-1c9f04ab`.

    What a person asked can be read. The eight digits at the end stand for what a readable name has no place for: what
    is in texts, questions and task files, the baseline's path, the system instruction. A shard is called as the whole.

    Args:
        texts: the names of the texts. contents: the names of all texts and files of questions, by their SHA-256.
    """
    prompting = request.prompting
    parts = [f"ppl-{'+'.join(texts)}-{request.seqlen}"] if texts else []
    if request.tasks:
        parts.append("tasks-" + "+".join(Path(task).stem if ":" in task else task for task in request.tasks))
    for option, folder in (("data", request.data_dir), ("include", request.include_path)):
        if folder is not None:
            parts.append(f"{option}-{folder.resolve().name}")
    if prompting.num_fewshot is not None:
        parts.append(f"fewshot-{prompting.num_fewshot}")
    if prompting.system_instruction is not None:
        parts.append("system")
    if prompting.chat_template:
        parts.append("chat" if prompting.fewshot_as_multiturn is not False else "chat-in-one-turn")
    if request.limit is not None:
        parts.append(f"limit-{request.limit}")
    if request.device != "cpu":
        parts.append(request.device)
    if request.baseline is not None:
        parts.append(f"against-{Path(request.baseline).name}")
    name = re.sub(r"[^\w.+-]+", "-", "-".join(parts))
    return f"{name[:_READABLE]}-{_digest(request, contents, name)}"


def _digest(request: EvalRequest, contents: Mapping[str, str], name: str) -> str:
    folder = request.include_path
    files = [] if folder is None else sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".py"))
    content = {
        "name": name,
        "tasks": request.tasks,
        "contents": dict(contents),
        "include": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "system": request.prompting.system_instruction,
        "baseline": request.baseline,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _check_numbers(request: EvalRequest) -> None:
    for option, value, least in (
        ("--seqlen", request.seqlen, 2),
        ("--limit", request.limit, 1),
        ("--batch", None if request.batch == "auto" else request.batch, 1),
        ("--num-fewshot", request.prompting.num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option}: {value} is less than {least}")


def _check_tasks(request: EvalRequest) -> None:
    """Options that are about tasks need some, and some of them exclude each other."""
    prompting = request.prompting
    about_tasks = {
        f"--data-dir {request.data_dir}": request.data_dir is not None,
        f"--include-path {request.include_path}": request.include_path is not None,
        "--log-samples": request.log_samples is not None,
        "--num-fewshot": prompting.num_fewshot is not None,
        "--apply-chat-template": prompting.chat_template,
        "--system-instruction": prompting.system_instruction is not None,
    }
    given = next((option for option, given in about_tasks.items() if given), None)
    if given is not None and not request.tasks:
        raise UsageError(f"{given}: is about the questions of --tasks, and no task is given")
    if request.data_dir is not None and prompting.num_fewshot:
        raise UsageError("--num-fewshot: --data-dir has no examples beside the questions themselves; leave it out")
    if prompting.fewshot_as_multiturn is not None and not prompting.chat_template:
        raise UsageError("--no-fewshot-as-multiturn: turns are those of a chat; it needs --apply-chat-template")


def _check_gates(request: EvalRequest) -> None:
    """What can be said of gates before texts and tasks are opened: the whole, where only texts are asked for."""
    from flatq_cli.evaluation.gate_metrics import assign, check_baseline, expected

    if not request.gates:
        return
    if request.shard != WHOLE:
        raise UsageError("--gates: a shard has a part of the figures; give the gates to `flatq eval merge`")
    if request.baseline is None:
        check_baseline(request.gates)
    if not request.tasks and "auto" not in request.ppl:
        texts = [Path(text).stem for text in request.ppl]
        assign(request.gates, expected(texts, {}), baseline=request.baseline is not None)
