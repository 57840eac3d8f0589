from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.evaluation.lastword import MAX_WORDS, MIN_WORDS, Passage, passages


def sentence(words: int, last: str, stop: str = ".") -> str:
    return " ".join(["word"] * (words - 1) + [last + stop])


def test_a_passage_ends_with_the_first_sentence_past_sixty_words():
    text = " ".join([sentence(40, "river"), sentence(30, "garden"), sentence(5, "cat")])
    (found,) = passages(text)
    assert found.word == "garden"
    assert len(found.context.split()) == 69
    assert found.context.split()[39] == "river."


def test_a_spaced_full_stop_ends_a_sentence_as_an_attached_one_does():
    assert passages(sentence(65, "dog")) == passages(sentence(65, "dog", " ."))


def test_the_context_does_not_hold_the_target():
    (found,) = passages(sentence(61, "zebra"))
    assert found == Passage(context=" ".join(["word"] * 60), word="zebra")


def test_a_start_from_which_no_sentence_ends_in_reach_is_skipped():
    text = " ".join([sentence(20, "early"), sentence(70, "late")])  # 20 is too short, 90 too long
    assert [found.word for found in passages(text)] == ["late"]


def test_closing_quotes_are_not_part_of_the_word():
    assert [found.word for found in passages(sentence(60, "gone", ".”"))] == ["gone"]


def test_abbreviations_single_letters_and_numbers_end_no_passage():
    for last in ("Mr", "I", "1984", "x2"):
        assert passages(sentence(65, last)) == []


def test_a_text_without_a_passage_gives_none():
    assert passages("") == []
    assert passages("Too short to ask anything.") == []


@given(st.lists(st.sampled_from(["a", "word", "The", "end.", "stop .", "why?", "Mr.", "3.5", "(done.)"]), max_size=600))
def test_passages_keep_to_the_length_and_do_not_overlap(pieces: list[str]):
    text = " ".join(pieces)
    words = text.split()
    position = 0
    for found in passages(text):
        taken = found.context.split()
        assert MIN_WORDS - 1 <= len(taken) <= MAX_WORDS - 1
        assert found.word.isalpha()
        assert len(found.word) >= 2
        position = next(i for i in range(position, len(words)) if words[i : i + len(taken)] == taken) + len(taken)
        assert words[position].startswith((found.word, "("))
        position += 1
