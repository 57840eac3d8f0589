"""The model that lm-eval asks: it looks an answer up before it reads the question.

The harness sees one language model. Behind it are the kept answers (`evaluation/answers.py`) and, only when a question
is new, the model that reads it (`evaluation/scoring.py`). New questions are read in slices, each kept before the next
is begun. A question is all that is asked about one document: its choices are answered and kept together, so that what
is answered never depends on how much of it was known. With one question in a forward pass nothing else decides its
answer, to the last bit; answers that were found in larger batches are kept apart, for larger batches.

A shard lets the harness build every question, so that the examples drawn for them are those of an unsharded evaluation,
and says nothing to those of other shards: they get a filler, and what the harness makes of it is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from flatq_cli.errors import out_of_memory
from flatq_cli.evaluation.shard import WHOLE, Shard

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flatq_cli.evaluation.answers import Answers
    from flatq_cli.evaluation.scoring import SharingLM
    from flatq_cli.store.progress import Progress

Batch = int | Literal["auto"]
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]

_SLICE = 8
"""Batches in a slice: the model sorts and batches questions inside it, and a kill loses no more."""

_AUTO_BATCH = {"cpu": 8, "cuda": 64}
"""Where `--batch auto` starts; on a CPU more is not faster."""

_FILLERS: dict[Kind, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}


class AnsweringLM(LM):  # type: ignore[misc]
    """Answers the harness from what is kept, and asks the model the rest."""

    # Prompts in a chat template need the tokenizer alone; these are the harness's own.
    apply_chat_template = HFLM.apply_chat_template
    tokenizer_name = HFLM.tokenizer_name

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        answers: Answers,
        progress: Progress,
        batch: Batch = 1,
        shard: Shard = WHOLE,
    ) -> None:
        """Answer for a model.

        Args:
            load: gives the model, when the first question is new; it stays on its device and in its dtype.
            batch: questions in a forward pass; "auto": as many as fit, halved whenever memory does not suffice.
            shard: the questions to answer.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.chat_template_args: dict[str, Any] = {}
        self.shard = shard
        self._load, self._answers, self._progress = load, answers, progress
        self._batch = batch
        self._reader: SharingLM | None = None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        return [(value, greedy) for value, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each text."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that each context goes on with."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: Kind, requests: Sequence[Instance]) -> list[Any]:
        questions = [places for places in _questions(requests) if requests[places[0]].doc_id in self.shard]
        keys = [_key([requests[place] for place in places]) for places in questions]
        answers = dict.fromkeys(range(len(requests)), _FILLERS[kind])
        taken = [kind] if self._batch == 1 else [f"{kind} in batches", kind]  # the later goes before
        kept = {number: found for name in taken for number, found in self._answers.find(name, keys).items()}
        for number, found in kept.items():
            answers.update(zip(questions[number], found, strict=True))
        new = [number for number in range(len(questions)) if number not in kept]
        size = _SLICE * (1 if self._batch == "auto" else self._batch)
        slices = [new[start : start + size] for start in range(0, len(new), size)]
        for part in self._progress.track(slices, "lm-eval: questions"):
            places = [place for number in part for place in questions[number]]
            found = self._ask(kind, [requests[place] for place in places])
            answers.update(zip(places, found, strict=True))
            told = [(keys[number], [answers[place] for place in questions[number]]) for number in part]
            self._answers.keep(taken[0], told)
        return [answers[place] for place in range(len(requests))]

    def _ask(self, kind: Kind, requests: list[Instance]) -> list[Any]:
        """Ask the model; with `--batch auto` again with half of a batch that it has no memory for."""
        reader = self._reading()
        while True:
            try:
                answers: list[Any] = getattr(reader, kind)(requests, disable_tqdm=True)
                return answers
            except Exception as error:
                if self._batch != "auto" or reader.batch_size == 1 or not out_of_memory(error):
                    raise
            # Outside the handler: the traceback holds on to what did not fit.
            reader.batch_size_per_gpu = max(1, reader.batch_size // 2)
            _free_memory()
            self._progress.log(f"out of memory: going on with --batch {reader.batch_size}")

    def _reading(self) -> SharingLM:
        from flatq_cli.evaluation.scoring import SharingLM

        if self._reader is None:
            model = self._load()
            batch = _AUTO_BATCH.get(model.device.type, _AUTO_BATCH["cuda"]) if self._batch == "auto" else self._batch
            # Log-softmax in float32: a bfloat16 near -4 is a multiple of 1/64, coarser than what quantization changes.
            self._reader = SharingLM(
                pretrained=model, tokenizer=self.tokenizer, batch_size=batch, softmax_dtype="float32"
            )
        return self._reader


def _questions(requests: Sequence[Instance]) -> list[list[int]]:
    """The places of each question's requests, mostly one for each choice: they are answered and kept together."""
    questions: dict[tuple[str | None, int | None], list[int]] = {}
    for place, request in enumerate(requests):
        questions.setdefault((request.task_name, request.doc_id), []).append(place)
    return list(questions.values())


def _key(requests: Sequence[Instance]) -> list[Any] | None:
    """What a question asks, for JSON; None where its answer is drawn anew each time."""
    asked = [list(request.args) for request in requests]
    drawn = any(isinstance(value, dict) and value.get("do_sample") for values in asked for value in values)
    return None if drawn else asked


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
