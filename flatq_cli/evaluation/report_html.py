"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

The page is data of schema `flatq.report/1` in another form. Whatever comes from a file or a name is escaped on its way
in. It is laid out in a column on a phone and in several on a screen, and follows the reader's choice of light or dark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from flatq_cli.evaluation import report_text as text
from flatq_cli.evaluation.report_svg import Curve, Mark, curves, scatter
from flatq_cli.evaluation.report_text import Table, figure, size

Data = Mapping[str, Any]
SIDES = ("activation", "partner")
TUNED_KEY = ("as tuned",)

# Vermilion, blue and bluish green of Okabe and Ito's palette, which people with any kind of colour vision tell apart;
# lighter in the dark.
STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2025; --soft: #5b6270; --rule: #dcdfe4;
  --before: #c45100; --after: #0066ab; --tuned: #007a58; --note: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1c1f25; --ink: #e8eaee; --soft: #a3abba;
  --rule: #343943; --before: #f0a347; --after: #62b8f0; --tuned: #4fd0a5; --note: #33290f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; } p { margin: .4rem 0; max-width: 46rem; }
header p, .soft, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0; } a { color: var(--after); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; padding: 0; list-style: none; }
.facts li { flex: 1 1 9rem; padding: .6rem .9rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; color: var(--soft); font-size: .85rem; }
.facts b { display: block; color: var(--ink); font-size: 1.4rem; line-height: 1.3; }
.missing { padding: .6rem 1rem; background: var(--note); border-left: 4px solid var(--before); border-radius: .25rem; }
.missing ul { margin: .2rem 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
td { white-space: nowrap; } .words td { white-space: normal; } th { vertical-align: bottom; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, .words td, .words th { text-align: left; }
tr.this td { font-weight: 600; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
  margin: .75rem 0; }
.side { margin: .6rem 0 0; font-size: .85rem; color: var(--soft); } .side b { color: var(--ink); }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
figcaption { font-size: .85rem; line-height: 1.35; } figcaption b { color: var(--ink); font-size: .95rem; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg .before { stroke: var(--before); } svg .after, svg .one { stroke: var(--after); }
svg .tuned { stroke: var(--tuned); } svg .faint { stroke: var(--soft); stroke-opacity: .55; }
svg .area { stroke-width: .75; } svg .area.before { fill: var(--before); fill-opacity: .3; }
svg .line.before { stroke-dasharray: 5 3; } svg .line.tuned { stroke-dasharray: .1 3; stroke-width: 2; }
svg .line.faint { stroke-width: 1; }
svg .dot.before, svg .point.before { fill: var(--card); }
svg .dot.after, svg .dot.one, svg .point.after { fill: var(--after); }
svg .point { stroke-width: 2; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: center; font-size: .9rem; }
.key svg { display: inline-block; width: 36px; height: 10px; margin: 0 .4rem 0 0; vertical-align: middle; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .25rem; }
pre { overflow-x: auto; padding: .75rem; background: var(--card); border: 1px solid var(--rule); font-size: .8rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .85rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""


def report_html(data: Data) -> str:
    """The report as a page; data of schema `flatq.report/1` in, text out."""
    sections = [
        ("results", "Results", _results(data)),
        ("made", "What was done", _made(data)),
        ("blocks", "Error by block", _blocks(data)),
        ("tuning", "Tuning", _tuning(data)),
        ("sites", "Error by site", _sites(data)),
        ("flatness", "Flatness", _flatness(data)),
    ]
    present = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in present)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{content}</section>' for key, title, content in present)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_h(data['run'])} · flatq report</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{_h(data['run'])}</h1><p>{_h(text.subtitle(data))}</p></header>"
        f'{_facts(data)}{_missing(data)}<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>'
        f"<footer><p>{_h(text.versions(data))} Schema {_h(data['schema'])}.</p></footer></body></html>\n"
    )


def _facts(data: Data) -> str:
    """The run's figures in large print."""
    row = data["comparison"][0]
    facts = [(text.label(key), figure(value)) for key, value in row.items() if key.startswith("perplexity.")]
    if row["bytes"]:
        facts.append(("size", size(row["bytes"])))
    if row["compression"]:
        facts.append(("smaller than in 16 bits", f"{row['compression']:.2f} ×"))
    if row["seconds"]:
        facts.append(("to calibrate and fuse", text.duration(row["seconds"])))
    if row["memory_bytes"]:
        facts.append(("of memory for that", size(row["memory_bytes"])))
    items = "".join(f"<li><b>{_h(value)}</b> {_h(name)}</li>" for name, value in facts)
    return f'<ul class="facts">{items}</ul>' if items else ""


def _missing(data: Data) -> str:
    if not data["missing"]:
        return ""
    items = "".join(f"<li>{_h(sentence)}</li>" for sentence in data["missing"])
    return f'<div class="missing" role="note"><b>What is missing</b><ul>{items}</ul></div>'


def _results(data: Data) -> str:
    rows = data["comparison"]
    texts = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("perplexity.")]
    pictures = [
        picture
        for index, key in enumerate(texts)
        for picture in (_size_picture(rows, key, f"size-{index}"), _time_picture(rows, key, f"time-{index}"))
        if picture
    ]
    unplaced = [row["name"] for row in rows if not row["bytes"] and row["kind"] not in (None, "float")]
    note = f"No export, so no size, and not in that picture: {', '.join(unplaced)}." if unplaced and pictures else ""
    return _table(text.results(data), marked=0) + _pictures(pictures) + _paragraph(note, "soft")


def _size_picture(rows: Sequence[Data], key: str, ident: str) -> str:
    """Perplexity against bytes; a full-precision model of unknown size is a line."""
    marks = _marks(rows, key, lambda row: row["bytes"] / 2**20 if row["bytes"] else None)
    if not any(mark.x is not None for mark in marks):
        return ""
    title = f"{text.label(key)} against size"
    where = _where(marks, lambda mib: f"{figure(mib)} MiB")
    drawn = scatter(ident, title, where, marks, "size of the weights, MiB", text.label(key))
    return _figure(title, "Lower and further left is better. Filled: this run.", drawn)


def _time_picture(rows: Sequence[Data], key: str, ident: str) -> str:
    """Perplexity against the time that calibrate and fuse took: what patience buys. Needs two runs to say anything."""
    marks = _marks(rows, key, lambda row: row["seconds"])
    if sum(mark.x is not None for mark in marks) < 2:
        return ""
    title = f"{text.label(key)} against time"
    drawn = scatter(
        ident, title, _where(marks, text.duration), marks, "calibrate and fuse, seconds", text.label(key), log_x=True
    )
    caption = "Lower and further left is better; time on a logarithmic scale. Filled: this run."
    return _figure(title, caption, drawn)


def _marks(rows: Sequence[Data], key: str, place: Callable[[Data], float | None]) -> list[Mark]:
    """The rows that have the figure `key`: points where they have a place, a line for full precision without one."""
    marks = []
    for index, row in enumerate(rows):
        x = place(row)
        if row.get(key) is not None and (x is not None or row["kind"] == "float"):
            marks.append(Mark(row["name"], "after" if index == 0 else "before", x, row[key]))
    return marks


def _where(marks: Sequence[Mark], say: Callable[[float], str]) -> str:
    """The marks in words."""
    return "; ".join(
        f"{mark.name}: {figure(mark.y)}" + (f" at {say(mark.x)}" if mark.x is not None else "") for mark in marks
    )


def _made(data: Data) -> str:
    recipe = "\n".join(_yaml(data["recipe"]))
    return (
        _table(text.settings(data), words=True)
        + _table(text.stages(data))
        + f"<details><summary>The whole recipe</summary><pre>{_h(recipe)}</pre></details>"
    )


def _blocks(data: Data) -> str:
    rows = data["blocks"]
    if not rows:
        return ""
    last = rows[-1]["block"]

    def values(key: str) -> list[float | None]:
        found = {row["block"]: row[key] for row in rows}
        return [found.get(index) for index in range(last + 1)]

    after = values("loss_after")
    trained = text.trained(data)
    drawn = [Curve("before training", "before", values("loss_before"))] if trained else []
    drawn.append(Curve("after training" if trained else "loss", "after", after))
    pictures = []
    if any(value is not None for value in after):
        title = "Loss of each block" + (", before and after training" if trained else "")
        caption = "Error of the block's output with everything in it quantized, relative to its full-precision output."
        pictures.append(_figure(title, caption, _by_block("loss", title, drawn)))
    rounding = values("rounding_error")
    if any(value is not None for value in rounding):
        title = "Rounding error of each block's weights"
        caption = "Squared error of the codes, relative to the folded weights."
        pictures.append(_figure(title, caption, _by_block("rounding", title, [Curve("error", "one", rounding)])))
    sentences = "".join(_paragraph(sentence) for sentence in text.block_sentences(data))
    table = f"<details><summary>The figures of every block</summary>{_table(text.blocks(data))}</details>"
    return sentences + (_key("before training", "after training") if trained else "") + _pictures(pictures) + table


def _tuning(data: Data) -> str:
    """What tuning did, and its divergence step by step where that was kept."""
    if not data["tuning"]:
        return ""
    said = _paragraph(text.tuning_sentence(data))
    values = data["tuning"].get("curve")
    if not values:
        return said
    mean = text.running_mean(values)
    drawn = [Curve("each step", "faint", values), Curve("running mean", "one", mean)]
    title = "Divergence at each step"
    words = f"running mean from {figure(mean[0])} to {figure(mean[-1])}"
    picture = curves("tuning", title, words, drawn, "step", 1, len(values), height=180, log_y=False)
    caption = "From the full-precision model's next-token distribution, on that step's tokens. Thick: running mean."
    return said + _pictures([_figure(title, caption, picture)])


def _sites(data: Data) -> str:
    if not data["flatness"]:
        return ""
    pictures, when = [], text.moments(data)
    for site in text.site_names(data):
        for side in SIDES:
            name, _, errors = text.site_figures(data, site, side)
            if all(value is None for values in errors for value in values):
                continue
            title = f"{site}: {name}"
            drawn = [
                Curve(name, name, values)
                for name, values in zip(when, errors, strict=True)
                if any(value is not None for value in values)
            ]
            picture = _by_block(f"error-{site}-{side}", f"Rounding error by block at {title}", drawn)
            pictures.append(_figure(title, f"{text.SITES.get(site, '')}; rounding error by block", picture))
    return (
        _paragraph(text.site_sentence(data))
        + _table(text.sites(data))
        + (
            _key("before the transform", "after it, with the calibrated clips", *TUNED_KEY[: len(when) - 2])
            + _pictures(pictures)
            if pictures
            else ""
        )
    )


def _flatness(data: Data) -> str:
    """The channels of the blocks that were chosen, site by site, both sides."""
    if not data["flatness"]:
        return ""
    intro = (
        "The largest magnitude of each channel over the tokens (of a weight: over its rows), before and after the "
        "transform, on a logarithmic scale. One scale serves all channels: the more level the curve, the less is lost. "
        "In the order of the channels, and sorted; each activation with what it is multiplied with. The transforms are "
        "as calibrate left them."
    )
    when = text.moments(data)
    if "tuned" in when:
        intro += " Tuned: the activation that the tuned block rounds, given what the full-precision block reads."
    parts = [_paragraph(intro)]
    parts.append(_key("before the transform (an area, or dashed)", "after it", *TUNED_KEY[: len(when) - 2]))
    sites = {block["block"]: block["sites"] for block in data["flatness"]["blocks"]}
    for shown in data["flatness"]["shown"]:
        figures = [_channels(shown["block"], site) for site in sites[shown["block"]]]
        title = f"Block {shown['block']} ({shown['why']})"
        parts.append(f"<details open><summary>{_h(title)}</summary>{_pictures(figures)}</details>")
    return "".join(parts)


def _channels(block: int, site: Data) -> str:
    """A site: its activation's channels in order and sorted, and those of what it meets."""
    name = site["site"]
    parts = [f"<figcaption><b>{_h(name)}</b> {_h(text.SITES.get(name, ''))}</figcaption>"]
    for side in SIDES:
        curves_of = {when: site[side][when] for when in text.MOMENTS if site[side].get(when)}
        largest = " → ".join(figure(one["largest"], 3) for one in curves_of.values())
        peaks = " → ".join(figure(text.peak(one), 3) for one in curves_of.values())
        said = f"largest {largest}; peak {peaks}"
        parts.append(f'<p class="side"><b>{_h(site[side]["name"])}</b> {_h(said)}</p>')
        for order, x_name in (("by_channel", "channel"), ("sorted", "channels, sorted")):
            drawn = [Curve(when, when, one[order]) for when, one in curves_of.items()]
            title, in_order = f"Block {block}, {name}: {site[side]['name']}, {x_name}", order == "by_channel"
            height = 120 if in_order else 95
            key = f"b{block}-{name}-{side}-{order}"
            picture = curves(key, title, said, drawn, x_name, 1, site["width"], height, filled=in_order)
            parts.append(picture)
    return f"<figure>{''.join(parts)}</figure>\n"


def _by_block(key: str, title: str, drawn: Sequence[Curve]) -> str:
    said = []
    for curve in drawn:
        there = [(value, index) for index, value in enumerate(curve.values) if value is not None]
        if there:
            (low, _), (high, where) = min(there), max(there)
            said.append(f"{curve.name}: from {figure(low)} to {figure(high)}, the largest in block {where}")
    return curves(key, title, "; ".join(said), drawn, "block", height=150, dots=True)


def _key(*names: str) -> str:
    """What the kinds of lines mean: before, after and, where there is a third, tuned."""
    items = [
        f'<svg viewBox="0 0 36 10" aria-hidden="true"><path class="line {style}" d="M1 5H35"/></svg>{_h(name)}'
        for style, name in zip(text.MOMENTS, names, strict=False)
    ]
    return f'<p class="key">{"".join(f"<span>{item}</span>" for item in items)}</p>'


def _table(table: Table, words: bool = False, marked: int | None = None) -> str:
    """A table that scrolls on its own where it is wider than the page; row `marked` in bold."""
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{_h(cell)}</th>' for cell in table.header)
    rows = "".join(
        f"<tr{' class=this' if index == marked and len(table.rows) > 1 else ''}>"
        + "".join(f"<td>{_h(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    kind = ' class="words"' if words else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _pictures(figures: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _figure(title: str, caption: str, picture: str) -> str:
    return f"<figure><figcaption><b>{_h(title)}</b><br>{_h(caption)}</figcaption>{picture}</figure>\n"


def _paragraph(sentence: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{_h(sentence)}</p>" if sentence else ""


def _yaml(values: Data, indent: str = "") -> list[str]:
    """A recipe as lines `key: value`, for reading."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_yaml(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{key}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def _h(value: object) -> str:
    """Text that may stand between tags and in quoted attributes."""
    return escape(str(value), quote=True)
