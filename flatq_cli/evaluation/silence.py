"""lm-eval, kept to errors: stdout carries results alone, and progress is flatq's own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness to errors: no bars of its own, no warnings about how it was called, nothing on stdout.

    It has no switch for its bars, and prints to stdout, which carries results alone.
    """
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    start = tqdm.__init__

    def start_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with (
            mock.patch.object(tqdm, "__init__", start_disabled),
            # The bootstrap would fork the process, model and all, once for each core.
            mock.patch.dict(os.environ, {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}),
            contextlib.redirect_stdout(io.StringIO()),
            # Metrics of scikit-learn warn of classes that no question has.
            warnings.catch_warnings(),
            # It asks git, pip and nvidia-smi about the machine, aloud; flatq records versions itself.
            mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
            mock.patch("lm_eval.evaluator.add_env_info", return_value=None),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
