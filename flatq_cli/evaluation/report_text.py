"""A report in words and tables, from data of schema `flatq.report/1`: what the page and the Markdown both say.

Tables and sentences are plain text, nothing in them is escaped: whoever puts them into a page does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from flatq_cli.evaluation.tables import markdown_table

Data = Mapping[str, Any]

SITES = {
    "attn_in": "before q, k and v",
    "attn_out": "before o",
    "mlp_in": "before gate and up",
    "mlp_out": "before down",
    "key": "keys, after RoPE",
    "value": "what v puts out",
}
STARTS = {"orthogonal": "random orthogonal", "hadamard": "Hadamard"}
FORMS = {"direct": "", "svd": ", each as two orthogonal factors and a diagonal", "orthogonal": ", each orthogonal"}
CLIP_STARTS = {"searched": "clips searched", "fixed": "clips at a fixed factor"}
MOMENTS = ("before", "after", "tuned")
TUNED_SENTENCE = (
    "Tuned: the activation that the tuned block rounds, given what the full-precision block reads, and what rounding "
    "it adds to the tuned block's own product. A tuned matrix is no longer the inverse of what was folded into the "
    "weights, so that product is meant to differ from the full-precision one."
)
LOSSES = {"token": "error of each token relative to its own output", "relative": "error relative to all outputs"}


Values = list[float | None]


class Table(NamedTuple):
    """A table of text; its first column holds names, the others figures or words."""

    header: list[str]
    rows: list[list[str]]


def report_markdown(data: Data) -> str:
    """The report as Markdown: all but the pictures."""
    parts = [f"# {_safe(data['run'])}", _safe(subtitle(data))]
    if data["missing"]:
        parts.append("Missing:\n\n" + "\n".join(f"- {_safe(sentence)}" for sentence in data["missing"]))
    said = "\n".join(f"- {_safe(name)}: {_safe(words)}" for name, words in settings(data).rows)
    parts += ["## Results", _markdown(results(data)), "## What was done", said, _markdown(stages(data))]
    parts.append(_safe(versions(data)))
    if data["blocks"]:
        parts += ["## Blocks", *block_sentences(data), _markdown(blocks(data))]
    if data["tuning"]:
        parts += ["## Tuning", tuning_sentence(data)]
    if data["flatness"]:
        parts += ["## Sites", site_sentence(data), _markdown(sites(data))]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def subtitle(data: Data) -> str:
    """Model, bits and recipe in a line."""
    model = data["model"]
    name = f"{model['name']} ({model['model_type']}, {model['num_blocks']} blocks)"
    return f"{name} at {bits_name(data['recipe'])} by the recipe {data['recipe_name'] or 'of a file'}"


def bits_name(recipe: Data) -> str:
    """`W4A4KV4`."""
    return f"W{recipe['weights']['bits']}A{recipe['activations']['bits']}KV{recipe['kv_cache']['bits']}"


def results(data: Data) -> Table:
    """The compared runs, one a row; a column for each text and each task's figure."""
    rows = data["comparison"]
    fixed = ("name", "kind", "recipe", "bytes", "compression", "seconds", "memory_bytes")
    measured = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in fixed]
    measured.sort(key=lambda key: not key.startswith("perplexity."))
    shown: list[tuple[str, Callable[[Data], str]]] = [
        ("recipe", lambda row: row.get("recipe") or row.get("kind") or "–"),
        *((label(key), lambda row, key=key: figure(row.get(key))) for key in measured),
        ("size", lambda row: size(row.get("bytes"))),
        ("compression", lambda row: _times(row.get("compression"))),
        ("time", lambda row: duration(row.get("seconds"))),
        ("memory", lambda row: size(row.get("memory_bytes"))),
    ]
    return Table(
        ["run", *(name for name, _ in shown)], [[row["name"], *(show(row) for _, show in shown)] for row in rows]
    )


def label(key: str) -> str:
    """`perplexity.wiki` → `perplexity of wiki`; `piqa.acc_norm` → `piqa acc_norm`."""
    first, _, rest = key.partition(".")
    return f"perplexity of {rest}" if first == "perplexity" else key.replace(".", " ")


