"""The harness's model, with what several answers to one question share read only once.

lm-eval scores every (context, answer) pair by itself: four answers read their question four times. Here pairs that
begin with the same tokens become one tree: each node is a token, its position is its depth, and it attends to its
ancestors alone, which is all that it saw in a sequence of its own. So every pair gets the log-probability that it gets
there, up to the rounding of a sum in another order. Logits are computed only where a token of an answer is predicted.

On the four tasks of a local mirror the model reads half the tokens. Models of other families than flatq knows, which
might not take such a mask, and pairs longer than what the model attends to are left to lm-eval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from flatq_cli.models.families import supported_model_types
from flatq_cli.runtime.sites import ATTENTION

Pair = tuple[Any, list[int], list[int]]
"""A request as the harness has it: its strings, the tokens of its context, the tokens of its continuation."""

_SHARED = 4
"""A pair joins the tree before it if that has a fourth of its tokens: answers to one question, seldom two questions."""

_NODES = 256
"""A tree grows to so many tokens, or to twice its first pair: attention between its branches is masked, not free."""

_AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""What some models do to their head's logits, by the names of their configs; here the head is all there is."""

_ROWS = 256
"""Rows of logits that are held in float32 at a time: 256 x 128k words is 128 MiB."""


@dataclass
class Tree:
    """Token sequences with their common beginnings merged.

    Attributes:
        tokens, parents, depths: of each node; a node comes after its parent, a root's parent is itself.
        asked: for each pair its number, the nodes that predict its continuation, and the continuation's tokens.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    asked: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def shared(self, sequence: Sequence[int]) -> int:
        """How many tokens of `sequence` are in the tree already."""
        node = -1
        for count, token in enumerate(sequence):
            if (node := self._children.get((node, token), -1)) < 0:
                return count
        return len(sequence)

    def add(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        """Add the pair `number`; its last token is predicted, not read."""
        path: list[int] = []
        for depth, token in enumerate([*context, *continuation][:-1]):
            key = (path[-1] if path else -1, token)
            if key not in self._children:
                self._children[key] = len(self.tokens)
                self.parents.append(path[-1] if path else len(self.tokens))
                self.tokens.append(token)
                self.depths.append(depth)
            path.append(self._children[key])
        self.asked.append((number, path[len(context) - 1 :], list(continuation)))

    def sight(self) -> Tensor:
        """Bool `[n, n]`: node i sees node j, where j is i or an ancestor of it."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            sees[node] |= sees[parent]
        return sees


def plant(pairs: Sequence[Pair], questions: Sequence[Hashable] | None = None) -> list[Tree]:
    """Trees of (context, continuation) pairs, neighbours together while they share enough; numbered by their order.

    Args:
        questions: which question each pair belongs to: then no tree holds pairs of two.
    """
    trees: list[Tree] = []
    limit = 0
    for number, (_, context, continuation) in enumerate(pairs):
        read = (*context, *continuation[:-1])
        apart = questions is not None and number > 0 and questions[number] != questions[number - 1]
        shared = trees[-1].shared(read) if trees and not apart else 0
        if shared * _SHARED < len(read) or len(trees[-1].tokens) + len(read) - shared > limit:
            trees.append(Tree())
            limit = max(_NODES, 2 * len(read))
        trees[-1].add(number, context, continuation)
    return trees


class SharingLM(HFLM):  # type: ignore[misc]
    """`HFLM` that reads what pairs share once; `batch_size` counts trees.

    With `batch_size` 1 a question is read by itself: its answers are then the same to the last bit, whatever is asked
    before and after it. Larger batches may share between questions as well, and pad; that moves last digits.
    """

    _questions: list[Hashable] | None = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM`; notes which requests belong to one question."""
        self._questions = [(request.task_name, request.doc_id) for request in requests]
        try:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        finally:
            self._questions = None
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        if max(lengths, default=0) > self._reach() or not all(continuation for *_, continuation in requests):
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        size = override_bs or self.batch_size
        trees = sorted(plant(requests, self._questions if size == 1 else None), key=lambda tree: -len(tree.tokens))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(trees), size):
            found.update(self._score(trees[start : start + size]))
        return [found[number] for number in range(len(requests))]

    def _reach(self) -> int:
        """The most tokens that every token of a sequence may attend to; 0 where a tree cannot be read."""
        config = self.model.config
        if config.model_type not in supported_model_types() or config._attn_implementation not in ("sdpa", ATTENTION):
            return 0
        if any(getattr(config, name, None) for name in _AFTER_THE_HEAD):
            return 0
        window = getattr(config, "sliding_window", None)
        return int(self.max_length if window is None else min(self.max_length, window))

    @torch.no_grad()
    def _score(self, trees: Sequence[Tree]) -> dict[int, tuple[float, bool]]:
        """Read trees in one forward pass; the answer of each of their pairs, by the pair's number."""
        width = max(len(tree.tokens) for tree in trees)
        tokens, depths = torch.zeros(2, len(trees), width, dtype=torch.int64)
        sight = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # padding sees itself, nothing sees it
        for row, tree in enumerate(trees):
            size = len(tree.tokens)
            tokens[row, :size], depths[row, :size] = torch.tensor(tree.tokens), torch.tensor(tree.depths)
            sight[row, 0, :size, :size] = tree.sight()
        hidden = self.model.base_model(
            input_ids=tokens.to(self.device),
            position_ids=depths.to(self.device),
            attention_mask=sight.to(self.device),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)

        asked = [(row, *question) for row, tree in enumerate(trees) for question in tree.asked]
        places = torch.tensor([row * width + node for row, _, nodes, _ in asked for node in nodes])
        targets = torch.tensor([token for *_, continuation in asked for token in continuation])
        log_p, likeliest = self._predict(hidden[places.to(self.device)], targets.to(self.device))
        lengths = [len(nodes) for _, _, nodes, _ in asked]
        answers = zip(torch.split(log_p, lengths), torch.split(likeliest, lengths), strict=True)
        numbers = [number for _, number, *_ in asked]
        return {
            number: (values.sum().item(), bool(hits.all()))
            for number, (values, hits) in zip(numbers, answers, strict=True)
        }

    def _predict(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What final hidden states say of the tokens that follow them.

        Args:
            hidden: `[n, width]`. targets: int64 `[n]`.
        Returns:
            On the CPU: the log-probability of each target, and bool: whether no token is likelier.
        """
        log_p, likeliest = [], []
        for rows, wanted in zip(torch.split(hidden, _ROWS), torch.split(targets, _ROWS), strict=True):
            values = torch.log_softmax(self.model.get_output_embeddings()(rows), -1, dtype=self.softmax_dtype)
            log_p.append(values.gather(1, wanted[:, None])[:, 0])
            likeliest.append(values.argmax(-1) == wanted)
        return torch.cat(log_p).cpu(), torch.cat(likeliest).cpu()
