"""How lm-eval puts questions to a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompting:
    """How questions are put.

    Attributes:
        num_fewshot: examples before a question, where the task does not fix their number itself; None: as it says.
        chat_template: whether prompts go through the chat template of the model's tokenizer.
        system_instruction: text before everything. fewshot_as_multiturn: whether, in a chat template, each example is
            a turn of its own; None: as the harness does, which is yes.
    """

    num_fewshot: int | None = None
    chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
