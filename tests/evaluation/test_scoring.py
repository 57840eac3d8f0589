from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel

from flatq_cli.evaluation.scoring import Pair, SharingLM, Tree, plant
from flatq_cli.evaluation.targets import open_target
from tests.tiny import VARIANTS, VOCABULARY, fused_run, random_model, tiny_config, word_tokenizer


def pairs(questions: int = 9, choices: int = 4, longest: int = 12, seed: int = 0) -> list[Pair]:
    """Questions with several answers each, some of them the same, some with a common beginning."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]

    made: list[Pair] = []
    for _ in range(questions):
        context, beginning = tokens(1, longest), tokens(0, 2)
        answers = [beginning + tokens(1, 5) for _ in range(choices - 1)]
        made += [(None, context, answer) for answer in [*answers, answers[0]]]
    return made


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]], tolerance: float = 1e-4) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=tolerance)


def both(model, batch: int = 3) -> tuple[SharingLM, HFLM]:
    options = {"pretrained": model, "tokenizer": word_tokenizer(), "batch_size": batch}
    return SharingLM(**options), HFLM(**options)


class Reads:
    """Counts the tokens that a model reads."""

    def __init__(self, model) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module, inputs, output) -> None:
        self.tokens += inputs[0].numel()


# Trees


def test_a_tree_holds_what_pairs_share_once():
    tree = Tree()
    tree.add(0, [5, 6], [7, 8])
    tree.add(1, [5, 6], [7, 9, 9])
    tree.add(2, [5, 6], [4])
    assert tree.tokens == [5, 6, 7, 9]
    assert tree.parents == [0, 0, 1, 2]
    assert tree.depths == [0, 1, 2, 3]
    assert tree.asked == [(0, [1, 2], [7, 8]), (1, [1, 2, 3], [7, 9, 9]), (2, [1], [4])]


def test_a_node_sees_itself_and_what_came_before_it_in_its_sequence():
    tree = Tree()
    for number, (context, continuation) in enumerate([([1, 2], [3, 4, 0]), ([1, 2], [5, 0]), ([9], [9, 0])]):
        tree.add(number, context, continuation)
    seen = [[tree.tokens[node] for node in row.nonzero()[:, 0]] for row in tree.sight()]
    assert seen == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 5], [9], [9, 9]]


def test_answers_to_one_question_share_a_tree_and_other_questions_get_their_own():
    made = pairs(longest=12)
    trees = plant(made)
    assert [number for tree in trees for number, *_ in tree.asked] == list(range(len(made)))
    assert len(trees) < len(made) / 2
    assert len(plant([(None, [1, 2, 3, 4, 5, 6, 7, 8], [9]), (None, [1, 22, 23, 24, 25, 26, 27, 28], [9])])) == 2


def test_where_questions_are_told_apart_no_tree_holds_two():
    made = [(None, [1, 2, 3, 4], [5, answer]) for answer in range(6)]
    assert len(plant(made)) == 1
    trees = plant(made, ["a", "a", "a", "b", "b", "c"])
    assert [[number for number, *_ in tree.asked] for tree in trees] == [[0, 1, 2], [3, 4], [5]]


def test_a_tree_does_not_grow_without_end():
    beginning = list(range(3, 43)) * 3
    trees = plant([(None, [*beginning, a, b, a], [3, 4]) for a in range(3, 40) for b in range(3, 40)])
    assert max(len(tree.tokens) for tree in trees) <= 256
    assert len(trees) < 60


# Scores


@pytest.mark.parametrize("name", [name for name in VARIANTS if "sliding" not in name and name != "mistral"])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_pair_gets_the_score_that_lm_eval_gives_it(name: str, batch: int):
    sharing, harness = both(random_model(tiny_config(name)), batch)
    made = pairs()
    assert_same(sharing._loglikelihood_tokens(made), harness._loglikelihood_tokens(made))


def test_some_pairs_are_what_greedy_decoding_gives():
    """So that the comparisons above see both answers to that."""
    model = random_model(tiny_config("llama"))
    sharing, harness = both(model)
    context = [5, 9, 11]
    greedy = model.generate(torch.tensor([context]), max_new_tokens=3, min_new_tokens=3, do_sample=False)[
        0, 3:
    ].tolist()
    made = [(None, context, greedy), (None, context, [*greedy[:2], 40]), (None, context, [41, *greedy[1:]])]
    assert [hit for _, hit in sharing._loglikelihood_tokens(made)] == [True, False, False]
    assert_same(sharing._loglikelihood_tokens(made), harness._loglikelihood_tokens(made))


def test_a_quantized_model_gets_the_same_scores(tmp_path: Path):
    run = fused_run(tmp_path, "llama")
    sharing, harness = both(open_target(str(run.path), "cpu").model(), batch=1)
    reads = Reads(sharing.model)
    ours = sharing._loglikelihood_tokens(pairs())
    assert reads.tokens == sum(len(tree.tokens) for tree in plant(pairs()))
    assert_same(ours, harness._loglikelihood_tokens(pairs()), tolerance=1e-3)


def test_fewer_tokens_are_read():
    sharing, harness = both(random_model(tiny_config("llama")), batch=1)
    made = pairs(longest=20)
    reads = Reads(sharing.model)
    sharing._loglikelihood_tokens(made)
    shared = reads.tokens
    harness._loglikelihood_tokens(made)
    assert shared < (reads.tokens - shared) / 2


def test_requests_in_strings_are_answered_in_their_order():
    sharing, harness = both(random_model(tiny_config("qwen3")))
    texts = [("w1 w2 w3", f" w{i} w7") for i in range(5)] + [("", " w4"), ("w9", " w1")] + [("w1 w2 w3", " w0 w7")]
    asked = [Instance("loglikelihood", {}, text, index) for index, text in enumerate(texts)]
    assert_same(sharing.loglikelihood(asked), harness.loglikelihood(asked))


def test_whole_texts_are_scored_as_lm_eval_scores_them():
    sharing, harness = both(random_model(tiny_config("llama")))
    text = " ".join(f"w{word}" for word in random.Random(1).choices(range(45), k=150))  # more than the model attends to
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    ours, theirs = sharing.loglikelihood_rolling(asked), harness.loglikelihood_rolling(asked)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("name", "longest"), [("mistral", 4), ("llama", 60)])
def test_pairs_longer_than_what_the_model_attends_to_are_left_to_lm_eval(name: str, longest: int):
    """The tiny mistral attends to 5 tokens, the tiny llama to 64."""
    sharing, harness = both(random_model(tiny_config(name)))
    made = [*pairs(longest=longest), (None, list(range(3, 43)) * 2, [5, 6])]
    assert sharing._loglikelihood_tokens(made) == harness._loglikelihood_tokens(made)


def test_a_sliding_window_that_all_pairs_fit_into_changes_nothing():
    sharing, harness = both(random_model(tiny_config("mistral", sliding_window=30)), batch=1)
    reads = Reads(sharing.model)
    ours = sharing._loglikelihood_tokens(pairs())
    assert reads.tokens == sum(len(tree.tokens) for tree in plant(pairs()))
    assert_same(ours, harness._loglikelihood_tokens(pairs()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_that_might_not_take_such_a_mask_are_left_to_lm_eval(attention: str):
    torch.manual_seed(0)
    if attention == "eager":
        model = random_model(tiny_config("llama"))
        model.set_attn_implementation("eager")
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        ).eval()
    sharing, harness = both(model)
    assert sharing._loglikelihood_tokens(pairs()) == harness._loglikelihood_tokens(pairs())


def test_no_questions_have_no_answers():
    assert both(random_model(tiny_config("llama")))[0]._loglikelihood_tokens([]) == []


def test_a_model_that_does_more_to_its_logits_than_its_head_is_left_to_the_harness():
    model = random_model(tiny_config("llama"))
    sharing, _ = both(model)
    assert sharing._reach() > 0
    model.config.logits_scaling = 8.0
    assert sharing._reach() == 0
