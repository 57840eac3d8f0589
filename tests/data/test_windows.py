"""Windows are whole, consecutive pieces of the text, chosen by the seed alone."""

import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flatq_cli.data.texts import Text
from flatq_cli.data.windows import calibration_windows, evaluation_windows
from flatq_cli.errors import UsageError


def tokenizer_of(words, bos=False):
    """Word i of a text of numbers is token i; with `bos`, one more token before the text."""
    vocabulary = {str(number): number for number in range(words)} | {"<s>": words, "<unk>": words + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=8)


def text_of(words):
    return Text("numbers.txt", " ".join(str(number) for number in range(words)), "0" * 64)


sizes = given(words=st.integers(2, 300), seqlen=st.integers(2, 40), samples=st.integers(1, 12), seed=st.integers(0, 99))


@sizes
def test_calibration_windows_are_distinct_consecutive_pieces(words, seqlen, samples, seed):
    text, tokenizer = text_of(words), tokenizer_of(words)
    if words < samples * seqlen:
        with pytest.raises(UsageError, match=f"numbers.txt has {words} tokens"):
            calibration_windows(text, tokenizer, samples, seqlen, seed)
        return
    windows = calibration_windows(text, tokenizer, samples, seqlen, seed)
    assert windows.shape == (samples, seqlen)
    assert windows.dtype == torch.int64
    starts = windows[:, 0].tolist()
    assert len(set(starts)) == samples
    for start, window in zip(starts, windows.tolist(), strict=True):
        assert start % seqlen == 0
        assert window == list(range(start, start + seqlen))


@sizes
def test_evaluation_windows_are_the_beginning_of_the_text(words, seqlen, samples, seed):
    text, tokenizer = text_of(words), tokenizer_of(words)
    if words < seqlen:
        with pytest.raises(UsageError, match=f"numbers.txt has {words} tokens, less than one window of {seqlen}"):
            evaluation_windows(text, tokenizer, seqlen, samples)
        return
    count = min(samples, words // seqlen)
    windows = evaluation_windows(text, tokenizer, seqlen, samples)
    assert windows.flatten().tolist() == list(range(count * seqlen))
    assert windows.shape == (count, seqlen)
    assert len(evaluation_windows(text, tokenizer, seqlen, None)) == words // seqlen


def test_the_seed_alone_chooses_the_windows():
    text, tokenizer = text_of(400), tokenizer_of(400)
    torch.manual_seed(1)
    first = calibration_windows(text, tokenizer, 5, 16, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(calibration_windows(text, tokenizer, 5, 16, seed=3), first)
    assert not torch.equal(calibration_windows(text, tokenizer, 5, 16, seed=4), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # and the global generator is left alone


def test_a_bos_is_there_once_at_the_start_of_the_text():
    windows = evaluation_windows(text_of(31), tokenizer_of(31, bos=True), 8)
    assert windows.flatten().tolist() == [31, *range(31)]


def test_a_short_text_says_what_it_has_and_what_is_needed():
    text, tokenizer = text_of(3120), tokenizer_of(3120)
    message = (
        "numbers.txt has 3,120 tokens; 16 samples of 256 need 4,096: "
        "lower calibration.samples or calibration.seqlen, or give a longer text"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        calibration_windows(text, tokenizer, 16, 256, 0)


@pytest.mark.parametrize(("seqlen", "limit", "name"), [(1, 1, "seqlen"), (-8, 1, "seqlen"), (8, 0, "limit")])
def test_sizes_that_make_no_sense_are_named(seqlen, limit, name):
    with pytest.raises(UsageError, match=f"{name} must be"):
        evaluation_windows(text_of(40), tokenizer_of(40), seqlen, limit)


def test_no_warning_about_a_text_longer_than_the_model(caplog):
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    try:
        tokenizer = tokenizer_of(100)
        tokenizer(text_of(100).content)
        assert "longer than the specified maximum" in caplog.text  # the plain call does warn
        caplog.clear()
        tokenizer.deprecation_warnings.clear()
        evaluation_windows(text_of(100), tokenizer, 8)
        calibration_windows(text_of(100), tokenizer, 2, 8, 0)
        assert caplog.text == ""
    finally:
        logger.propagate = propagate
