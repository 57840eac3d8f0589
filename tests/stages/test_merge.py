from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from flatq_cli.errors import UsageError
from flatq_cli.evaluation.prompting import Prompting
from flatq_cli.evaluation.shard import Shard
from flatq_cli.stages.eval_request import EvalRequest
from flatq_cli.stages.evaluate import evaluate
from flatq_cli.stages.merge import merge
from flatq_cli.store.progress import SilentProgress
from flatq_cli.store.run import Run
from tests.evaluation.own_tasks import GROUP, NAMES, write_own_tasks
from tests.tiny import bpe_tokenizer, fused_run, random_model, save_model, tiny_config

OF_THE_MACHINE = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fused_run(tmp_path_factory.mktemp("run"), "llama")


@pytest.fixture(scope="module")
def asked(run: Run, tmp_path_factory: pytest.TempPathFactory) -> EvalRequest:
    """A text, every kind of task and a group, of a run and of its model; nothing is taken from what is kept."""
    folder = tmp_path_factory.mktemp("own")
    text = folder / "words.txt"
    text.write_text((run.path.parent / "text.txt").read_text()[:700], encoding="utf-8")
    return EvalRequest(
        str(run.path),
        tasks=NAMES,
        ppl=(str(text),),
        seqlen=16,
        limit=9,
        baseline=run.config.model.location,
        include_path=write_own_tasks(folder / "tasks"),
        prompting=Prompting(num_fewshot=1),
        cache=False,
    )


@pytest.fixture(scope="module", autouse=True)
def _tasks_of_the_folder_alone():
    """Listing those of the harness takes seconds."""
    alone = partial(TaskManager, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **options: alone(include_path=include_path))
        yield


def measured(request: EvalRequest, **changes: Any) -> dict[str, Any]:
    """The result as a file has it."""
    request = EvalRequest(**{**vars(request), **changes})
    return json.loads(json.dumps(evaluate(request, SilentProgress()).to_json(), allow_nan=False))


def of_the_model(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result that the machine's speed does not decide."""
    kept = {key: value for key, value in result.items() if key not in OF_THE_MACHINE}
    return {**kept, "baseline": of_the_model(result["baseline"])} if "baseline" in result else kept


@pytest.fixture(scope="module")
def whole(asked: EvalRequest) -> dict[str, Any]:
    return measured(asked)


@pytest.fixture(scope="module")
def parts(asked: EvalRequest) -> list[dict[str, Any]]:
    """The three shards of the evaluation."""
    return [measured(asked, shard=Shard(part, 3)) for part in (1, 2, 3)]


def written(folder: Path, results: list[dict[str, Any]]) -> list[Path]:
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results, strict=True):
        file.write_text(json.dumps(result))
    return files


