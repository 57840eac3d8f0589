"""`flatq eval merge`: the shards of an evaluation become its result; a run keeps it, as it keeps any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatq_cli.evaluation.merging import merge as join
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.stages.evaluate import keep_result, log_broken
from flatq_cli.store.progress import Progress


def merge(files: Sequence[Path], progress: Progress) -> EvalResult:
    """Join the results of shards; where the run that they measured is found, it keeps the whole.

    Raises:
        UsageError: files that are not the shards of one evaluation, all of them.
    """
    result = join(files)
    for side in (result, result.baseline):
        if side is not None:
            log_broken(side, progress)
    if (Path(result.target) / "run.yaml").is_file():
        keep_result(Path(result.target), result, progress)
    return result
