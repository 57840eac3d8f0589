"""`flatq run PIPELINE.yaml`, in a folder of its own."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.cli.test_pipeline import flatq, here
from tests.tiny import tiny_model_dir, tiny_text

PIPELINE = """\
model: tiny
recipe: balanced
run: {run}
set:
  calibration: {{data: text.txt, samples: 4, seqlen: 16}}
  weights: {{bits: 8}}  # of 4 bits a random model may come out better than it was, which no gate lets pass
  activations: {{bits: 8}}
  kv_cache: {{bits: 8}}
eval: {{ppl: [text.txt], seqlen: 32, limit: 4, baseline: tiny, json: {run}.json, junit: {run}.xml}}
gates:
  - {{metric: perplexity, max: {limit}}}
"""


def write(folder: Path, run: str, limit: float) -> str:
    file = folder / f"{run}.yaml"
    file.write_text(PIPELINE.format(run=run, limit=limit), encoding="utf-8")
    return file.name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text, where this process is."""
    tiny_model_dir(tmp_path, "llama").rename(tmp_path / "tiny")
    tiny_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_one_file_takes_a_model_through_all_stages_and_its_gate(place: Path):
    said = flatq(place, "run", write(place, "good", 1e6))
    assert said.code == 0, said.stderr
    result = json.loads((place / "good.json").read_text())
    assert (result["target"], result["baseline"]["target"]) == ("good", "tiny")
    assert [(gate["metric"], gate["verdict"]) for gate in result["gates"]] == [("perplexity.text", "pass")]
    assert (place / "good" / "export" / "flatq" / "config.json").is_file()
    card = (place / "good" / "export" / "flatq" / "README.md").read_text()
    assert f"{result['perplexity']['text']['value']:.4g}" in card


def test_a_gate_that_fails_ends_the_pipeline_with_3_when_all_is_written(place: Path):
    said = here("run", write(place, "bad", 1.5))
    assert said.code == 3
    assert "perplexity: regression" in said.stderr.splitlines()[-1]
    assert json.loads((place / "bad.json").read_text())["gates"][0]["passed"] is False
    assert ElementTree.parse(place / "bad.xml").getroot().find(".//failure") is not None


def test_options_beside_a_file_replace_what_it_says(place: Path):
    name = write(place, "changed", 1e6)
    said = here("run", name, "--limit", "2", "--set", "weights.bits=6", "--json", "-", "--quiet")
    assert said.code == 0, said.stderr
    assert json.loads(said.stdout)["perplexity"]["text"]["tokens"] == 64
    assert "bits: 6" in (place / "changed" / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "flatq: nothing to run: give --model (`flatq models` lists some), or a pipeline file"),
        (("none.yaml",), "flatq: none.yaml: cannot read this pipeline (No such file or directory)"),
    ],
)
def test_without_a_pipeline_one_line_says_what_is_missing(place: Path, arguments: tuple[str, ...], line: str):
    said = here("run", *arguments)
    assert (said.code, said.stderr.strip(), said.stdout) == (2, line, "")


def test_options_of_tasks_reach_the_evaluation(place: Path):
    write(place, "asked", 1e6)  # the text has no sentences, and so no last words to ask for
    said = here(
        *(
            "run",
            "asked.yaml",
            "--tasks",
            "lastword:text.txt",
            "--system-instruction",
            "Read.",
            "--log-samples",
            "s.jsonl",
        ),
        *("--limit", "1", "--json", "-", "--quiet"),
    )
    assert said.code == 2, said.stderr
    assert "holds no passage" in said.stderr
    assert not (place / "asked").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ppl", "none.txt"), "none.txt"),
        (("--tasks", "piqqa"), "piqqa"),
        (("--baseline", "nobody/nothing"), "nobody/nothing"),
        (("--gates", "tasks"), "acc_drop"),
    ],
)
def test_what_eval_would_end_with_is_found_before_a_run_is_made(place: Path, options: tuple[str, ...], words: str):
    said = here("run", write(place, "early", 1e6), *options)
    assert said.code == 2, said.stderr
    assert words in said.stderr
    assert not (place / "early").exists()
