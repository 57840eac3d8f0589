"""Windows of tokens, as the GPTQ line of papers cuts them.

The whole text is tokenised once, plainly: whatever the tokenizer puts at the start of a text (a BOS for Llama) is there
once, at the start of the text, and nothing is put between windows. The tokens are cut into consecutive windows without
overlap; a rest shorter than a window is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatq_cli.data.texts import Text
from flatq_cli.errors import UsageError


def calibration_windows(text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    """Choose windows of a text at random, without repetition.

    Args:
        text: what to cut.
        tokenizer: a transformers tokenizer.
        samples: how many windows. seqlen: tokens in a window.
        seed: of the choice; equal arguments give equal windows in equal order.
    Returns:
        int64 `[samples, seqlen]`.
    Raises:
        UsageError: the text is too short.
    Source: https://github.com/IST-DASLab/gptq, datautils.py; there windows start anywhere and may overlap.
    """
    return _chosen(_tokens(text, tokenizer), text, samples, seqlen, seed)


def available_windows(text: Text, tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    """As `calibration_windows`, but fewer where the text has no more than so many; the first are the same."""
    tokens = _tokens(text, tokenizer)
    return _chosen(tokens, text, max(1, min(samples, len(tokens) // seqlen)), seqlen, seed)


def _chosen(tokens: Tensor, text: Text, samples: int, seqlen: int, seed: int) -> Tensor:
    if len(tokens) < samples * seqlen:
        raise UsageError(
            f"{text.name} has {len(tokens):,} tokens; {samples:,} samples of {seqlen:,} need {samples * seqlen:,}: "
            "lower calibration.samples or calibration.seqlen, or give a longer text (calibration.data)"
        )
    windows = _cut(tokens, seqlen)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:samples]
    return windows[chosen]


def evaluation_windows(text: Text, tokenizer: Any, seqlen: int, limit: int | None = None) -> Tensor:
    """The first windows of a text.

    Args:
        text: what to cut.
        tokenizer: a transformers tokenizer.
        seqlen: tokens in a window.
        limit: at most so many windows; None: all.
    Returns:
        int64 `[n, seqlen]`, 1 ≤ n ≤ limit.
    Raises:
        UsageError: the text is shorter than one window, or seqlen or limit is below 1.
    """
    if seqlen < 2:
        raise UsageError(f"seqlen must be 2 or more, not {seqlen}: a token is predicted from those before it")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be 1 or more, not {limit}")
    tokens = _tokens(text, tokenizer)
    if len(tokens) < seqlen:
        raise UsageError(
            f"{text.name} has {len(tokens):,} tokens, less than one window of {seqlen:,}: "
            "lower seqlen, or give a longer text"
        )
    return _cut(tokens, seqlen)[:limit]


def _tokens(text: Text, tokenizer: Any) -> Tensor:
    # verbose=False: that the text is longer than the model's context is meant, so no warning about it
    ids = tokenizer(text.content, verbose=False, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(tokens: Tensor, seqlen: int) -> Tensor:
    count = len(tokens) // seqlen
    return tokens[: count * seqlen].view(count, seqlen)
