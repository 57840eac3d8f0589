"""Pictures of a report as inline SVG: plain functions from numbers to text, without a script or an external file.

A picture is about as wide as a phone, so that its letters are readable there; the page puts several side by side where
there is room. Colours come from the page's style (`before`, `after`, `tuned`, `one`, `faint`), which has a dark face
too. They are told apart without colour as well: what was before is drawn dashed, or as a ring, and what is tuned
dotted. `title` and `desc` say to a screen reader what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import NamedTuple

from flatq_cli.evaluation.report_text import figure

WIDTH = 360
LEFT, RIGHT, TOP = 46, 10, 10
BOTTOM = 22
"""Below the axis of curves: one line of text. A scatter has two."""
DECADES = 5
"""A logarithmic axis shows at most so many below its top: less is drawn at the bottom."""
LABEL = 12
"""Least distance of two labels' lines."""
LETTER = 6
"""Width of a letter of a label, about."""
LABEL_CHARACTERS = 24


class Curve(NamedTuple):
    """Values at evenly spaced places; None where there is none. `style`: `before`, `after`, `tuned`, `one`, `faint`."""

    name: str
    style: str
    values: Sequence[float | None]


class Mark(NamedTuple):
    """A point with its name; x None: a line over the whole width. `style` as of a curve."""

    name: str
    style: str
    x: float | None
    y: float


class Axis(NamedTuple):
    """A scale from values to pixels, with the values that get a tick."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """The pixel of a value; what is outside is drawn at the border."""
        value = min(max(value, self.low), self.high)
        low, high, at = (log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)


def curves(
    key: str,
    title: str,
    description: str,
    drawn: Sequence[Curve],
    x_name: str,
    first: float = 0,
    last: float | None = None,
    height: int = 150,
    dots: bool = False,
    filled: bool = False,
    log_y: bool = True,
) -> str:
    """Curves over one another, the values on a logarithmic axis or, without `log_y`, a linear one.

    Args:
        key: makes the picture's ids unique in a page.
        x_name: what is along the horizontal axis, which goes from `first` to `last` (None: the number of values, less
            one).
        dots: mark each value, for series of few; not of `tuned`, which would hide what it lies on.
        filled: draw the first curve as an area, where a ragged line would hide the others.
    """
    count = max((len(curve.values) for curve in drawn), default=0)
    axis = log_axis if log_y else linear_axis
    y = axis([value for curve in drawn for value in curve.values if value is not None], height - BOTTOM, TOP)
    last = count - 1 + first if last is None else last
    x = Axis(0, max(count - 1, 0), LEFT, WIDTH - RIGHT, False, ())
    parts = [_frame(y, height - BOTTOM), _x_ends(x, (first, last), x_name, height)]
    for number, curve in enumerate(drawn):
        places = [
            None if value is None else (x.place(index), y.place(value)) for index, value in enumerate(curve.values)
        ]
        if filled and number == 0:
            parts.append(f'<path class="area {curve.style}" d="{_area(places, y.start)}"/>')
            continue
        parts.append(f'<path class="line {curve.style}" d="{_path(places)}"/>')
        if dots and curve.style != "tuned":
            parts += [
                f'<circle class="dot {curve.style}" cx="{_n(p[0])}" cy="{_n(p[1])}" r="2.5"/>' for p in places if p
            ]
    return _svg(key, title, description, height, parts)


def scatter(
    key: str,
    title: str,
    description: str,
    marks: Sequence[Mark],
    x_name: str,
    y_name: str,
    height: int = 260,
    log_x: bool = False,
) -> str:
    """Named points; the axes are as long as the values need, and linear but for the horizontal one with `log_x`."""
    placed = [mark for mark in marks if mark.x is not None]
    bottom = height - BOTTOM - LABEL
    y = linear_axis([mark.y for mark in marks], bottom, TOP + 16)
    axis = log_axis if log_x else linear_axis
    x = axis([mark.x for mark in placed if mark.x is not None], LEFT, WIDTH - RIGHT)
    parts = [_frame(y, bottom), f'<text class="name" x="2" y="{TOP}">{escape(y_name)}</text>']
    for tick in x.ticks:
        at = _n(x.place(tick))
        parts.append(f'<text class="tick" text-anchor="middle" x="{at}" y="{bottom + 14}">{figure(tick)}</text>')
    parts.append(f'<text class="name" text-anchor="end" x="{WIDTH - RIGHT}" y="{height - 5}">{escape(x_name)}</text>')
    labels: dict[str, list[tuple[float, float, str]]] = {"start": [], "end": []}
    points = [(x.place(mark.x), y.place(mark.y)) for mark in placed if mark.x is not None]
    for mark in marks:
        top = y.place(mark.y)
        text = f"{_short(mark.name)} {figure(mark.y)}"
        hover = f"<title>{escape(mark.name)}: {figure(mark.y)}</title>"
        if mark.x is None:
            line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(top)}" y2="{_n(top)}"'
            parts.append(f'<line class="line {mark.style}" {line}>{hover}</line>')
            labels["end"].append((top - 4, WIDTH - RIGHT, text))
            continue
        left = x.place(mark.x)
        parts.append(f'<circle class="point {mark.style}" cx="{_n(left)}" cy="{_n(top)}" r="5">{hover}</circle>')
        side = "start" if left < (LEFT + WIDTH) / 2 else "end"
        beside = left + 9 if side == "start" else left - 9
        ends = sorted((beside, beside + (LETTER if side == "start" else -LETTER) * len(text)))
        covered = [place for place in points if ends[0] - 5 < place[0] < ends[1] + 5]
        labels[side].append((_clear_of([place[1] for place in covered], top) + 4, beside, text))
    for side, found in labels.items():
        parts += [
            f'<text class="label" text-anchor="{side}" x="{_n(left)}" y="{_n(top)}">{escape(text)}</text>'
            for top, left, text in _apart(found, bottom - 2)
        ]
    return _svg(key, title, description, height, parts)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A logarithmic axis for the positive ones of `values`; its ticks are powers of ten, or 1, 2, 5 of them."""
    positive = [value for value in values if value > 0]
    if not positive:
        return Axis(0.1, 1, start, end, True, (0.1, 1))
    high = max(positive)
    low = max(min(positive), high / 10**DECADES)
    ticks = _log_ticks(low, high)
    return Axis(min(low, ticks[0]) * 0.93, max(high, ticks[-1]) * 1.07, start, end, True, ticks)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A linear axis a little longer than `values` need, and not so short that it makes much of small differences."""
    if not values:
        return Axis(0, 1, start, end, False, ())
    low, high = min(values), max(values)
    span = max(high - low, 0.1 * abs(high)) or 1.0
    middle, half = (low + high) / 2, span * 0.58
    # What cannot be negative gets no negative axis.
    low, high = max(middle - half, 0.0) if low >= 0 else middle - half, middle + half
    rough = (high - low) / 4
    scale = 10.0 ** floor(log10(rough))
    step = next(step * scale for step in (1, 2, 2.5, 5, 10) if step * scale >= rough)
    first = ceil(low / step)
    ticks = tuple(round(index * step, 10) for index in range(first, floor(high / step) + 1))
    return Axis(low, high, start, end, False, ticks)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    bottom, top = floor(log10(low)), ceil(log10(high))
    decades = [10.0**power for power in range(bottom, top + 1)]
    inside = [tick for tick in decades if low <= tick <= high]
    if len(inside) >= 2:
        return tuple(inside[:: max(1, ceil(len(inside) / 4))])
    finer = [step * decade for decade in decades for step in (1, 2, 5) if low <= step * decade <= high]
    if len(finer) >= 2:
        return tuple(finer)
    # Values close together: the round numbers around them too.
    around = [step * decade for decade in decades for step in (1, 2, 5)]
    below = [tick for tick in around if tick <= low] or [decades[0]]
    above = [tick for tick in around if tick >= high] or [decades[-1]]
    return tuple(dict.fromkeys((below[-1], *finer, above[0])))


def _clear_of(points: Sequence[float], top: float) -> float:
    """Where the middle of a label's line goes: at `top`, or else above or below, so that it covers none of `points`."""
    for moved in (top, top - LABEL, top + LABEL):
        if all(abs(point - moved) > LABEL - 2 for point in points):
            return moved
    return top


