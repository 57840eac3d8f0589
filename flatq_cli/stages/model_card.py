"""The model card of an export: README.md, as the Hugging Face hub shows it and as a person in the directory reads it.

What the model is, what it scores, how small it is, how to load it, and the recipe. The figures are those that RUN/eval
holds when the card is written; `flatq export`, given again after `flatq eval`, writes the card anew and nothing else.

Nothing of the present moment and no place of this machine gets into it: the same run gives the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flatq_cli.config.presets import load_preset, preset_names
from flatq_cli.config.yaml_text import dump_yaml
from flatq_cli.evaluation.report_text import bits_name, figure, settings, size
from flatq_cli.evaluation.tables import markdown_table
from flatq_cli.models.gguf_header import read_header
from flatq_cli.store.records import DataIdentity, ModelIdentity
from flatq_cli.store.run import Run
from flatq_cli.store.versions import package_versions

CARD = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
MEASURED = ("fake-quant", "packed")
"""Kinds of results that are figures of this model; a run's folder may hold others beside them."""

_LOADING = """\
With flatq installed (`pip install flatq`), from the command line, on a CPU or a GPU:

    flatq generate DIR "The capital of France is"
    flatq eval DIR --ppl FILE

`DIR` is this directory. From Python:

```python
import flatq_cli  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)
```

In place of the import, `trust_remote_code=True` does the same: `modeling_flatq.py` in this directory imports flatq. So
programs that know transformers alone load it too:

    lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks piqa

The weights are integer codes with float32 scales in safetensors files; `docs/format.md` of flatq describes every
byte."""


def model_card(run: Run, metrics: Mapping[str, Any], license: Mapping[str, str]) -> str:
    """The text of the card.

    Args:
        metrics: of the export: `bytes`, `float16_bytes`, `compression`.
        license: what `license_of` found.
    """
    config = run.config
    recipe = config.recipe.model_dump(mode="json")
    name = f"{config.model.name} {bits_name(recipe)}"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config.model, recipe, license), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        _summary(config.model, config.recipe_name),
        "## Figures",
        _figures(run),
        "## Size",
        f"The weights take {size(metrics['bytes'])}. The original's take {size(metrics['float16_bytes'])} in 16 bits, "
        f"{metrics['compression']:.2f} times as much. Embedding, norms and head are not quantized.",
        "## Loading",
        _LOADING,
        "## Recipe",
        _words(config.model, config.data, recipe),
        f"In full, as `flatq calibrate --recipe` reads it:\n\n```yaml\n{dump_yaml(_portable(recipe)).rstrip()}\n```",
        "## Versions",
        _versions(config.versions),
    ]
    return "\n\n".join(parts) + "\n"


def license_of(model: Path, card: Path) -> dict[str, str]:
    """The licence keys of the hub, as far as the original model states them.

    Args:
        model: the original's directory (its README.md or config.json may say it) or `.gguf` file (its header may).
        card: a card that was written before. It keeps what it says where the original is no longer there.
    """
    if model.is_file():
        stated = _gguf_license(model)
    elif model.is_dir():
        stated = _front_matter_of(model / CARD) or _json_object(model / "config.json")
        if "license" not in stated:
            stated = _json_object(model / "config.json")
    else:
        stated = _front_matter_of(card)
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)} if "license" in stated else {}


def base_model(model: ModelIdentity) -> str | None:
    """The original's repository on the hub: of a preset, or what was downloaded from there; else unknown."""
    if model.spec in preset_names():
        return load_preset(model.spec).hub
    return model.spec if model.revision is not None else None