def merged(folder: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    return json.loads(json.dumps(merge(written(folder, results), SilentProgress()).to_json(), allow_nan=False))


def test_three_shards_join_to_the_very_result_of_a_whole_evaluation(whole, parts, tmp_path: Path):
    found = merged(tmp_path, [parts[2], parts[0], parts[1]])
    assert of_the_model(found) == of_the_model(whole)
    assert found["tasks"][GROUP]["acc"] is not None
    assert found["seconds"] == pytest.approx(sum(part["seconds"] for part in parts), abs=0.01)
    assert found["peak_memory_bytes"] == max(part["peak_memory_bytes"] for part in parts)


def test_so_do_two_of_a_target_without_a_baseline(asked: EvalRequest, tmp_path: Path):
    alone = {"baseline": None, "tasks": ("own_choice", "own_rolling"), "prompting": Prompting()}
    two = [measured(asked, shard=Shard(part, 2), **alone) for part in (1, 2)]
    assert of_the_model(merged(tmp_path, two)) == of_the_model(measured(asked, **alone))


def test_a_shard_says_which_it_is_and_measures_its_part(whole, parts):
    windows = whole["perplexity"]["words"]["tokens"] // 16
    assert windows == 9
    for number, part in enumerate(parts):
        assert (part["shard"]["part"], part["shard"]["of"]) == (number + 1, 3)
        assert part["shard"]["texts"]["words"]["indices"] == list(range(number, windows, 3))
        assert part["perplexity"]["words"]["tokens"] == 3 * 16
        assert part["harness"]["own_choice"]["questions"] == {"asked": 3, "of": 11}
        assert "shard" in part["baseline"]


def test_a_run_keeps_its_shards_apart_and_the_whole_among_its_results(run: Run, asked: EvalRequest, tmp_path: Path):
    alone = {"baseline": None, "tasks": (), "include_path": None, "prompting": Prompting(), "seqlen": 8}
    for part in (1, 2):
        measured(asked, shard=Shard(part, 2), **alone)
    assert list(run.path.glob("eval/ppl-words-8-*.json")) == []
    shards = sorted(run.path.glob("eval/shards/ppl-words-8-*.json"))
    assert [file.stem[-6:] for file in shards] == ["1-of-2", "2-of-2"]
    merge(shards, SilentProgress())
    (kept,) = run.path.glob("eval/ppl-words-8-*.json")
    before = json.loads(kept.read_text())
    measured(asked, **alone)
    assert of_the_model(json.loads(kept.read_text())) == of_the_model(before)


def test_shards_of_one_model_that_lies_elsewhere_on_each_machine_are_joined(
    asked: EvalRequest, run: Run, tmp_path: Path
):
    """With another path, and other times of its files."""
    model, two = Path(run.config.model.location), []
    for part in (1, 2):
        place = shutil.copytree(model, tmp_path / f"machine {part}" / "model", copy_function=shutil.copyfile)
        alone = {"target": str(place), "baseline": None, "tasks": (), "include_path": None, "prompting": Prompting()}
        two.append(measured(asked, shard=Shard(part, 2), **alone))
    assert merged(tmp_path, two)["perplexity"] == measured(asked, **{**alone, "target": str(model)})["perplexity"]


def test_shards_of_models_with_other_tokens_are_joined(asked: EvalRequest, tmp_path: Path):
    """Each cuts the text into windows of its own."""
    letters = bpe_tokenizer("a", vocabulary=258, every_byte=True)
    other = save_model(random_model(tiny_config("llama", vocab_size=258)), letters, tmp_path / "other")
    alone = {"baseline": str(other), "tasks": (), "include_path": None, "prompting": Prompting(), "limit": None}
    two = [measured(asked, shard=Shard(part, 2), **alone) for part in (1, 2)]
    whole = measured(asked, **alone)
    assert whole["perplexity"]["words"]["tokens"] != whole["baseline"]["perplexity"]["words"]["tokens"]
    assert of_the_model(merged(tmp_path, two)) == of_the_model(whole)


def test_broken_models_are_joined_too(asked: EvalRequest, parts, tmp_path: Path):
    """A loss that is not finite is text in JSON."""
    broken = copy.deepcopy(parts)
    broken[1]["shard"]["texts"]["words"]["losses"][0] = "inf"
    assert merged(tmp_path, broken)["perplexity"]["words"]["value"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.pop(1), r"^shard 2/3 is missing; give all 3$"),
        (lambda parts: parts.append(parts[0]), r"3\.json: is shard 1/3, and .*0\.json is that too"),
        (lambda parts: parts[2]["shard"].update(of=4), r"2\.json: is one of 4 shards, and .*0\.json one of 3"),
        (lambda parts: parts[1].update(kind="packed"), r"1\.json: kind is packed, and in .*0\.json it is fake-quant"),
        (lambda parts: parts[1]["versions"].update(torch="1.0"), r"1\.json: torch is 1\.0, and in .*0\.json it is"),
        (lambda parts: parts[2]["shard"]["settings"].update(limit=8), r"2\.json: limit is 8, and in .*0\.json it is 9"),
        (lambda parts: parts[2]["shard"]["settings"].update(model="x"), r"2\.json: .* is not the model of .*0\.json, "),
        (lambda parts: parts[1]["baseline"]["shard"]["settings"].update(model="x"), r"1\.json: .* is not the model of"),
        (lambda parts: parts[1].pop("baseline"), r"1\.json: has no baseline, and .*0\.json has one"),
        (lambda parts: parts[1]["shard"]["tasks"].pop("own_choice"), r"1\.json: has other tasks than .*0\.json"),
        (lambda parts: parts[1]["shard"]["texts"]["words"].pop("losses"), r"1\.json: the evidence in it is damaged"),
        (lambda parts: parts[1]["shard"]["texts"]["words"].update(indices=[0, 1, 2]), "windows of words are not all"),
        (lambda parts: parts[1]["shard"]["tasks"]["own_choice"]["hashes"].pop("1"), "questions of own_choice are not"),
        (lambda parts: parts[1].pop("shard"), r"1\.json: not a shard; `flatq eval TARGET … --shard 1/4"),
    ],
    ids=[
        "missing", "twice", "of another division", "another kind", "another version", "another limit",
        "another model", "another baseline", "no baseline", "another task", "damaged", "windows twice",
        "a question missing", "no shard",
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_with_the_file(parts, tmp_path: Path, change, words: str):
    changed = copy.deepcopy(parts)
    change(changed)
    with pytest.raises(UsageError, match=words):
        merge(written(tmp_path, changed), SilentProgress())


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "flatq.eval/1"}'])
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, content: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=r"x\.json: not"):
        merge([tmp_path / "x.json"], SilentProgress())
    with pytest.raises(UsageError, match=r"cannot read .*nowhere\.json"):
        merge([tmp_path / "nowhere.json"], SilentProgress())
