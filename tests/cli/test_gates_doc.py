"""The examples of docs/gates.md do what the page says: their shell steps are run as the two CI systems run them."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import flatq_cli
from flatq_cli.config.gate_files import load_gates
from flatq_cli.config.yaml_text import parse_yaml
from tests.tiny import bpe_tokenizer, random_model, save_model, tiny_config

CHECKOUT = Path(flatq_cli.__file__).parents[1]
PAGE = (CHECKOUT / "docs" / "gates.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
GATES, GITHUB, GITLAB = EXAMPLES
RECIPE = """\
weights: {{bits: {bits}, rounding: nearest}}
activations: {{bits: {bits}}}
kv_cache: {{bits: {bits}}}
tune: {{steps: 0}}
calibration: {{data: eval.txt, samples: 4, seqlen: 16}}
"""


def github_steps() -> list[str]:
    """The shell of each step but the installation, in the order of the job."""
    (job,) = parse_yaml(GITHUB, "docs/gates.md").data["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step and not step["run"].startswith("pip ")]


def gitlab_steps() -> list[str]:
    """The script of the job: one shell for all of its lines."""
    return ["\n".join(parse_yaml(GITLAB, "docs/gates.md").data["quantize"]["script"])]


@dataclass(frozen=True)
class Job:
    """How a job went: the exit code of each of its steps, and all that it wrote to stderr."""

    folder: Path
    codes: list[int]
    stderr: str


def run_job(folder: Path, steps: list[str], bits: int, **variables: str) -> Job:
    """A repository with what the page says is in it, and the steps run there until one fails."""
    folder.mkdir()
    rng = random.Random(1)
    sentences = [" ".join(f"w{word}" for word in rng.choices(range(40), k=9)) + " ww." for _ in range(60)]
    (folder / "eval.txt").write_text(" ".join(sentences), encoding="utf-8")
    save_model(random_model(tiny_config("llama")), bpe_tokenizer(), folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(bits=bits), encoding="utf-8")
    (folder / "gates.yaml").write_text(GATES, encoding="utf-8")
    command = folder / "bin" / "flatq"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flatq_cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    outside = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY")
    environment = {key: value for key, value in os.environ.items() if key not in outside} | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "FLATQ_CACHE": str(folder / "cache"),
        "MODEL": "./model",
        "SEQLEN": "32",
        **variables,
    }
    codes: list[int] = []
    said = ""
    for step in steps:
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step]
        done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
        codes.append(done.returncode)
        said += done.stderr
        if done.returncode:
            break
    return Job(folder, codes, said)


def verdicts(job: Job) -> dict[str, bool]:
    """Of each test case of the job's JUnit file, whether it passed."""
    cases = ElementTree.parse(job.folder / "gates.xml").getroot().iter("testcase")
    return {str(case.get("name")): case.find("failure") is None for case in cases}


def test_the_gate_file_on_the_page_is_one(tmp_path: Path):
    (tmp_path / "gates.yaml").write_text(GATES, encoding="utf-8")
    assert len(load_gates([str(tmp_path / "gates.yaml")])) == 4


@pytest.mark.parametrize("steps", [github_steps(), gitlab_steps()], ids=["github", "gitlab"])
def test_a_good_model_passes_the_job(tmp_path: Path, steps: list[str]):
    job = run_job(tmp_path / "repository", steps, bits=8)
    assert job.codes == [0] * len(steps), job.stderr
    assert len(verdicts(job)) == 4
    assert all(verdicts(job).values())
    assert (job.folder / "result.json").is_file()


def test_a_bad_model_stops_the_job_and_says_why_where_the_page_says(tmp_path: Path):
    summary = tmp_path / "summary.md"
    job = run_job(
        tmp_path / "repository", github_steps(), bits=2, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary)
    )
    assert job.codes == [3], job.stderr
    assert not verdicts(job)["top1_agreement"]
    assert (job.folder / "result.json").is_file()
    lines = job.stderr.splitlines()
    assert any(line.startswith("::error title=flatq gate top1_agreement::regression: ") for line in lines)
    assert re.match(r"flatq: \d of 4 gates failed: .*top1_agreement: regression: ", lines[-1])
    assert "gates failed**" in summary.read_text(encoding="utf-8")


def test_the_files_that_the_jobs_keep_are_those_that_their_steps_write():
    def parsed(text: str) -> Any:
        return parse_yaml(text, "docs/gates.md").data

    (upload,) = [step for step in parsed(GITHUB)["jobs"]["quantize"]["steps"] if "upload" in step.get("uses", "")]
    artifacts = parsed(GITLAB)["quantize"]["artifacts"]
    assert upload["if"] == "always()"
    assert artifacts["when"] == "always"
    for kept in (upload["with"]["path"], *artifacts["paths"]):
        assert f"--json {kept}" in GITHUB
        assert f"--json {kept}" in GITLAB
    assert f"--junit {artifacts['reports']['junit']}" in GITLAB