def settings(data: Data) -> Table:
    """The recipe in words."""
    recipe, calibration = data["recipe"], data["recipe"]["calibration"]
    clips = "clips learned" if calibration["epochs"] else CLIP_STARTS.get(calibration["clip_start"], "clips")
    weights, group = recipe["weights"], recipe["weights"]["group"]
    tokens = f"{calibration.get('rounding_samples') or calibration['samples']} × {calibration['seqlen']} tokens"
    rounding = f"rounded by GPTQ on {tokens}" if weights.get("rounding") == "gptq" else "rounded to the nearest code"
    scales = f"one scale for {group} inputs" if group else "one scale for each output channel"
    rows = [
        ["model", f"{data['model']['spec']}, fingerprint {data['model']['fingerprint'][:12]}"],
        ["weights", _quantizer(weights, clips, scales, rounding)],
        ["activations", _quantizer(recipe["activations"], clips, "one scale for each token")],
        ["KV cache", _quantizer(recipe["kv_cache"], clips, "one scale for each token and head")],
        ["transform", _transform(recipe["transform"])],
        ["calibration", _calibration(data)],
        ["tuning after rounding", _tune(recipe.get("tune", {}))],
    ]
    return Table(["setting", "value"], rows)


def stages(data: Data) -> Table:
    """What each stage wrote, how long it took, and how much memory: on a GPU too where one was used."""
    shown: list[tuple[str, Callable[[Data], str]]] = [
        ("stage", lambda row: row["stage"]),
        ("status", lambda row: row["status"]),
        ("written", lambda row: size(row["bytes"])),
        ("time", lambda row: duration(row["seconds"])),
        ("memory", lambda row: size(row["peak_memory_bytes"])),
    ]
    if any(row["peak_gpu_memory_bytes"] for row in data["stages"]):
        shown.append(("GPU memory", lambda row: size(row["peak_gpu_memory_bytes"])))
    return Table([name for name, _ in shown], [[show(row) for _, show in shown] for row in data["stages"]])


def versions(data: Data) -> str:
    """The versions that began the run."""
    found = [f"{name} {version}" for name, version in data["versions"].items()]
    return f"Made with {', '.join(found)}." if found else ""


def block_sentences(data: Data) -> list[str]:
    """What the losses say: whether blocks were trained, which is the worst."""
    losses = {row["block"]: row["loss_after"] for row in data["blocks"] if row["loss_after"] is not None}
    sentences = []
    if losses:
        worst = max(losses, key=lambda index: (losses[index], -index))
        share = losses[worst] / sum(losses.values()) if sum(losses.values()) else 0.0
        text = f"Block {worst} has the largest loss, {figure(losses[worst])}: {share:.0%} of the sum over all blocks."
        sentences.append(text)
    if losses and not trained(data):
        sentences.append("No block was trained: the loss is that of the start in closed form.")
    return sentences


def tuning_sentence(data: Data) -> str:
    """What tuning did to the divergence."""
    tuning = data["tuning"]
    before, after = figure(tuning["divergence_before"]), figure(tuning["divergence_after"])
    return (
        f"Tuning after rounding ({tuning['steps']} steps, {duration(tuning['seconds'])}) took the divergence from the "
        f"full-precision model's next-token distribution from {before} to {after}: means of the first and of the last "
        "tenth of the steps."
    )


