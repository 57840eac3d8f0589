"""`flatq eval`: perplexity and lm-eval tasks of a target, and of the baseline it is compared with.

Everything that can be wrong (the target, the texts, the tasks and their questions) is opened before anything is
measured. The result of a run is kept in RUN/eval/<name>.json, where the name says what was asked, with a .md beside it.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.errors import UsageError
from flatq_cli.store import atomic
from flatq_cli.store.memory import Peak, take_peak
from flatq_cli.store.progress import Progress
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from flatq_cli.data.texts import Text
    from flatq_cli.evaluation.harness import TaskSet
    from flatq_cli.evaluation.perplexity import Perplexity
    from flatq_cli.evaluation.targets import Kind, Target

SCHEMA = "flatq.eval/1"
FOLDER = "eval"


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        target: a run, an exported directory, a model directory, a hub id, a preset or a GGUF file.
        tasks: lm-eval tasks, and `lastword:TEXT`. ppl: texts for perplexity, by name or file.
        data_dir: the folder with the questions of the tasks; None: they come from the hub.
        seqlen: tokens in a window of a text. limit: windows of each text and questions of each task; None for all.
        baseline: a second target, measured in the same way. batch: questions in a forward pass.
        device: "cpu" or "cuda". num_fewshot: examples before a question; None: as the task says.
        backend: what an export computes through; None: `reference`, which defines its results.
    """

    target: str
    tasks: tuple[str, ...] = ()
    ppl: tuple[str, ...] = ()
    seqlen: int = 2048
    limit: int | None = None
    baseline: str | None = None
    batch: int = 1
    device: str = "cpu"
    num_fewshot: int | None = None
    trust_remote_code: bool = False
    data_dir: Path | None = None
    backend: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """What was measured; `to_json` gives schema `flatq.eval/1`.

    Attributes:
        data: where the questions of tasks from a folder were read: `file`, `sha256`, `questions`.
        peak: the memory it took.
    """

    target: str
    kind: Kind
    recipe: str | None
    perplexity: dict[str, Perplexity]
    tasks: dict[str, dict[str, float]]
    versions: dict[str, str]
    seconds: float
    gates: tuple[dict[str, Any], ...] = ()
    baseline: EvalResult | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    peak: Peak = field(default_factory=Peak)

    def to_json(self) -> dict[str, Any]:
        """The result in schema `flatq.eval/1`, ready for `json.dumps`: a figure that is not finite is None."""
        result = {
            "schema": SCHEMA,
            "target": self.target,
            "kind": self.kind,
            "recipe": self.recipe,
            "perplexity": {
                name: {**asdict(measured), "value": _finite(measured.value)}
                for name, measured in self.perplexity.items()
            },
            "tasks": {
                task: {metric: _finite(value) for metric, value in metrics.items()}
                for task, metrics in self.tasks.items()
            },
            **({"data": self.data} if self.data else {}),
            "gates": list(self.gates),
            "versions": self.versions,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak.resident,
            "peak_gpu_memory_bytes": self.peak.gpu,
        }
        return result if self.baseline is None else {**result, "baseline": self.baseline.to_json()}


def check_request(request: EvalRequest) -> None:
    """Find what is wrong with a request without opening a model: its numbers, and the questions in its `data_dir`.

    Raises:
        UsageError: nothing to measure was asked for, a number makes no sense, or `data_dir` lacks a task's questions.
    """
    from flatq_cli.evaluation.harness import local_questions

    _check(request)
    if request.data_dir is not None:
        local_questions(request.tasks, request.data_dir)


def evaluate(request: EvalRequest, progress: Progress) -> EvalResult:
    """Measure the target of `request`, and its baseline if it has one; a run keeps the result.

    Raises:
        UsageError: nothing to measure was asked for, or a target, text or task does not exist or cannot be had.
        WorkError: the harness failed, or the disk is full.
    """
    from flatq_cli.evaluation.harness import load_tasks
    from flatq_cli.evaluation.targets import open_target

    check_request(request)
    take_peak()  # what was needed before is not the evaluation's
    started = time.monotonic()
    target = open_target(request.target, request.device, request.trust_remote_code)
    if request.backend is not None and target.kind != "packed":
        raise UsageError(f"--backend {request.backend}: is for exports, and {request.target} is {target.kind}")
    target.backend = request.backend
    read_text = partial(_read_text, warn=progress.log)
    texts = _distinct([read_text(spec) for spec in dict.fromkeys(request.ppl)])
    tasks = load_tasks(request.tasks, read_text, request.data_dir) if request.tasks else None
    baseline = open_target(request.baseline, request.device, request.trust_remote_code) if request.baseline else None

    result = _measure(target, texts, tasks, request, progress, started)
    if baseline is not None:
        del target  # one model in memory at a time
        gc.collect()
        progress.log(f"baseline: {request.baseline}")
        second = _measure(baseline, texts, tasks, request, progress, time.monotonic())
        result = replace(result, baseline=second)
    if (Path(request.target) / "run.yaml").is_file():
        name = result_name(request, [text.name for text in texts])
        _keep(Path(request.target) / FOLDER, name, result.to_json(), progress)
    return result


