"""A folder of lm-eval task files as a user writes them: every kind of task, filters, drawn examples, and groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.evaluation.local_data import local_rows

GROUP = "own_group"
NAMES = ("own_choice", "own_rolling", "own_generate", "own_matthews", GROUP)
COUNT = 11


def write_own_tasks(folder: Path) -> Path:
    """Task files in `folder`, their questions beside them; found with `--include-path`."""
    folder.mkdir(parents=True)
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": _questions(folder, "arc_easy"),
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "metadata": {"version": 2.0},
    }
    choice = {**shared, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    shots = {"fewshot_split": "test", "num_fewshot": 2}
    for name, task in {
        "own_choice": {**choice, "metric_list": [metric("acc"), metric("acc_norm"), metric("acc_mutual_info")]},
        "own_matthews": {
            **choice, "dataset_kwargs": _questions(folder, "piqa"),  # of two choices: f1 is about yes and no
            "metric_list": [metric("mcc", "matthews_corrcoef"), metric("f1", "f1")],
        },
        "own_shots": {**choice, **shots, "metric_list": [metric("acc")]},
        "own_rolling": {
            **shared, "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [metric("word_perplexity", "weighted_perplexity", better=False)],
        },
        "own_generate": {
            **shared, **shots, "output_type": "generate_until", "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [metric("exact_match")],
            "filter_list": [
                {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
                for name, pattern in (("strict", "(the)"), ("loose", "([a-z]+)"))
            ],
        },
        GROUP: {
            "group": GROUP, "task": ["own_shots", {**choice, "task": "own_inner", "metric_list": [metric("acc")]}],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
        },
    }.items():  # fmt: skip
        named = task if "group" in task else {"task": name, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(named), encoding="utf-8")
    return folder


def _questions(folder: Path, task: str) -> dict[str, Any]:
    """The `dataset_kwargs` of a file with questions like those of a local task."""
    rows = [{**row, "text": f"{row['query']} {row['choices'][row['gold']]}"} for row in local_rows(task, COUNT)]
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}


def metric(name: str, aggregation: str = "mean", better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}
