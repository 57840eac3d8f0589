from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import accuracy
from tests.benchmarks.accuracy import BASELINE, FORMATS, METHODS, page, run_method, run_of, table, trade


def row(name: str, seconds: float | None = None, perplexity: float = 20.0, **more: Any) -> dict[str, Any]:
    texts = {"perplexity.wikitext2-eval": perplexity, "perplexity.pydoc-test": 10.0}
    return {"name": name, "seconds": seconds, "memory_bytes": None, **texts, **more}


SCORES = {"arc_easy.acc": 0.5, "piqa.acc": 0.6, "winogrande.acc": 0.5, "hellaswag.acc_norm": 0.4}


def test_a_row_has_its_figures_and_the_mean_of_its_tasks():
    head, rule, baseline, flatq = table(
        [row(BASELINE, **SCORES), row("flatq", 172.4, 8277.0, memory_bytes=3 * 2**29, **SCORES)]
    )
    assert head.count("|") == rule.count("|") == baseline.count("|") == flatq.count("|")
    assert flatq == "| flatq | 8,277 | 10.00 | 50.0 | 60.0 | 50.0 | 40.0 | 50.0 | 172 | 1.5 GiB |"
    assert baseline == "| full precision | 20.00 | 10.00 | 50.0 | 60.0 | 50.0 | 40.0 | 50.0 |  |  |"


def test_without_tasks_there_are_no_columns_for_them():
    assert table([row("rtn", 10.0)])[0] == "| method | WikiText-2 | Python's reference | seconds | memory |"


def test_the_trade_is_quickest_first_in_shares_of_the_papers_setting():
    lines = trade([row(BASELINE), row("flatquant", 345.0), row("flatq", 172.5), row("balanced", 20.0)])
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| balanced", "| flatq", "| flatquant"]
    assert "| 1/17.2 |" in lines[2]
    assert "| 1/2.0 |" in lines[3]


def test_a_page_has_a_section_for_every_format_that_was_run():
    found = {bits: [row(BASELINE)] for bits in FORMATS} | {"W4A4KV4": [row(BASELINE), row("rtn", 10.0)]}
    text = page(found, {"torch": "2.13.0"})
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## W4A4KV4",
        "## Time against perplexity",
    ]
    assert "torch 2.13.0" in text
    assert "lm-eval" not in text
    found["W4A4KV4"][1] |= SCORES
    assert "four tasks of lm-eval, 200 questions each" in page(found, {"torch": "2.13.0"})


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[tuple[str, ...]] = []

    def flatq(*arguments: object) -> None:
        said.append(tuple(map(str, arguments)))
        if arguments[0] == "eval":
            Path(str(arguments[-1])).write_text(json.dumps({}))

    monkeypatch.setattr(accuracy, "flatq", flatq)
    for _ in range(2):
        run_method("flatq", "W3A16", tmp_path, Path("data"), tasks=True)
    assert [command[0] for command in said] == ["calibrate", "fuse", "eval", "eval", "calibrate", "fuse"]
    assert {"weights.bits=3", "activations.bits=16", "calibration.samples=16"} < set(said[0])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_bundled_recipe_and_has_a_folder_of_its_own(name: str):
    from flatq_cli.config.recipe_files import load_recipe

    changed = [f"{key}={value}" for key, value in {**FORMATS["W3A16"], **METHODS[name].changed}.items()]
    assert load_recipe(METHODS[name].recipe, changed).weights.bits == 3
    folders = {run_of(other, "W3A16", Path("runs")) for other in METHODS}
    assert len(folders) == len(METHODS)


def test_rows_of_another_machine_stay_until_they_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("float", "W4A16/rtn/eval"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "perplexity.json").write_text("{}")
    monkeypatch.setattr(accuracy, "compare", lambda paths: [row("here", 5.0, 30.0)])
    known = {"W4A16": [row(BASELINE), row("rtn", 8.0), row("balanced", 17.0, 22.4)], "W3A16": [row("spin", 1.0)]}
    found = accuracy.gather(tmp_path, tasks=False, known=known)
    assert [(item["name"], item.get("seconds")) for item in found["W4A16"][1:]] == [("rtn", 5.0), ("balanced", 17.0)]
    assert found["W4A16"][1]["perplexity.wikitext2-eval"] == 30.0
    assert [item["name"] for item in found["W3A16"]] == [BASELINE, "spin"]
    assert [item["name"] for item in found["W4A4KV4"]] == [BASELINE]