def result_name(request: EvalRequest, texts: Sequence[str]) -> str:
    """The file name of a result, from all that decides its figures: `ppl-wikitext2-eval-2048-limit-8`."""
    parts = [f"ppl-{'+'.join(texts)}-{request.seqlen}"] if texts else []
    if request.tasks:
        parts.append("tasks-" + "+".join(Path(task).stem if ":" in task else task for task in request.tasks))
    if request.data_dir is not None:
        parts.append(f"data-{request.data_dir.resolve().name}")
    if request.num_fewshot is not None:
        parts.append(f"fewshot-{request.num_fewshot}")
    if request.limit is not None:
        parts.append(f"limit-{request.limit}")
    if request.baseline is not None:
        parts.append(f"against-{Path(request.baseline).name}")
    name = re.sub(r"[^\w.+-]+", "-", "-".join(parts))
    # File systems end names at 255 bytes; a hash keeps long ones apart.
    return name if len(name) <= 120 else f"{name[:107]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _check(request: EvalRequest) -> None:
    if not request.tasks and not request.ppl:
        raise UsageError(
            "nothing to evaluate: give a text (--ppl FILE, --ppl wikitext2) or lm-eval tasks (--tasks piqa,arc_easy; "
            "--tasks lastword:FILE needs no network)"
        )
    for option, value, least in (
        ("--seqlen", request.seqlen, 2),
        ("--limit", request.limit, 1),
        ("--batch", request.batch, 1),
        ("--num-fewshot", request.num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option}: {value} is less than {least}")
    if request.data_dir is not None and not request.tasks:
        raise UsageError(f"--data-dir {request.data_dir}: holds the questions of --tasks, and no task is given")
    if request.data_dir is not None and request.num_fewshot:
        raise UsageError("--num-fewshot: --data-dir has no examples beside the questions themselves; leave it out")


def _read_text(spec: str, warn: Callable[[str], None]) -> Text:
    """A text under the name of its results: what was asked for, of a file its stem; of `auto`, what that came to be."""
    from flatq_cli.data.texts import load_text

    text = load_text(spec, evaluation=True, warn=warn)
    return text if spec == "auto" else replace(text, name=Path(spec).stem)


def _distinct(texts: list[Text]) -> list[Text]:
    """Results are kept by the text's name; two files of one name would overwrite each other."""
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--ppl: two texts are called '{name}'; rename one of the files")
    return texts


def _measure(
    target: Target, texts: list[Text], tasks: TaskSet | None, request: EvalRequest, progress: Progress, started: float
) -> EvalResult:
    from flatq_cli.data.windows import evaluation_windows
    from flatq_cli.evaluation.harness import run_tasks
    from flatq_cli.evaluation.perplexity import perplexity

    measured: dict[str, Perplexity] = {}
    scores: dict[str, dict[str, float]] = {}
    for text in texts:
        windows = evaluation_windows(text, target.tokenizer, request.seqlen, request.limit)
        measured[text.name] = perplexity(windows, target.logits(windows, progress))
        progress.log(f"perplexity of {text.name}: {measured[text.name].value:.4f}")
    if tasks is not None:
        scores = run_tasks(
            tasks,
            target.model(),
            target.tokenizer,
            progress,
            batch=request.batch,
            limit=request.limit,
            num_fewshot=request.num_fewshot,
        )
    _log_broken(measured, scores, progress)
    return EvalResult(
        target=target.spec,
        kind=target.kind,
        recipe=target.recipe,
        perplexity=measured,
        tasks=scores,
        versions=_versions(with_harness=tasks is not None),
        seconds=round(time.monotonic() - started, 3),
        data={} if tasks is None else {name: questions.to_json() for name, questions in tasks.data.items()},
        peak=take_peak(),
    )


def _log_broken(measured: dict[str, Perplexity], scores: dict[str, dict[str, float]], progress: Progress) -> None:
    figures = {f"the perplexity of {name}": ppl.value for name, ppl in measured.items()}
    for task, metrics in scores.items():
        figures.update({f"{task}: {metric}": value for metric, value in metrics.items()})
    for name, value in figures.items():
        if not math.isfinite(value):
            progress.log(f"{name} is {value}: the model's output is broken; JSON has null there")


def _versions(with_harness: bool) -> dict[str, str]:
    versions = package_versions()
    return {**versions, "lm_eval": importlib.metadata.version("lm_eval")} if with_harness else versions


def _keep(folder: Path, name: str, result: dict[str, Any], progress: Progress) -> None:
    from flatq_cli.evaluation.tables import evaluation_markdown

    atomic.make_directory(folder)
    atomic.write_json(folder / f"{name}.json", result)
    atomic.write_text(folder / f"{name}.md", evaluation_markdown(result))
    progress.log(f"written: {folder / name}.json")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