def _apart(labels: list[tuple[float, float, str]], lowest: float) -> list[tuple[float, float, str]]:
    """Labels (top, left, text) moved down, and then up from `lowest`, until none covers another."""
    moved: list[tuple[float, float, str]] = []
    for top, left, text in sorted(labels):
        moved.append((max(top, moved[-1][0] + LABEL) if moved else top, left, text))
    for index in range(len(moved) - 1, -1, -1):
        limit = lowest if index == len(moved) - 1 else moved[index + 1][0] - LABEL
        moved[index] = (min(moved[index][0], limit), *moved[index][1:])
    return moved


def _frame(y: Axis, bottom: int) -> str:
    """The grid: a line and a number for each tick of the vertical axis; the horizontal axis at `bottom`."""
    parts = []
    for tick in y.ticks:
        at = y.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_n(at)}" y2="{_n(at)}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 5}" y="{_n(at + 3.5)}">{figure(tick)}</text>')
    return "".join(parts) + f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'


def _x_ends(x: Axis, ends: tuple[float, float], name: str, height: int) -> str:
    row = height - BOTTOM + 14
    middle = _n((x.start + x.end) / 2)
    return (
        f'<text class="tick" x="{_n(x.start)}" y="{row}">{figure(ends[0])}</text>'
        f'<text class="tick" text-anchor="end" x="{_n(x.end)}" y="{row}">{figure(ends[1])}</text>'
        f'<text class="name" text-anchor="middle" x="{middle}" y="{row}">{escape(name)}</text>'
    )


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    """Straight lines through the places, with gaps where there is none; a lone place is a short stroke."""
    steps, pen_down = [], False
    for place in places:
        if place is not None:
            steps.append(f"{'L' if pen_down else 'M'}{_n(place[0])} {_n(place[1])}")
            if not pen_down:
                steps.append("h.01")
        pen_down = place is not None
    return "".join(steps)


def _area(places: Sequence[tuple[float, float] | None], bottom: float) -> str:
    """What is between the places and `bottom`; places that are None are left out."""
    there = [place for place in places if place is not None]
    if not there:
        return ""
    top = "".join(f"L{_n(x)} {_n(y)}" for x, y in there)
    return f"M{_n(there[0][0])} {_n(bottom)}{top}V{_n(bottom)}Z"


def _svg(key: str, title: str, description: str, height: int, parts: Sequence[str]) -> str:
    ident = escape(key, quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _short(name: str) -> str:
    return name if len(name) <= LABEL_CHARACTERS else f"{name[: LABEL_CHARACTERS - 1]}…"


def _n(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")
