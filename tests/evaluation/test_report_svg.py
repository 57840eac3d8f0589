from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatq_cli.evaluation.report_svg import (
    LABEL,
    WIDTH,
    Curve,
    Mark,
    _apart,
    curves,
    linear_axis,
    log_axis,
    scatter,
)

POSITIVE = st.floats(1e-6, 1e6)


def places(svg: str, style: str) -> list[tuple[float, float]]:
    """The points of the first line of a style."""
    path = next(one for one in ElementTree.fromstring(svg).iter("path") if style in one.get("class", ""))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))]


def drawn(*values: float | None) -> str:
    return curves("k", "t", "d", [Curve("a", "after", values)], "block")


def test_a_picture_tells_a_screen_reader_what_it_shows():
    svg = ElementTree.fromstring(curves("k", "A <title>", "what & why", [Curve("a", "one", [1.0, 2.0])], "x"))
    title, description = svg.find("title"), svg.find("desc")
    assert (title.text, description.text) == ("A <title>", "what & why")
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_larger_values_are_higher_and_later_ones_further_right():
    (x0, y0), (x1, y1), (x2, y2) = places(drawn(1.0, 10.0, 100.0), "after")
    assert x0 < x1 < x2
    assert y0 > y1 > y2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)  # logarithmic


def test_a_gap_is_a_gap():
    svg = drawn(1.0, None, 3.0, 4.0)
    path = ElementTree.fromstring(svg).find("path").get("d")
    assert (path.count("M"), path.count("L")) == (2, 1)


def test_a_zero_is_drawn_at_the_bottom_of_a_logarithmic_axis():
    points = places(drawn(0.0, 1.0, 10.0), "after")
    assert points[0][1] > points[1][1] > points[2][1]


def test_an_area_reaches_down_to_the_axis_and_stands_behind_the_curves():
    both = [Curve("a", "before", [1.0, None, 100.0]), Curve("b", "after", [2.0, 2.0, 2.0])]
    area, line = ElementTree.fromstring(curves("k", "t", "d", both, "x", filled=True)).findall("path")
    assert (area.get("class"), line.get("class")) == ("area before", "line after")
    start, _, down = re.fullmatch(r"M[\d.]+ ([\d.]+)L(.+)V([\d.]+)Z", area.get("d")).groups()
    assert start == down


def test_small_differences_are_not_made_much_of():
    axis = linear_axis([107.0, 107.1], 0, 100)
    assert axis.place(107.1) - axis.place(107.0) < 2


def test_pictures_of_nothing_and_of_one_value_are_well_formed():
    for svg in (drawn(), drawn(None), drawn(0.0), drawn(5.0), drawn(5.0, 5.0), scatter("k", "t", "d", [], "x", "y")):
        ElementTree.fromstring(svg)
        assert "nan" not in svg


@given(values=st.lists(POSITIVE, min_size=1, max_size=6))
def test_a_logarithmic_axis_holds_its_values_and_a_few_ticks(values):
    axis = log_axis(values, 100, 0)
    assert axis.low <= max(values) <= axis.high
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 6
    assert all(0 <= axis.place(value) <= 100 for value in values)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_a_linear_axis_holds_its_values_and_a_few_ticks(values):
    axis = linear_axis(values, 0, 100)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 1 <= len(axis.ticks) <= 8


def test_points_are_named_and_a_line_stands_for_what_has_no_size():
    marks = [
        Mark("small & good", "after", 100.0, 20.0),
        Mark("big", "before", 200.0, 21.0),
        Mark("full", "before", None, 19.0),
    ]
    root = ElementTree.fromstring(scatter("k", "t", "d", marks, "MiB", "perplexity"))
    left, right = root.findall("circle")
    assert float(left.get("cx")) < float(right.get("cx"))
    assert float(left.get("cy")) > float(right.get("cy"))  # 20 is lower than 21
    assert {text.text for text in root.findall("text") if text.get("class") == "label"} == {
        *("small & good 20", "big 21", "full 19")
    }
    assert [line.find("title").text for line in root.findall("line") if line.find("title") is not None] == ["full: 19"]


def test_a_long_name_is_cut_and_whole_in_the_point_itself():
    name = "x" * 60
    root = ElementTree.fromstring(scatter("k", "t", "d", [Mark(name, "after", 1.0, 2.0)], "x", "y"))
    (label,) = [text.text for text in root.findall("text") if text.get("class") == "label"]
    assert len(label) < 40
    assert root.find("circle").find("title").text.startswith(name)


@given(tops=st.lists(st.floats(0, 200), min_size=1, max_size=12))
def test_labels_do_not_cover_each_other(tops):
    moved = sorted(top for top, _, _ in _apart([(top, 0.0, "x") for top in tops], 200))
    assert all(low - high >= LABEL - 1e-6 for high, low in pairwise(moved))
    assert moved[-1] <= 200


def test_ten_times_the_time_is_as_far_everywhere_on_a_logarithmic_axis():
    marks = [Mark(str(x), "before", float(x), 1.0) for x in (10, 100, 1000)]
    root = ElementTree.fromstring(scatter("k", "t", "d", marks, "s", "y", log_x=True))
    a, b, c = (float(circle.get("cx")) for circle in root.findall("circle"))
    assert b - a == pytest.approx(c - b, abs=0.2)
    ticks = {text.text for text in root.findall("text") if text.get("class") == "tick"}
    assert {"10", "100", "1,000"} <= ticks


def test_what_is_tuned_has_no_dots_that_would_hide_what_it_lies_on():
    both = [Curve("a", "after", [1.0, 2.0]), Curve("b", "tuned", [1.0, 2.0])]
    root = ElementTree.fromstring(curves("k", "t", "d", both, "block", dots=True))
    assert [circle.get("class") for circle in root.findall("circle")] == ["dot after"] * 2
    assert [path.get("class") for path in root.findall("path")] == ["line after", "line tuned"]


def test_equal_steps_are_equally_high_on_a_linear_axis():
    (_, y0), (_, y1), (_, y2) = places(
        curves("k", "t", "d", [Curve("a", "one", [0.2, 0.3, 0.4])], "step", log_y=False), "one"
    )
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)


def test_an_axis_between_round_numbers_has_those_inside_too():
    assert log_axis([256.0, 739.0], 0, 1).ticks == (200, 500, 1000)


def test_everything_is_inside_the_picture():
    marks = [Mark(f"run {index}", "before", float(index), float(index)) for index in range(8)]
    root = ElementTree.fromstring(scatter("k", "t", "d", marks, "x", "y"))
    height = float(root.get("viewBox").split()[3])
    for circle in root.findall("circle"):
        assert 0 < float(circle.get("cx")) < WIDTH
        assert 0 < float(circle.get("cy")) < height


def test_a_label_covers_no_other_mark():
    """Two runs of almost the same perplexity, one behind the other's name."""
    marks = [
        Mark("balanced", "before", 10.0, 34.9),
        Mark("gptq", "before", 20.0, 34.8),
        Mark("far", "after", 300.0, 47.0),
    ]
    root = ElementTree.fromstring(scatter("k", "t", "d", marks, "s", "y", log_x=True))
    heights = {
        text.text.split()[0]: float(text.get("y")) for text in root.findall("text") if text.get("class") == "label"
    }
    gptq = next(mark for mark in root.findall("circle") if mark.find("title").text.startswith("gptq"))
    assert abs(heights["balanced"] - 4 - float(gptq.get("cy"))) >= 9
