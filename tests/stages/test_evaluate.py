from __future__ import annotations

import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flatq_cli.config.recipe_files import load_recipe
from flatq_cli.errors import UsageError
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.result import EvalResult
from flatq_cli.evaluation.targets import Target
from flatq_cli.runtime.backends import Cpu
from flatq_cli.stages.calibrate import calibrate, open_or_create_run
from flatq_cli.stages.eval_request import EvalRequest, check_request, result_name
from flatq_cli.stages.evaluate import evaluate
from flatq_cli.stages.export import export
from flatq_cli.stages.fuse import fuse
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run

needs_integers = pytest.mark.skipif(Cpu().why_not() is not None, reason="torch multiplies no integers on this CPU")
WORDS = ["the", "old", "dog", "sees", "a", "river", "and", "garden"]


class Lines(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(5, 11))) + "." for _ in range(90)]
    file = tmp_path_factory.mktemp("text") / "little-prose.txt"
    file.write_text("\n".join(sentences), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    words = {word: i for i, word in enumerate(["<unk>", ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is fused and exported."""
    settings = [f"calibration.data={text}", "calibration.samples=2", "calibration.seqlen=16"]
    recipe = load_recipe("rtn", settings)
    run = open_or_create_run(str(model_dir), recipe, tmp_path_factory.mktemp("runs") / "tiny-rtn", recipe_name="rtn")
    calibrate(run, "cpu", SilentProgress())
    fuse(run, "cpu", SilentProgress())
    export(run, "flatq", None, SilentProgress())
    return run


def test_the_result_has_exactly_the_keys_of_the_schema(model_dir: Path, text: Path):
    asked = EvalRequest(str(model_dir), ppl=(str(text),), tasks=(f"lastword:{text}",), seqlen=32, limit=4)
    result = evaluate(asked, SilentProgress()).to_json()
    assert list(result) == [
        "schema", "target", "kind", "recipe", "perplexity", "tasks", "harness", "gates", "versions", "seconds",
        "peak_memory_bytes", "peak_gpu_memory_bytes",
    ]  # fmt: skip
    assert (result["schema"], result["target"]) == ("flatq.eval/1", str(model_dir))
    assert (result["kind"], result["recipe"], result["gates"]) == ("float", None, [])
    assert result["perplexity"]["little-prose"].keys() == {"value", "tokens", "seqlen"}
    assert result["perplexity"]["little-prose"]["tokens"] == 4 * 32
    assert {"acc", "perplexity"} <= result["tasks"]["lastword:little-prose"].keys()
    assert result["peak_memory_bytes"] > 1 << 20
    assert {"flatq", "torch", "transformers", "lm_eval"} <= result["versions"].keys()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_run_and_its_export_have_the_same_figures(run: Run, text: Path):
    asked = {"ppl": (str(text),), "tasks": (f"lastword:{text}",), "seqlen": 32, "limit": 4}
    fused = evaluate(EvalRequest(str(run.path), **asked), SilentProgress())
    packed = evaluate(EvalRequest(str(run.path / "export" / "flatq"), **asked), SilentProgress())
    assert (fused.kind, fused.recipe) == ("fake-quant", "rtn")
    assert (packed.kind, packed.recipe) == ("packed", "rtn")
    values = [result.perplexity["little-prose"].value for result in (fused, packed)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    scores = [result.tasks["lastword:little-prose"] for result in (fused, packed)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, nan_ok=True)


@needs_integers
@pytest.mark.parametrize("kind", ["run", "export"])
def test_every_backend_that_works_here_gives_the_same_figures(run: Run, text: Path, kind: str):
    """To the last digit (docs/decisions/0011-exact-sums.md), so what is asked for is a matter of time alone."""
    export(run, "flatq", None, SilentProgress())
    target = str(run.path / "export" / "flatq" if kind == "export" else run.path)
    asked = EvalRequest(target, ppl=(str(text),), tasks=(f"lastword:{text}",), seqlen=16, limit=2, cache=False)
    default, *others = (
        evaluate(replace(asked, backend=backend), SilentProgress()) for backend in (None, "reference", "cpu", "auto")
    )
    for other in others:
        assert other.perplexity == default.perplexity
        assert other.tasks == default.tasks


def test_a_backend_that_does_not_work_is_refused_before_the_model_is_read(run: Run, model_dir: Path, text: Path):
    directory = str(run.path / "export" / "flatq")
    export(run, "flatq", None, SilentProgress())
    for target, backend, reason in (
        (directory, "cuda", "--backend cuda: "),
        (str(run.path), "cuda", "--backend cuda: "),
        (str(run.path), "abacus", "--backend: there is no 'abacus'"),
        (str(model_dir), "cpu", "--backend cpu: .* is a float model; leave it out"),
    ):
        with pytest.raises(UsageError, match=reason):
            evaluate(EvalRequest(target, ppl=(str(text),), seqlen=16, backend=backend), SilentProgress())


def test_the_backend_is_that_of_a_quantized_baseline_too_and_not_of_a_float_one(
    run: Run, model_dir: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen: list[tuple[str, str]] = []
    through = Target.compute_through
    monkeypatch.setattr(
        Target, "compute_through", lambda self, name: (chosen.append((self.spec, name)), through(self, name))[1]
    )
    asked = EvalRequest(str(run.path), ppl=(str(text),), seqlen=16, limit=1, backend="reference", cache=False)
    evaluate(replace(asked, baseline=str(model_dir)), SilentProgress())
    assert chosen == [(str(run.path), "reference")]
    export(run, "flatq", None, SilentProgress())
    baseline = str(run.path / "export" / "flatq")
    evaluate(replace(asked, baseline=baseline), SilentProgress())
    assert chosen[1:] == [(str(run.path), "reference"), (baseline, "reference")]


@pytest.mark.parametrize("works", [pytest.param(True, marks=needs_integers), False])
def test_by_default_integers_are_multiplied_where_that_works(
    run: Run, text: Path, monkeypatch: pytest.MonkeyPatch, works: bool
):
    multiplied: list[object] = []
    linear = Cpu.linear
    monkeypatch.setattr(Cpu, "linear", lambda self, module, x: (multiplied.append(module), linear(self, module, x))[1])
    if not works:
        monkeypatch.setattr(Cpu, "why_not", lambda *_: "no such kernels")
    evaluate(EvalRequest(str(run.path), ppl=(str(text),), seqlen=16, limit=2, cache=False), SilentProgress())
    assert bool(multiplied) == works


def test_quantization_changes_the_perplexity_and_the_baseline_stands_beside_it(run: Run, model_dir: Path, text: Path):
    asked = EvalRequest(str(run.path), ppl=(str(text),), seqlen=32, limit=4, baseline=str(model_dir))
    result = evaluate(asked, SilentProgress())
    assert result.baseline is not None
    alone = evaluate(EvalRequest(str(model_dir), ppl=(str(text),), seqlen=32, limit=4), SilentProgress())
    assert result.baseline.perplexity == alone.perplexity
    assert result.perplexity != alone.perplexity
    assert result.to_json()["baseline"]["kind"] == "float"


def test_the_result_of_a_run_is_kept_in_it(run: Run, text: Path):
    asked = EvalRequest(str(run.path), ppl=(str(text),), seqlen=16, limit=2)
    result = evaluate(asked, SilentProgress())
    (kept,) = run.path.glob("eval/ppl-little-prose-16-limit-2-*.json")
    assert json.loads(kept.read_text()) == result.to_json()
    assert f"{result.perplexity['little-prose'].value:.4g}" in kept.with_suffix(".md").read_text()


def test_a_run_that_is_not_fused_says_what_to_run(model_dir: Path, text: Path, tmp_path: Path):
    recipe = load_recipe("rtn", [f"calibration.data={text}", "calibration.samples=2", "calibration.seqlen=16"])
    run = open_or_create_run(str(model_dir), recipe, tmp_path / "run")
    with pytest.raises(UsageError, match="flatq fuse"):
        evaluate(EvalRequest(str(run.path), ppl=(str(text),)), SilentProgress())


def test_nothing_to_evaluate_says_what_to_give():
    with pytest.raises(UsageError, match=r"--ppl FILE.*--tasks"):
        evaluate(EvalRequest("anything"), SilentProgress())


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"seqlen": 1}, "--seqlen"),
        ({"limit": 0}, "--limit"),
        ({"batch": 0}, "--batch"),
        ({"prompting": Prompting(num_fewshot=-1), "tasks": ("piqa",)}, "--num-f"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_the_name_of_their_option(wrong: dict[str, Any], option: str):
    with pytest.raises(UsageError, match=option):
        evaluate(EvalRequest("anything", ppl=("pydoc",), **wrong), SilentProgress())


def test_a_missing_text_is_found_before_anything_is_measured(model_dir: Path, text: Path):
    progress = Lines()
    with pytest.raises(UsageError, match=r"no-such\.txt"):
        evaluate(EvalRequest(str(model_dir), ppl=(str(text), "no-such.txt"), seqlen=32), progress)
    assert progress.lines == []


def test_two_texts_of_one_name_are_refused(model_dir: Path, text: Path, tmp_path: Path):
    (tmp_path / "little-prose.md").write_text("Another.")
    with pytest.raises(UsageError, match="two texts are called 'little-prose'"):
        evaluate(EvalRequest(str(model_dir), ppl=(str(text), str(tmp_path / "little-prose.md"))), SilentProgress())


def test_a_model_that_gives_nan_is_reported_and_does_not_crash(model_dir: Path, text: Path, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(tmp_path)
    for file in model_dir.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    progress = Lines()
    result = evaluate(EvalRequest(str(tmp_path), ppl=(str(text),), seqlen=32, limit=1), progress)
    assert math.isnan(result.perplexity["little-prose"].value)
    assert result.to_json()["perplexity"]["little-prose"]["value"] is None
    assert any("null" in line for line in progress.lines)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A folder with a few questions for `piqa`, half of which any model gets right."""
    rows = [{"query": "Question: the old dog?", "choices": ["the", "a river"], "gold": index % 2} for index in range(8)]
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_tasks_from_a_folder_are_kept_by_their_plain_names_with_the_file_and_its_hash(run: Run, mirror: Path):
    asked = EvalRequest(
        str(run.path), tasks=("piqa",), data_dir=mirror, limit=6, batch=2, baseline=run.config.model.spec
    )
    result = evaluate(asked, SilentProgress()).to_json()
    digest = hashlib.sha256((mirror / "piqa.jsonl").read_bytes()).hexdigest()
    data = {"piqa": {"file": str(mirror / "piqa.jsonl"), "sha256": digest, "questions": 8}}
    assert list(result["tasks"]) == ["piqa"]
    assert result["tasks"]["piqa"]["acc"] == result["baseline"]["tasks"]["piqa"]["acc"] == 0.5
    assert (result["data"], result["baseline"]["data"]) == (data, data)
    (kept,) = run.path.glob("eval/tasks-piqa-data-mirror-limit-6-against-*.json")
    assert json.loads(kept.read_text()) == result
    assert "| piqa: acc | 0.5 | 0.5 |" in kept.with_suffix(".md").read_text()


def test_wrong_questions_in_a_folder_are_found_before_the_model_is_opened(mirror: Path):
    with (mirror / "piqa.jsonl").open("a") as file:
        file.write('{"query": "Question: x", "choices": ["a", "b"]}\n')
    with pytest.raises(UsageError, match=r"piqa\.jsonl:9: no field 'gold'"):
        evaluate(EvalRequest("no/model", tasks=("piqa",), data_dir=mirror), SilentProgress())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"tasks": (), "ppl": ("pydoc",)}, "no task is given"),
        ({"tasks": (), "ppl": ("pydoc",), "data_dir": None, "log_samples": Path("x")}, "--log-samples: is about"),
        ({"prompting": Prompting(num_fewshot=5)}, "--num-fewshot: --data-dir has no examples"),
        ({"prompting": Prompting(fewshot_as_multiturn=False)}, "it needs --apply-chat-template"),
        ({"tasks": ("mmlu",)}, "no task 'mmlu'; it knows arc_easy, piqa, winogrande, hellaswag"),
    ],
)
def test_what_a_folder_of_questions_cannot_do_is_refused(mirror: Path, wrong: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        check_request(EvalRequest("anything", **{"tasks": ("piqa",), "data_dir": mirror, **wrong}))


def test_names_of_results_differ_where_the_request_does_and_fit_a_file_system():
    requests = [
        EvalRequest("run", ppl=("a",)),
        EvalRequest("run", ppl=("a",), seqlen=1024),
        EvalRequest("run", ppl=("a",), limit=8),
        EvalRequest("run", ppl=("a",), baseline="full/model"),
        EvalRequest("run", tasks=("piqa", "lastword:some/file.txt")),
        EvalRequest("run", tasks=("piqa", "lastword:some/file.txt"), prompting=Prompting(num_fewshot=5)),
        EvalRequest("run", tasks=("piqa", "lastword:some/file.txt"), data_dir=Path("some/mirror")),
        EvalRequest("run", tasks=("piqa", "lastword:some/file.txt"), data_dir=Path(".")),
        EvalRequest("run", tasks=("piqa",), include_path=Path("some/tasks")),
        EvalRequest("run", tasks=("piqa",), prompting=Prompting(chat_template=True)),
        EvalRequest("run", tasks=("piqa",), prompting=Prompting(chat_template=True, fewshot_as_multiturn=False)),
        EvalRequest("run", tasks=("piqa",), prompting=Prompting(system_instruction="Be brief.")),
        EvalRequest("run", tasks=("piqa",), prompting=Prompting(system_instruction="Be long.")),
        EvalRequest("run", ppl=("a",), device="cuda"),
        EvalRequest("run", ppl=("a",), baseline="other/model"),
        EvalRequest("run", tasks=tuple(f"mmlu_{i}" for i in range(50))),
        EvalRequest("run", tasks=tuple(f"mmlu_{i}" for i in range(51))),
    ]
    names = [result_name(request, request.ppl, {}) for request in requests]
    assert re.fullmatch(r"ppl-a-2048-limit-8-[0-9a-f]{8}", names[2])
    names += [result_name(requests[0], ("a",), {content: "a"}) for content in ("0" * 64, "1" * 64)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 120 and "/" not in name and ":" not in name for name in names)


def test_an_edited_task_file_makes_another_result(tmp_path: Path):
    request = EvalRequest("run", tasks=("mine",), include_path=tmp_path)
    names = []
    for content in ("task: mine", "task: mine  # changed"):
        (tmp_path / "mine.yaml").write_text(content)
        names.append(result_name(request, (), {}))
    assert names[0] != names[1]


def test_every_question_is_logged_with_its_answers_where_that_is_asked(run: Run, mirror: Path, tmp_path: Path):
    file = tmp_path / "samples.jsonl"
    asked = {"tasks": ("piqa",), "data_dir": mirror, "log_samples": file, "baseline": run.config.model.location}
    result = evaluate(EvalRequest(str(run.path), **asked), SilentProgress())
    logged = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [sample["doc_id"] for sample in logged] == [*range(8), *range(8)]
    assert [sample["model"] for sample in logged[::8]] == [str(run.path), run.config.model.location]
    assert {sample["task"] for sample in logged} == {"piqa"}
    assert sum(sample["acc"] for sample in logged[:8]) / 8 == result.tasks["piqa"]["acc"]


def test_results_are_immutable():
    result = EvalResult("t", "float", None, {}, {}, {}, 0.0)
    with pytest.raises(AttributeError):
        result.kind = "packed"  # type: ignore[misc]
