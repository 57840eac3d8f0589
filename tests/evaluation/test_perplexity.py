from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from flatq_cli.data.texts import load_text
from flatq_cli.data.windows import evaluation_windows
from flatq_cli.evaluation.perplexity import (
    Perplexity,
    model_logits,
    perplexity,
    streamed_logits,
    window_divergence,
    window_loss,
)
from flatq_cli.models.locate import load_tokenizer, locate
from flatq_cli.models.source import open_source
from flatq_cli.store.progress import SilentProgress


def numpy_perplexity(windows: Tensor, logits: list[Tensor]) -> float:
    losses = []
    for tokens, scores in zip(windows.numpy(), logits, strict=True):
        x = scores.double().numpy()
        shifted = x - x.max(axis=-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        losses.append(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
    return float(np.exp(np.mean(losses)))


def measured_perplexity(windows: Tensor, logits: Iterable[Tensor]) -> Perplexity:
    return perplexity([window_loss(*pair[::-1]) for pair in zip(windows, logits, strict=True)], windows.shape[1])


@pytest.mark.parametrize("seqlen", [2, 7, 256, 257, 600])
def test_perplexity_equals_a_computation_in_numpy(seqlen: int):
    torch.manual_seed(seqlen)
    windows = torch.randint(0, 50, (3, seqlen))
    logits = [torch.randn(seqlen, 50) * 3 for _ in range(3)]
    measured = measured_perplexity(windows, logits)
    assert measured.value == pytest.approx(numpy_perplexity(windows, logits), rel=1e-5)
    assert (measured.tokens, measured.seqlen) == (3 * seqlen, seqlen)


def test_perplexity_of_a_model_is_the_exponential_of_the_mean_of_its_own_losses(tiny):
    windows = torch.tensor(tiny.tokenizer(tiny.text.read_text())["input_ids"][:96]).view(3, 32)
    losses = [tiny.model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    measured = measured_perplexity(windows, model_logits(tiny.model, windows))
    assert measured.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_streaming_block_by_block_gives_the_logits_of_the_whole_model(tiny):
    windows = torch.randint(0, len(tiny.tokenizer), (4, 24))
    source = open_source(locate(str(tiny.directory)))
    streamed = list(streamed_logits(source, windows, SilentProgress(), "cpu", torch.float32))
    whole = list(model_logits(tiny.model, windows))
    assert len(streamed) == 4
    for left, right in zip(streamed, whole, strict=True):
        assert left.shape == (24, len(tiny.tokenizer))
        torch.testing.assert_close(left, right)


def test_the_loss_is_computed_in_float32_whatever_the_logits_are():
    torch.manual_seed(0)
    tokens, logits = torch.randint(0, 99, (400,)), torch.randn(400, 99).bfloat16()
    assert window_loss(logits, tokens) == pytest.approx(window_loss(logits.double(), tokens), rel=1e-5)


def test_broken_logits_give_a_perplexity_that_says_so():
    windows = torch.zeros(1, 8, dtype=torch.int64)
    assert math.isnan(measured_perplexity(windows, [torch.full((8, 4), math.nan)]).value)
    certain_of_another = torch.zeros(8, 4)
    certain_of_another[:, 1] = 1e4
    assert measured_perplexity(windows, [certain_of_another]).value == math.inf


def numpy_divergence(target: Tensor, baseline: Tensor) -> tuple[float, float]:
    """KL(baseline ‖ target) by scipy, row by row."""
    p, q = (softmax(logits.double().numpy()[:-1], axis=-1) for logits in (baseline, target))
    kl = [entropy(wanted, found) for wanted, found in zip(p, q, strict=True)]
    return float(np.mean(kl)), float(np.mean(p.argmax(-1) == q.argmax(-1)))


@pytest.mark.parametrize("seqlen", [2, 9, 257, 600])
def test_the_divergence_of_two_models_equals_a_computation_by_scipy(seqlen: int):
    torch.manual_seed(seqlen)
    baseline = torch.randn(seqlen, 50) * 3
    target = baseline + torch.randn(seqlen, 50)
    kl, agreement = window_divergence(target, baseline)
    wanted = numpy_divergence(target, baseline)
    assert kl == pytest.approx(wanted[0], rel=1e-5)
    assert agreement == wanted[1]


def test_a_model_diverges_from_itself_by_nothing_and_the_direction_counts():
    torch.manual_seed(0)
    one, other = torch.randn(2, 40, 30) * 2
    assert window_divergence(one, one) == (0.0, 1.0)
    assert window_divergence(one, other)[0] != pytest.approx(window_divergence(other, one)[0], rel=1e-3)
    assert window_divergence(one.bfloat16(), one.bfloat16().float()) == (0.0, 1.0)


@pytest.mark.data
@pytest.mark.slow
def test_full_precision_smollm2_reads_19_26():
    """The check that the protocol is that of the papers."""
    folder = os.environ.get("FLATQ_DATA")
    if not folder:
        pytest.skip("FLATQ_DATA does not name the folder of evaluation data")
    location = locate("smollm2-135m")
    text = load_text(str(Path(folder) / "wikitext2-eval.txt"))
    windows = evaluation_windows(text, load_tokenizer(location), 2048, 8)
    logits = streamed_logits(open_source(location), windows, SilentProgress(), "cpu", torch.float32)
    assert measured_perplexity(windows, logits).value == pytest.approx(19.26, abs=0.01)
