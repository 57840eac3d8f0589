"""`flatq eval`: perplexity and lm-eval tasks of a target, and of the baseline it is compared with.

Everything that can be wrong (the target, the texts, the tasks and their questions) is opened before anything is
measured. With a baseline, both models read a text together: how far they are apart is known window by window, with the
logits of one window of each in memory. Tasks are asked of one model after the other.

What a model has answered is kept (`evaluation/answers.py`), in RUN/eval/answers.sqlite of a run: an evaluation that was
killed goes on where it was. The result of a run is kept in RUN/eval/<name>.json, where the name says what was asked,
with a .md beside it, and a .xml where it was judged by gates; that of a shard in RUN/eval/shards/<name>.json.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatq_cli.config.locations import cache_dir
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.answers import NAME as ANSWERS
from flatq_cli.evaluation.answers import Answers
from flatq_cli.evaluation.evidence import Evidence, PairEvidence, WindowEvidence
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.evaluation.shard import WHOLE, Shard
from flatq_cli.stages.eval_request import EvalRequest, check_request, result_name
from flatq_cli.stages.judge import check_gates, judge_result
from flatq_cli.store import atomic
from flatq_cli.store.memory import take_peak
from flatq_cli.store.progress import Progress
from flatq_cli.store.versions import package_versions

if TYPE_CHECKING:
    from torch import Tensor

    from flatq_cli.data.texts import Text
    from flatq_cli.evaluation.harness import TaskSet
    from flatq_cli.evaluation.perplexity import Perplexity
    from flatq_cli.evaluation.targets import Target
    from flatq_cli.evaluation.tasks import Sample, TaskResults

FOLDER = "eval"
SHARDS = "shards"


@dataclass
class _Side:
    """One of the models of an evaluation, and what is known of it so far.

    `totals`: how many windows it cuts each text into, in all shards together.
    """

    target: Target
    answers: Answers
    totals: dict[str, int] = field(default_factory=dict)
    windows: dict[str, WindowEvidence] = field(default_factory=dict)
    pairs: dict[str, PairEvidence] = field(default_factory=dict)


def evaluate(request: EvalRequest, progress: Progress) -> EvalResult:
    """Measure the target of `request`, and its baseline if it has one, and judge it by its gates; a run keeps the
    result. A gate that fails is in the result, and no error here.

    Raises:
        UsageError: nothing to measure was asked for, a target, text or task does not exist or cannot be had, or a gate
            names what is not measured.
        WorkError: the harness failed, or the disk is full.
    """
    check_request(request)
    take_peak()  # what was needed before is not the evaluation's
    started = time.monotonic()
    sides = [_open_side(request, request.target, progress)]
    texts, tasks, contents = _open_questions(request, progress)
    if request.baseline is not None:
        sides.append(_open_side(request, request.baseline, progress))
    name = result_name(request, [text.name for text in texts], contents)
    samples: list[str] = []

    _measure_texts(sides, texts, request, progress)
    for side in sides[1:]:
        side.target.unload()  # one model in memory at a time
    read = time.monotonic()
    results = []
    for number, side in enumerate(sides):
        if number == 1:
            progress.log(f"baseline: {request.baseline}")
        begun = time.monotonic()
        asked = None if tasks is None else _ask_tasks(side, tasks, request, progress, samples)
        seconds = time.monotonic() - begun + read - started
        results.append(_result(side, asked, tasks, request, contents, seconds, name, progress))
        side.target.unload()
        side.answers.close()
        gc.collect()
    if request.log_samples is not None:
        atomic.write_text(request.log_samples, "".join(samples))
    result = replace(results[0], baseline=results[1] if len(results) > 1 else None)
    if request.shard == WHOLE:
        result = judge_result(result, request.gates)
    if (Path(request.target) / "run.yaml").is_file():
        keep_result(Path(request.target), result, progress)
    return result


def check_all(request: EvalRequest, progress: Progress) -> None:
    """Find what would end `evaluate`, before there is a target: texts, tasks and their questions, gates, the baseline.

    Raises:
        UsageError: as `evaluate`.
    """
    from flatq_cli.evaluation.targets import open_target

    check_request(request)
    _open_questions(request, progress)
    if request.baseline is not None:
        open_target(request.baseline, request.device, request.trust_remote_code)


def keep_result(run: Path, result: EvalResult, progress: Progress) -> None:
    """Write a result into its run: RUN/eval/<name>.json and .md, and .xml if it was judged by gates; that of a shard
    into RUN/eval/shards.
    """
    from flatq_cli.evaluation.junit import junit_xml
    from flatq_cli.evaluation.tables import evaluation_markdown

    folder, name, data = run / FOLDER, result.name, result.to_json()
    if result.shard != WHOLE:
        folder, name = folder / SHARDS, f"{name}-{result.shard.part}-of-{result.shard.of}"
    atomic.make_directory(folder)
    atomic.write_json(folder / f"{name}.json", data)
    atomic.write_text(folder / f"{name}.md", evaluation_markdown(data))
    if result.gates:
        atomic.write_text(folder / f"{name}.xml", junit_xml(data))
    else:  # verdicts of an earlier time are not of these figures
        (folder / f"{name}.xml").unlink(missing_ok=True)
    progress.log(f"written: {folder / name}.json")


def _open_side(request: EvalRequest, spec: str, progress: Progress) -> _Side:
    """The target of a request, or its baseline, which may be a float model whatever the backend; with kept answers."""
    from flatq_cli.evaluation.identity import identity
    from flatq_cli.evaluation.targets import open_target
    from flatq_cli.runtime.backends import choose_exact

    target = open_target(spec, request.device, request.trust_remote_code)
    backend = request.backend
    if target.kind != "float":
        backend = backend or choose_exact(target.device, target.dtype)
    elif spec != request.target:
        backend = None
    if backend is not None:
        target.compute_through(backend)
    folder = cache_dir() / FOLDER if target.run is None else target.run.path / FOLDER
    return _Side(target, Answers(folder / ANSWERS if request.cache else None, identity(target), progress.log))


def _open_questions(request: EvalRequest, progress: Progress) -> tuple[list[Text], TaskSet | None, dict[str, str]]:
    """The texts and the tasks that a request names, and what is in them: a name by each SHA-256.

    Raises:
        UsageError: one of them cannot be had, or a gate limits something else.
    """
    from flatq_cli.evaluation.harness import load_tasks

    contents: dict[str, str] = {}
    read_text = partial(_read_text, contents=contents, warn=progress.log)
    texts = _distinct([read_text(spec) for spec in dict.fromkeys(request.ppl)])
    tasks = load_tasks(request.tasks, read_text, request.data_dir, request.include_path) if request.tasks else None
    if tasks is not None:
        contents |= {questions.sha256: f"questions of {task}" for task, questions in tasks.data.items()}
    check_gates(request.gates, [text.name for text in texts], tasks, baseline=request.baseline is not None)
    return texts, tasks, contents


def _read_text(spec: str, contents: dict[str, str], warn: Callable[[str], None]) -> Text:
    """A text under the name of its results: what was asked for, of a file its stem; of `auto`, what that came to be.

    `contents` gets its name by its SHA-256.
    """
    from flatq_cli.data.texts import load_text

    text = load_text(spec, evaluation=True, warn=warn)
    text = text if spec == "auto" else replace(text, name=Path(spec).stem)
    contents[text.sha256] = text.name
    return text


def _distinct(texts: list[Text]) -> list[Text]:
    """Results are kept by the text's name; two files of one name would overwrite each other."""
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--ppl: two texts are called '{name}'; rename one of the files")
    return texts