def _front_matter(model: ModelIdentity, recipe: Mapping[str, Any], license: Mapping[str, str]) -> dict[str, Any]:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards."""
    base, bits = base_model(model), recipe["weights"]["bits"]
    return {
        **({} if base is None else {"base_model": base, "base_model_relation": "quantized"}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **license,
        "tags": ["flatq", "flatquant", "quantized", *([f"{bits}-bit"] if bits < 16 else []), bits_name(recipe).lower()],
    }


def _summary(model: ModelIdentity, recipe_name: str | None) -> str:
    base = base_model(model)
    original = model.name if base is None else f"[{base}](https://huggingface.co/{base})"
    where = f"{original} ({model.model_type}, {model.num_blocks} blocks"
    where += f", from a GGUF: {Path(model.location).name})" if model.kind == "gguf" else ")"
    by = f"the recipe `{recipe_name}`" if recipe_name else "a recipe of its own"
    return (
        f"{where}, quantized with flatq by {by}. flatq follows FlatQuant "
        "([arXiv 2410.09426](https://arxiv.org/abs/2410.09426)): invertible maps before the linear layers and on keys "
        "and values flatten what is rounded."
    )


def _figures(run: Run) -> str:
    """A row for each figure of RUN/eval, the full-precision model's beside it where a result has it as its baseline."""
    rows = []
    # `flatq eval` names its results by how they were measured; those come first, whatever else is in the folder.
    files = (run.path / "eval").glob("*.json")
    for file in sorted(files, key=lambda file: (not file.stem.startswith(("ppl-", "tasks-")), file.stem)):
        result = _json_object(file)
        if result.get("schema") == "flatq.eval/1" and result.get("kind") in MEASURED:
            rows += [[label, figure(value), figure(full), file.stem] for label, value, full in _measured(result)]
    if not rows:
        return "None yet: `flatq eval RUN`, then `flatq export RUN` again puts them here."
    distinct = {tuple(row[:3]): row for row in reversed(rows)}  # the first of equal ones
    table = markdown_table(["", "quantized", "full precision", "result"], list(reversed(distinct.values())))
    return (
        table + "\nMeasured by flatq on the fused model of the run, which gives the logits of this export. A result's "
        "name says how: window, and `limit` where only the first windows of a text or questions of a task were used."
    )


def _measured(result: Mapping[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    """Label, value, and the baseline's value if that is a full-precision model."""
    baseline = result.get("baseline") or {}
    if baseline.get("kind") != "float":
        baseline = {}
    full = baseline.get("perplexity", {})
    for name, measured in result["perplexity"].items():
        label = f"perplexity of {name} ({measured['tokens']:,} tokens in windows of {measured['seqlen']:,})"
        yield label, measured["value"], full.get(name, {}).get("value")
    for task, metrics in result["tasks"].items():
        full = baseline.get("tasks", {}).get(task, {})
        for metric, value in metrics.items():
            if "_stderr" not in metric:
                yield f"{task}: {metric}", value, full.get(metric)


def _words(model: ModelIdentity, data: DataIdentity | None, recipe: Mapping[str, Any]) -> str:
    """The recipe in words, and by what model and text are known again."""
    text = None if data is None else {**data.model_dump(), "name": Path(data.name).name}
    said = settings({"model": model.model_dump(), "data": text, "recipe": _portable(recipe)}).rows
    lines = [f"- {setting}: {words}" for setting, words in said if setting != "model"]
    if data is not None:
        name = Path(data.name).name
        lines.append(f"- calibration text: {name}, {data.characters:,} characters, SHA-256 {data.sha256}")
    lines.append(f"- fingerprint of the original: {model.fingerprint}")
    return "\n".join(lines)


def _portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the folder of the calibration text, which means nothing elsewhere."""
    calibration = recipe["calibration"]
    return {**recipe, "calibration": {**calibration, "data": Path(calibration["data"]).name}}


def _versions(made: Mapping[str, str]) -> str:
    now = package_versions()
    lines = [f"Quantized with {_listed(made)}."] if made else []
    return "\n".join(lines if now == made else [*lines, f"Exported with {_listed(now)}."])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _gguf_license(file: Path) -> dict[str, Any]:
    """`general.license…` of a GGUF's header, under the hub's names; {} for a file that is damaged by now."""
    keys = {key: f"general.{key.replace('_', '.')}" for key in LICENSE_KEYS}
    try:
        fields = read_header(file).fields
        return {key: fields[name].contents() for key, name in keys.items() if name in fields}
    except Exception:  # gguf validates nothing
        return {}


def _front_matter_of(card: Path) -> dict[str, Any]:
    """The front matter of a card; {} where there is none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
        begin, front, _ = text.split("---\n", 2)
        content = yaml.safe_load(front) if not begin else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
