"""Perplexity, as the GPTQ line of papers measures it, with no more of the model in memory than one block.

A text is cut into consecutive windows of `seqlen` tokens (`flatq_cli.data.windows`). A window's loss is the mean
negative log-likelihood of its tokens given those before them *in the window*; the mean over windows, exponentiated, is
the perplexity. Where the logits come from does not matter: a loaded model (`model_logits`), or a block source that is
read one block at a time (`streamed_logits`). Of two models that read the same window, `window_divergence` says how far
their predictions are apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flatq_cli.models.source import BlockSource
    from flatq_cli.store.progress import Progress

_ROWS = 256
"""Rows of logits that are held in float32 at a time: 256 x 128k words is 128 MiB."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on.

    Attributes:
        value: exp(mean over windows of the mean loss); `inf` or `nan` where the model's output is broken.
        tokens: tokens read, windows · seqlen (the first of each window is read, not predicted).
        seqlen: tokens in a window.
    """

    value: float
    tokens: int
    seqlen: int


def window_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean next-token loss of one window.

    Args:
        logits: `[s, vocab]`, any float dtype. tokens: int64 `[s]`, what the logits were computed from.
    Returns:
        The mean of `-log softmax(logits[i])[tokens[i + 1]]` over the s - 1 places that have a next token. Computed in
        float32, a few rows at a time, so that a float32 copy of the logits never exists.
    """
    targets = tokens[1:].to(logits.device)
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, min(start + _ROWS, len(targets)))
        total += functional.cross_entropy(logits[rows].float(), targets[rows], reduction="sum").item()
    return total / len(targets)


@torch.no_grad()
def window_divergence(target: Tensor, baseline: Tensor) -> tuple[float, float]:
    """How far two models are from each other on one window, over the places that have a next token in it.

    Args:
        target, baseline: logits `[s, vocab]` of the same tokens, any float dtype, on any device.
    Returns:
        The mean over s - 1 places of KL(baseline ‖ target) of the next token, in nats; and the share of these places
        where both find the same token the likeliest. Log-softmax in float32, a few rows at a time.
    """
    places = len(target) - 1
    total, same = 0.0, 0
    for start in range(0, places, _ROWS):
        rows = slice(start, min(start + _ROWS, places))
        found = target[rows].float().log_softmax(-1)
        wanted = baseline[rows].to(found).log_softmax(-1)
        total += functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).double().sum().item()
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    return total / places, same / places


def perplexity(losses: Sequence[float], seqlen: int) -> Perplexity:
    """Perplexity from the losses of windows of `seqlen` tokens, at least one.

    Source: the protocol of GPTQ (arXiv 2210.17323), OmniQuant, QuaRot and FlatQuant.
    """
    mean = sum(losses) / len(losses)
    value = math.exp(mean) if mean < 700 else mean * math.inf  # nan stays nan; exp(710) overflows
    return Perplexity(value=value, tokens=len(losses) * seqlen, seqlen=seqlen)


@torch.no_grad()
def streamed_logits(
    source: BlockSource, windows: Tensor, progress: Progress, device: str, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Logits of a model whose blocks are read one at a time, each run over all windows before the next is read.

    Args:
        source: the blocks. windows: int64 `[n, s]`.
        device: where a block runs. dtype: of its weights and activations.
    Returns:
        n tensors `[s, vocab]` on `device`, each made when it is asked for. In memory are, until this returns, one block
        and the hidden states `[n, s, hidden]` on the CPU; after that the head, these, and the logits of one window.
    """
    from flatq_cli.models.source import run_in_batches

    hidden = source.embed(windows, dtype)  # on the CPU: long texts of wide models are larger than what a GPU has left
    kwargs = source.block_kwargs(hidden[:1].to(device))
    for index in progress.track(range(source.num_blocks), "perplexity: blocks"):
        block = source.block(index, dtype, device)
        run_in_batches(block, hidden, kwargs[index], 1, device, into=hidden)
        del block  # before the next one is read
    return _head_logits(source.head(dtype, device), hidden, device)


@torch.no_grad()
def _head_logits(head: nn.Module, hidden: Tensor, device: str) -> Iterator[Tensor]:
    for row in range(len(hidden)):
        yield head(hidden[row : row + 1].to(device))[0]


@torch.no_grad()
def model_logits(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """Logits of a loaded model, window by window.

    Args:
        model: a causal language model of transformers. windows: int64 `[n, s]`.
    Yields:
        n tensors `[s, vocab]`, on the model's device and in its dtype.
    """
    for row in range(len(windows)):
        yield model(input_ids=windows[row : row + 1].to(model.device), use_cache=False).logits[0]