def _measure_texts(sides: Sequence[_Side], texts: Sequence[Text], request: EvalRequest, progress: Progress) -> None:
    """Fill `totals`, `windows` and `pairs` of each side."""
    from flatq_cli.data.windows import evaluation_windows

    cut = [
        [evaluation_windows(text, side.target.tokenizer, request.seqlen, request.limit) for side in sides]
        for text in texts
    ]
    for text, windows in zip(texts, cut, strict=True):
        _measure_text(sides, text.name, windows, request.shard, progress)
        for side, found in zip(sides, windows, strict=True):
            side.totals[text.name] = len(found)
            evidence = side.windows[text.name]
            if evidence.losses:
                progress.log(f"perplexity of {text.name}{_of(side, sides)}: {_perplexity(evidence).value:.4f}")


def _measure_text(
    sides: Sequence[_Side], name: str, windows: Sequence[Tensor], shard: Shard, progress: Progress
) -> None:
    """One text: both models together where they read the same tokens, else one after the other."""
    import torch

    from flatq_cli.evaluation.windows import measure_pair, measure_windows

    indices = [[index for index in range(len(found)) if index in shard] for found in windows]
    if len(sides) == 2:
        ours, theirs = sides
        if torch.equal(*windows) and ours.target.vocabulary == theirs.target.vocabulary is not None:
            ours.windows[name], theirs.windows[name], ours.pairs[name] = measure_pair(
                (ours.target, theirs.target), (ours.answers, theirs.answers), windows[0], indices[0], progress
            )
            return
        progress.log(f"{name}: the two models have other tokens, so their predictions are not compared one by one")
    for side, found, wanted in zip(sides, windows, indices, strict=True):
        side.windows[name] = measure_windows(side.target, side.answers, found, wanted, progress)