def running_mean(values: Sequence[float | None]) -> Values:
    """Of each value the mean of a tenth of all, itself in the middle; fewer at the ends, and without those that are
    None.
    """
    reach = max(1, len(values) // 20)
    return [_mean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def trained(data: Data) -> bool:
    """Whether any block took a training step."""
    return any(row.get("steps") for row in data["blocks"])


def blocks(data: Data) -> Table:
    """Loss and rounding error of each block."""
    if trained(data):
        header = ["block", "loss before", "loss after", "rounding error"]
        keys = ["loss_before", "loss_after", "rounding_error"]
    else:
        header, keys = ["block", "loss", "rounding error"], ["loss_after", "rounding_error"]
    return Table(header, [[str(row["block"]), *(figure(row[key]) for key in keys)] for row in data["blocks"]])


def site_sentence(data: Data) -> str:
    """What the table of sites shows."""
    tuned = " " + TUNED_SENTENCE if "tuned" in moments(data) else ""
    return (
        f"Means over the blocks, from {data['flatness']['tokens']:,} tokens of the calibration text. Peak: the largest "
        "channel's maximum over the mean channel's; 1 is flat. Error: what rounding this side alone adds to the "
        "product, squared, relative to the product, averaged over tokens; weights to the nearest code." + tuned
    )


def sites(data: Data) -> Table:
    """Peak and error of each site's two sides, before and after the transform and tuned, averaged over the blocks."""
    when = moments(data)
    header = ["site", "side", "peak before", *when[1:], "error before", *when[1:]]
    rows = []
    for site in site_names(data):
        for side in ("activation", "partner"):
            name, peaks, errors = site_figures(data, site, side)
            rows.append([site, name, *(figure(_mean(values)) for values in (*peaks, *errors))])
    return Table(header, rows)


def moments(data: Data) -> tuple[str, ...]:
    """The moments at which sites were measured: `before` and `after` the transform, and `tuned` where the run is."""
    sides = [site["activation"] for block in data["flatness"]["blocks"] for site in block["sites"]]
    return MOMENTS if any(side.get("tuned") for side in sides) else MOMENTS[:2]


def site_names(data: Data) -> list[str]:
    """The sites of the blocks, in their order."""
    return list(dict.fromkeys(site["site"] for block in data["flatness"]["blocks"] for site in block["sites"]))


def site_figures(data: Data, site: str, side: str) -> tuple[str, list[Values], list[Values]]:
    """The name of a site's side, and block by block its peaks and its errors, each at all `moments`."""
    found = [one[side] for block in data["flatness"]["blocks"] for one in block["sites"] if one["site"] == site]

    def figures(pick: Callable[[Data], float | None]) -> list[Values]:
        return [[pick(one[when]) if one.get(when) else None for one in found] for when in moments(data)]

    return found[0]["name"], figures(peak), figures(lambda when: when["error"])


def peak(when: Data) -> float | None:
    """The largest channel over the mean one; None where all are zero."""
    return when["largest"] / when["mean"] if when["mean"] and when["largest"] is not None else None


def figure(value: float | None, digits: int = 4) -> str:
    """A number in few characters: `0.0012`, `23.67`, `1,240`; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def size(count: float | None) -> str:
    """Bytes with a binary unit: `96.2 MiB`."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: `45 s`, `2 min 10 s`, `3 h 05 min`."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _quantizer(spec: Data, clips: str, *more: str) -> str:
    if spec["bits"] == 16:
        return "left in floating point"
    codes = "symmetric" if spec["symmetric"] else "asymmetric"
    return ", ".join([f"{spec['bits']} bits", codes, *more, clips if spec["clip"] == "learned" else "no clipping"])


def _transform(spec: Data) -> str:
    start = STARTS.get(spec["init"], spec["init"])
    form = FORMS.get(spec["parametrization"], f", {spec['parametrization']}")
    matrices = {"none": "", "kronecker": f"Kronecker product of two matrices{form}; start {start}"}
    diagonal = "" if spec["diagonal"] == "none" else f"{spec['diagonal']} scale for each channel"
    parts = [part for part in (matrices.get(spec["kind"], spec["kind"]), diagonal) if part]
    return "; ".join(parts) or "none"


def _calibration(data: Data) -> str:
    spec, text = data["recipe"]["calibration"], data["data"]
    name = text["name"] if text is not None else spec["data"]
    what = f"{spec['samples']} × {spec['seqlen']} tokens of {name}"
    if not spec["epochs"]:
        return f"{what}; no training, seed {spec['seed']}"
    loss = LOSSES.get(spec["loss"], f"{spec['loss']} loss")
    return (
        f"{what}; {spec['epochs']} epochs a block, rate {figure(spec['learning_rate'])} (clips "
        f"{figure(spec['clip_learning_rate'])}), {loss}; seed {spec['seed']}"
    )


def _tune(spec: Data) -> str:
    if not spec.get("steps"):
        return "none"
    return f"{spec['steps']} steps, rate {figure(spec['learning_rate'])}"


def _markdown(table: Table) -> str:
    rows = [[_safe(cell) for cell in row] for row in table.rows]
    return markdown_table([_safe(cell) for cell in table.header], rows) if rows else ""


def _safe(text: str) -> str:
    """Text in one line, in which Markdown sees no HTML."""
    return escape(" ".join(text.split()), quote=False)
