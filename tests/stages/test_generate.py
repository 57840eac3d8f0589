from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flatq_cli.errors import UsageError
from flatq_cli.runtime import backends
from flatq_cli.stages.export import export
from flatq_cli.stages.generate import GenerateRequest, GenerateResult, generate
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.tiny import fused_run, save_model, word_tokenizer

PROMPT = "w1 w22 w39"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = fused_run(tmp_path_factory.mktemp("run"), "llama")
    export(run, "flatq", None, SilentProgress())
    return run


@pytest.fixture(scope="module")
def packed(run: Run) -> str:
    return str(run.path / "export/flatq")


@pytest.fixture(scope="module")
def model(run: Run) -> str:
    return run.config.model.location


def generated(target: str, prompt: str = PROMPT, **options: Any) -> tuple[GenerateResult, list[str]]:
    pieces: list[str] = []
    request = GenerateRequest(target, prompt, **{"max_new_tokens": 12, **options})
    return generate(request, pieces.append, SilentProgress()), pieces


def expected(directory: str, prompt: str = PROMPT, **options: Any) -> torch.Tensor:
    """What transformers alone generates, greedily: the new token ids."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(directory)(prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
    return loaded.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(("target", "backend"), [("model", "auto"), ("packed", "reference")])
def test_it_is_the_greedy_text_of_transformers_piece_by_piece(target, backend, request):
    directory = request.getfixturevalue(target)
    result, pieces = generated(directory, backend=backend)
    ids = expected(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert "".join(pieces) == result.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces) > 1
    assert (result.new_tokens, result.prompt_tokens) == (len(ids), len(tokenizer(PROMPT)["input_ids"]))


def test_a_run_is_fake_quant_and_says_what_its_export_says(run, packed):
    of_run, of_export = generated(str(run.path))[0], generated(packed, backend="reference")[0]
    assert (of_run.kind, of_export.kind) == ("fake-quant", "packed")
    assert (of_run.backend, of_export.backend) == (None, "reference")
    assert of_run.text == of_export.text


def test_the_same_seed_draws_the_same_text_and_another_seed_another(model):
    def drawn(seed: int) -> str:
        return generated(model, temperature=1.5, seed=seed, max_new_tokens=24)[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(1, 5)}) > 1


def test_so_little_probability_that_only_the_likeliest_token_is_left_is_greedy(model):
    assert generated(model, temperature=1.0, top_p=1e-6)[0].text == generated(model)[0].text


def test_the_model_s_own_defaults_for_sampling_do_not_count(model, tmp_path):
    other = tmp_path / "model"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    loaded.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, top_k=3)
    save_model(loaded, tokenizer, other)
    assert json.loads((other / "generation_config.json").read_text())["repetition_penalty"] == 9.0
    assert generated(str(other))[0].text == generated(model)[0].text


def test_it_stops_at_the_model_s_own_end(model, tmp_path):
    ids = expected(model).tolist()
    end = next(token for token in ids[3:] if token not in ids[:3])
    other = tmp_path / "model"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    loaded.generation_config.eos_token_id = [end, 1]
    save_model(loaded, tokenizer, other)
    assert generated(str(other))[0].new_tokens == ids.index(end) + 1


def test_chat_is_the_prompt_in_the_template(model):
    template = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    assert template != PROMPT
    chat, plain = generated(model, chat=True)[0], generated(model, template)[0]
    assert (chat.text, chat.prompt_tokens) == (plain.text, plain.prompt_tokens)


def test_chat_without_a_template_is_refused(tmp_path):
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    directory = save_model(GPT2LMHeadModel(config), word_tokenizer(), tmp_path / "gpt2")
    with pytest.raises(UsageError, match=r"--chat: the tokenizer of .*gpt2 has no chat template"):
        generated(str(directory), chat=True)
    assert generated(str(directory))[0].new_tokens > 0  # a family that flatq does not know, loaded whole


def test_a_bfloat16_model_computes_in_bfloat16_when_asked(model, packed):
    for target in (model, packed):
        assert generated(target)[0].dtype == "float32"
        assert generated(target, dtype="bfloat16")[0].dtype == "bfloat16"


def test_the_json_has_the_keys_of_its_schema(packed):
    result = generated(packed)[0].to_json()
    assert list(result) == [
        "schema", "target", "kind", "prompt_tokens", "new_tokens", "text", "prefill_seconds", "decode_seconds",
        "peak_memory_bytes", "peak_gpu_memory_bytes", "backend", "device", "dtype", "versions",
    ]  # fmt: skip
    assert (result["schema"], result["target"], result["kind"]) == ("flatq.generate/1", packed, "packed")
    assert min(result["prefill_seconds"], result["decode_seconds"], result["peak_memory_bytes"]) > 0
    json.dumps(result, allow_nan=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_ignores_ends_the_text_all_the_same(model):
    """An exception in a destructor is printed and forgotten."""

    class Forgets:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            Forgets()

    before = signal.getsignal(signal.SIGINT)
    result = generate(GenerateRequest(model, PROMPT, max_new_tokens=12), write, SilentProgress())
    assert result.interrupted
    assert 2 <= result.new_tokens < generated(model)[0].new_tokens
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_keeps_what_there_is(model):
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    whole = generated(model)[0]
    result = generate(GenerateRequest(model, PROMPT, max_new_tokens=12), write, SilentProgress())
    assert result.interrupted
    assert not whole.interrupted
    assert 1 <= result.new_tokens < whole.new_tokens
    assert whole.text.startswith(result.text)
    assert result.text == "".join(pieces)
    assert result.text


def test_one_token_has_no_decode_rate(model):
    result = generated(model, max_new_tokens=1)[0]
    assert (result.new_tokens, result.decode_seconds, result.decode_rate) == (1, 0.0, None)
    assert result.prefill_rate == pytest.approx(result.prompt_tokens / result.prefill_seconds)


def test_more_than_the_model_was_made_for_is_said(model):
    said: list[str] = []
    progress = SilentProgress()
    progress.log = said.append  # type: ignore[method-assign]
    generate(GenerateRequest(model, PROMPT, max_new_tokens=1), lambda piece: None, progress)
    assert said == []
    generate(GenerateRequest(model, "w1 " * 40, max_new_tokens=40), lambda piece: None, progress)
    assert "was made for 64 at most" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens: 0 is less than 1"),
        ({"temperature": -1.0}, "--temperature: -1.0 is less than 0"),
        ({"top_p": 0.0}, "--top-p: 0.0 is not in"),
        ({"top_p": 1.5}, "--top-p: 1.5 is not in"),
        ({"dtype": "int8"}, "--dtype int8: not one of float32"),
        ({"backend": "cpu"}, "--backend cpu: is for packed models, and .* is float"),
        ({"prompt": ""}, "the prompt is empty, and the tokenizer of .* adds no token"),
        ({"target": "./nowhere"}, "nowhere: there is no run; nor a model"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(model, options, message):
    with pytest.raises(UsageError, match=message):
        generated(**{"target": model, **options})


def test_a_run_has_no_backend(run):
    with pytest.raises(UsageError, match=r"--backend reference: is for packed models, and .* is fake-quant"):
        generated(str(run.path), backend="reference")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backend_that_was_asked_for_computes_and_is_named(packed, backend, monkeypatch):
    used = set()
    for name, one in backends.BACKENDS.items():
        linear = type(one).linear
        monkeypatch.setattr(
            type(one), "linear", lambda self, *args, name=name, linear=linear: (used.add(name), linear(self, *args))[1]
        )
    assert generated(packed, backend=backend)[0].backend == backend
    assert backend in used
    if backend == "reference":
        assert used == {"reference"}


def test_a_backend_that_does_not_work_here_is_refused_with_the_reason(packed, monkeypatch):
    monkeypatch.setattr(type(backends.BACKENDS["cuda"]), "why_not", lambda self, *where: "no GPU")
    with pytest.raises(UsageError, match="--backend cuda: no GPU"):
        generated(packed, backend="cuda")
    with pytest.raises(UsageError, match="--backend: there is no 'tpu'"):
        generated(packed, backend="tpu")


def test_auto_is_what_the_backends_choose(packed, monkeypatch):
    asked: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr(backends, "choose", lambda *place: (asked.append(place), "reference")[1])
    assert generated(packed)[0].backend == "reference"
    assert asked == [(torch.device("cpu"), torch.float32)]