def _of(side: _Side, sides: Sequence[_Side]) -> str:
    return "" if side is sides[0] else " of the baseline"


def _ask_tasks(
    side: _Side, tasks: TaskSet, request: EvalRequest, progress: Progress, samples: list[str]
) -> TaskResults:
    from flatq_cli.evaluation.answering import AnsweringLM
    from flatq_cli.evaluation.tasks import run_tasks

    target = side.target
    model = AnsweringLM(target.model, target.tokenizer, side.answers, progress, request.batch, request.shard)

    def log_sample(task: str, sample: Sample) -> None:
        samples.append(_json_line({"model": target.spec, "task": task, **sample}))

    return run_tasks(
        tasks,
        model,
        limit=request.limit,
        prompting=request.prompting,
        log_sample=None if request.log_samples is None else log_sample,
    )


def _json_line(sample: Sample) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _settings(side: _Side, request: EvalRequest, contents: dict[str, str]) -> dict[str, Any]:
    """What decides the figures of a model, for those who join shards; {} where this is none."""
    from flatq_cli.evaluation.identity import identity

    if request.shard == WHOLE:
        return {}
    return {
        "model": identity(side.target, by_content=True),
        "contents": contents,
        "windows": side.totals,
        "seqlen": request.seqlen,
        "limit": request.limit,
        "num_fewshot": request.prompting.num_fewshot,
        "chat_template": request.prompting.chat_template,
        "system_instruction": request.prompting.system_instruction,
        "fewshot_as_multiturn": request.prompting.fewshot_as_multiturn,
    }


def _result(
    side: _Side,
    asked: TaskResults | None,
    tasks: TaskSet | None,
    request: EvalRequest,
    contents: dict[str, str],
    seconds: float,
    name: str,
    progress: Progress,
) -> EvalResult:
    target = side.target
    result = EvalResult(
        target=target.spec,
        kind=target.kind,
        recipe=target.recipe,
        perplexity={text: _perplexity(found) for text, found in side.windows.items() if found.losses},
        tasks={} if asked is None else asked.figures,
        versions=_versions(with_harness=tasks is not None),
        seconds=round(seconds, 3),
        data={} if tasks is None else {task: questions.to_json() for task, questions in tasks.data.items()},
        peak=take_peak(),
        evidence=Evidence(
            windows=side.windows,
            pairs=side.pairs,
            tasks={} if asked is None else asked.evidence,
            groups={} if asked is None else asked.groups,
            settings=_settings(side, request, contents),
        ),
        shard=request.shard,
        name=name,
    )
    log_broken(result, progress)
    return result


def _perplexity(evidence: WindowEvidence) -> Perplexity:
    from flatq_cli.evaluation.perplexity import perplexity

    return perplexity(evidence.losses, evidence.seqlen)


def log_broken(result: EvalResult, progress: Progress) -> None:
    """Say which figures are no finite numbers."""
    figures = {f"the perplexity of {name}": ppl.value for name, ppl in result.perplexity.items()}
    for task, metrics in result.tasks.items():
        figures.update({f"{task}: {metric}": value for metric, value in metrics.items()})
    for name, value in figures.items():
        if not math.isfinite(value):
            progress.log(f"{name} is {value}: the model's output is broken; JSON has null there")


def _versions(with_harness: bool) -> dict[str, str]:
    versions = package_versions()
    return {**versions, "lm_eval": importlib.metadata.version("lm_eval")} if with_harness else versions
