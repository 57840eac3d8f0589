"""Last-word prediction, in the manner of LAMBADA (arXiv 1606.06031), made from any text.

A passage is 60 to 80 words that end with a sentence; the model reads all but the last word and must say that word.
Words are what whitespace separates, so both plain prose ("the old dog.") and tokenised corpora ("the old dog .") work.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

MIN_WORDS = 60
MAX_WORDS = 80

_STOPS = ".!?"
_CLOSERS = "\"'”’)]"
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "st", "jr", "sr", "prof", "vs", "etc", "inc", "ltd", "co", "cf", "no")
)


@dataclass(frozen=True)
class Passage:
    """What the model reads (words joined by single spaces), and the word it must say next (two or more letters)."""

    context: str
    word: str


def passages(text: str) -> list[Passage]:
    """Cut a text into passages, front to back, none overlapping another.

    Each starts where a sentence starts and ends with the first sentence whose last word is its 60th to 80th; where no
    sentence ends there, the next sentence is tried as a start. A sentence ends with a word of two or more letters
    before a full stop, exclamation or question mark, common abbreviations ("Mr.") excepted. A text that holds no
    passage gives an empty list.
    """
    words = text.split()
    ends = [(index, after) for index in range(len(words)) if (after := _sentence_end(words, index))]
    last_words = [index for index, _ in ends]
    found: list[Passage] = []
    free = 0  # the first word that no passage holds yet
    for start in (0, *(after for _, after in ends)):
        nearest = bisect_left(last_words, start + MIN_WORDS - 1)
        if start < free or nearest == len(ends):
            continue
        last, after = ends[nearest]
        if last - start < MAX_WORDS:
            found.append(Passage(" ".join(words[start:last]), _core(words[last])))
            free = after
    return found


def _sentence_end(words: list[str], index: int) -> int:
    """If a sentence ends with word `index`: the index of the first word of the next one; else 0."""
    word = words[index]
    core = _core(word)
    if len(core) < 2 or not core.isalpha() or core.lower() in _ABBREVIATIONS:
        return 0
    if any(stop in word[len(core) :] for stop in _STOPS):
        return index + 1
    is_separate = word == core and index + 1 < len(words) and words[index + 1] in tuple(_STOPS)
    return index + 2 if is_separate else 0


def _core(word: str) -> str:
    """The word without what closes a sentence: `dog.”` → `dog`."""
    return word.rstrip(_STOPS + _CLOSERS)
