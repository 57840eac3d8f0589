"""The windows of a text under one model, or under two at once; what is kept already is not computed again.

A target that is read block by block computes all windows it is given before the first loss is known, and a kill loses
them. So windows are taken in slices: long enough that reading the model again for each costs little beside computing,
short enough that little is lost. Each window is kept as soon as it is done, and its figures do not depend on the
windows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from flatq_cli.evaluation.answers import Answers
from flatq_cli.evaluation.evidence import PairEvidence, WindowEvidence
from flatq_cli.evaluation.perplexity import window_divergence, window_loss
from flatq_cli.evaluation.targets import Target
from flatq_cli.store.progress import Progress

_LOSS = "loss"
_SLICE_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}
"""Tokens between two readings of the model: a CPU computes on so many for longer than it reads, as a GPU does."""


def measure_windows(
    target: Target, answers: Answers, windows: Tensor, indices: Sequence[int], progress: Progress
) -> WindowEvidence:
    """The loss of some windows of a text.

    Args:
        windows: all windows of the text, int64 `[n, s]`. indices: which of them.
    """
    asked = windows[list(indices)]
    questions = asked.tolist()
    losses = answers.find(_LOSS, questions)
    missing = [place for place in range(len(questions)) if place not in losses]
    for part in _slices(missing, asked, target.device, progress):
        logits = target.logits(asked[part], progress)
        for place in progress.track(part, "perplexity: windows"):
            losses[place] = window_loss(next(logits), asked[place])
            answers.keep(_LOSS, [(questions[place], losses[place])])
    return _evidence(losses, indices, windows)


def measure_pair(
    targets: tuple[Target, Target],
    answers: tuple[Answers, Answers],
    windows: Tensor,
    indices: Sequence[int],
    progress: Progress,
) -> tuple[WindowEvidence, WindowEvidence, PairEvidence]:
    """The losses of two models on the same windows of a text, and how far the two are from each other.

    Args:
        targets: the target and its baseline, of one vocabulary. answers: of the one and of the other.
        windows: all windows of the text, int64 `[n, s]`. indices: which of them.
    Returns:
        The evidence of the target (the very same as without a baseline), of the baseline, and of the pair.
    """
    asked = windows[list(indices)]
    questions = asked.tolist()
    losses = [kept.find(_LOSS, questions) for kept in answers]
    against = f"pair with {answers[1].identity}"
    pairs = answers[0].find(against, questions)
    missing = [place for place in range(len(questions)) if not all(place in found for found in (*losses, pairs))]
    for part in _slices(missing, asked, targets[0].device, progress):
        logits = [target.logits(asked[part], progress) for target in targets]
        for place in progress.track(part, "perplexity: windows"):
            ours, theirs = (next(one) for one in logits)
            for found, kept, scores in zip(losses, answers, (ours, theirs), strict=True):
                found[place] = window_loss(scores, asked[place])
                kept.keep(_LOSS, [(questions[place], found[place])])
            pairs[place] = window_divergence(ours, theirs)
            answers[0].keep(against, [(questions[place], pairs[place])])
    divergences = [pairs[place] for place in range(len(questions))]
    pair = PairEvidence(tuple(kl for kl, _ in divergences), tuple(agreement for _, agreement in divergences))
    return _evidence(losses[0], indices, windows), _evidence(losses[1], indices, windows), pair


def _evidence(losses: dict[int, Any], indices: Sequence[int], windows: Tensor) -> WindowEvidence:
    seqlen = windows.shape[1]
    values = tuple(losses[place] for place in range(len(indices)))
    return WindowEvidence(tuple(indices), values, len(values) * seqlen, seqlen)


def _slices(places: Sequence[int], windows: Tensor, device: str, progress: Progress) -> Iterable[list[int]]:
    size = max(1, _SLICE_TOKENS.get(device, _SLICE_TOKENS["cuda"]) // windows.shape[1])
    parts = [list(places[start : start + size]) for start in range(0, len(places), size)]
    return progress.track(parts, "perplexity: slices of the text") if len(parts) > 1 else parts
