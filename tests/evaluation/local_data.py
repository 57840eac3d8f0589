"""Questions in the tiny language as a local mirror has them, the same as the hub has them, and the harness on each."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flatq_cli.evaluation.local_tasks import task_file

Row = dict[str, Any]
TASKS = ("arc_easy", "piqa", "winogrande", "hellaswag")
HARNESS = Path(lm_eval.tasks.__file__).parent
OWN_YAML = {
    "arc_easy": HARNESS / "arc/arc_easy.yaml",
    "piqa": HARNESS / "piqa/piqa.yaml",
    "winogrande": HARNESS / "winogrande/default.yaml",
    "hellaswag": HARNESS / "hellaswag/hellaswag.yaml",
}

# Quotes, brackets, several spaces, other scripts, numbers: what a template can stumble over.
ODD = [
    "a \"quoted\" 'word'",
    "ends in two  spaces",
    "[not] a list",
    "10",
    "naïve Straße 日本\u2028x",
    "{{ braces }} \\n",
]


def local_rows(task: str, count: int = 12, seed: int = 0) -> list[Row]:
    """Questions as a mirror has them; some are odd, most are in the tiny language."""
    rng = random.Random(f"{task} {seed}")
    things = ["the old dog.", "the old cat, which sees the river.", "the garden", "The window follows.", *ODD]
    rows = []
    for index in range(count):
        text = f"The {rng.choice(['dog', 'cat', 'river'])} {rng.choice(['sees', *ODD])}"
        choices = rng.sample(things, 2 if task in ("piqa", "winogrande") else 4)
        answer = rng.randrange(len(choices))
        if task in ("arc_easy", "piqa"):
            rows.append({"query": f"Question: {text}?", "choices": choices, "gold": answer})
        elif task == "winogrande":
            contexts = [f"{text} {name}" for name in ("the dog", "the cat")]
            rows.append({"context_options": contexts, "continuation": choices[0], "gold": answer})
        else:
            texts = {"activity_label": rng.choice(ODD), "ctx_a": f" {text} [title] Step [one].", "ctx_b": choices[0]}
            endings = [f"{choice} [substeps]  and [title] more" for choice in choices]
            rows.append(
                {**texts, "ctx_b": "" if index % 3 == 0 else texts["ctx_b"], "endings": endings, "label": answer}
            )
    return rows


def hub_row(task: str, row: Row) -> Row:
    """The same question with the fields that it has on the hub, where lm-eval's own YAML expects it."""
    if task == "winogrande":
        before, after = row["context_options"]
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        sentence = f"{before[:shared]}_ {row['continuation']}"
        options = {"option1": before[shared:], "option2": after[shared:]}
        return {"sentence": sentence, **options, "answer": str(row["gold"] + 1)}
    if task == "hellaswag":
        return {**row, "label": str(row["label"])}
    question, choices = row["query"].removeprefix("Question: "), row["choices"]
    if task == "piqa":
        return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": row["gold"]}
    labels = ["A", "B", "C", "D", "E"][: len(choices)]
    return {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[row["gold"]]}


def write_mirror(folder: Path, rows: dict[str, Sequence[Row]]) -> Path:
    """A folder with `TASK.jsonl` for each of the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, questions in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in questions]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def own_task(task: str, rows: Sequence[Row]) -> Any:
    """lm-eval's own task, from its own YAML, on questions as the hub has them, without the hub."""
    questions = Dataset.from_list([hub_row(task, row) for row in rows])
    splits = {"test": questions, "validation": questions, "train": questions}
    folder = Path(OWN_YAML[task]).parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    config = lm_eval.tasks.manager.load_yaml(OWN_YAML[task])
    return manager.load([{**config, "custom_dataset": lambda **_: splits}])["tasks"][task]


def requests_of(task: Any) -> list[tuple[str, str]]:
    """Context and continuation of everything a task asks, in order."""
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def scores_of_the_harness(model: Any, tokenizer: Any, mirror: Path, folder: Path, batch: int) -> dict[str, Row]:
    """What lm-eval alone says: task files in `folder` that include ours and name a file, found through include_path."""
    folder.mkdir()
    for task in TASKS:
        files = {"data_files": {"test": str(mirror / f"{task}.jsonl")}, "cache_dir": str(folder / "cache")}
        config = {"include": str(task_file(task)), "task": task, "dataset_kwargs": files}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=False,
    )
    figures = {task: values.items() for task, values in results["results"].items()}
    return {
        task: {name.removesuffix(",none"): value for name, value in values if "," in name}
        for task, values in figures.items()
    }
