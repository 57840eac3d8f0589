"""`flatq eval merge`: the shards of an evaluation become its result; a run keeps it, as it keeps any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatq_cli.config.gate_files import Gate
from flatq_cli.evaluation.merging import merge as join
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.stages.evaluate import keep_result, log_broken
from flatq_cli.stages.judge import judge_result
from flatq_cli.store.progress import Progress


def merge(files: Sequence[Path], progress: Progress, gates: Sequence[Gate] = ()) -> EvalResult:
    """Join the results of shards, and judge the whole by gates; where the run that they measured is found, it keeps it.

    Raises:
        UsageError: files that are not the shards of one evaluation, all of them; a gate names what was not measured.
    """
    result = judge_result(join(files), gates)
    for side in (result, result.baseline):
        if side is not None:
            log_broken(side, progress)
    if (Path(result.target) / "run.yaml").is_file():
        keep_result(Path(result.target), result, progress)
    return result
