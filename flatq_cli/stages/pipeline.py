"""`flatq run`: calibrate, fuse, export and eval, one after the other; what is done already is not done again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatq_cli.config.gate_files import Gate
from flatq_cli.config.pipeline_files import Pipeline
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.stages.calibrate import calibrate
from flatq_cli.stages.eval_request import EvalRequest
from flatq_cli.stages.evaluate import evaluate
from flatq_cli.stages.export import export, renew_card
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import Progress
from flatq_cli.store.run import Run


@dataclass(frozen=True)
class Outcome:
    """What a pipeline gave: the metrics of calibrate, fuse and export by their names, and what was measured."""

    made: dict[str, dict[str, Any]]
    evaluated: EvalResult


def evaluation_of(pipeline: Pipeline, gates: tuple[Gate, ...], run: Path, device: str) -> EvalRequest:
    """What eval is asked at the end: of neither texts nor tasks, the perplexity of the text `auto`."""
    step = pipeline.eval
    return EvalRequest(
        target=str(run),
        tasks=tuple(step.tasks),
        ppl=tuple(step.ppl) if step.ppl or step.tasks else ("auto",),
        seqlen=step.seqlen,
        limit=step.limit,
        baseline=step.baseline,
        batch=step.batch,
        device=device,
        prompting=Prompting(step.num_fewshot, step.apply_chat_template, step.system_instruction),
        trust_remote_code=pipeline.trust_remote_code,
        data_dir=_path(step.data_dir),
        include_path=_path(step.include_path),
        log_samples=_path(step.log_samples),
        gates=gates,
    )


def run_pipeline(run: Run, pipeline: Pipeline, request: EvalRequest, device: str, progress: Progress) -> Outcome:
    """Take `run` through all stages.

    Args:
        run: made for the pipeline's model and recipe. request: of `evaluation_of`. device: "cpu" or "cuda".
    Raises:
        FlatqError: anything a user can act on. A gate that failed is in the result and no error.
    """
    remote_code, step = pipeline.trust_remote_code, pipeline.export
    out = _path(step.out)
    made = {
        "calibrate": calibrate(run, device, progress, trust_remote_code=remote_code),
        "fuse": fuse(run, device, progress, trust_remote_code=remote_code),
        "export": export(run, step.format, out, progress),
    }
    evaluated = evaluate(request, progress)
    renew_card(run, step.format, out, progress)  # it gets the figures
    return Outcome(made, evaluated)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
