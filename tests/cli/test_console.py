"""Progress as bars on a terminal and as plain lines elsewhere; colour only where a person looks."""

import io
import sys

import pytest
from rich.console import Console

from flatq_cli.cli.console import BarProgress, LineProgress, console_for, duration, open_progress
from flatq_cli.store.progress import SilentProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_say_how_far_how_good_and_how_long():
    lines, clock = [], Clock()
    progress = LineProgress(lines.append, clock)
    for block in progress.track(range(3), "calibrating"):
        clock.now += 50
        progress.note(f"loss {block} → 0")
    assert lines == [
        "calibrating 1/3  loss 0 → 0  1m40s left",
        "calibrating 2/3  loss 1 → 0  50s left",
        "calibrating 3/3  loss 2 → 0",
    ]


def test_items_without_a_note_are_told_of_only_now_and_then():
    lines, clock = [], Clock()
    progress = LineProgress(lines.append, clock)
    for _ in progress.track(range(12), "reading"):
        clock.now += 1
    assert lines == ["reading 5/12  7s left", "reading 10/12  2s left", "reading 12/12"]


def test_a_note_belongs_to_the_innermost_track():
    lines, clock = [], Clock()
    progress = LineProgress(lines.append, clock)
    for _ in progress.track(["outer"], "outer"):
        for _ in progress.track(["inner"], "inner"):
            progress.note("within")
        progress.note("without")
    assert lines == ["inner 1/1  within", "outer 1/1  without"]


def test_an_abandoned_track_leaves_the_outer_one_whole():
    lines = []
    progress = LineProgress(lines.append, Clock())
    for _ in progress.track([1], "outer"):
        inner = progress.track([1, 2], "inner")
        next(inner)
        inner.close()
        progress.note("kept")
    assert lines == ["outer 1/1  kept"]


def test_a_note_outside_of_any_track_is_no_error():
    LineProgress(lambda line: None).note("x")
    BarProgress(Console(file=io.StringIO())).note("x")


@pytest.mark.parametrize(
    "make", [SilentProgress, lambda: LineProgress(lambda line: None), lambda: BarProgress(Console(file=io.StringIO()))]
)
def test_every_progress_yields_the_items_in_order(make):
    progress = make()
    assert [(a, b) for a in progress.track("ab", "outer") for b in progress.track((1, 2), "inner")] == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]


def test_bars_show_count_and_note_and_the_finished_bar_stays():
    screen = Terminal()
    with BarProgress(Console(file=screen, force_terminal=True, width=120)) as progress:
        progress.log("one line [not markup]")
        for stage in ("calibrate", "fuse"):
            for block in progress.track(range(2), stage):
                progress.note(f"loss {block}")
    final = screen.getvalue()
    assert "2/2" in final
    assert "loss 1" in final
    assert "fuse" in final


def work_that_fails(progress):
    for _ in progress.track(range(2), "calibrate"):
        raise ValueError("stop")


def test_bars_are_gone_after_an_error():
    screen = Terminal()
    with pytest.raises(ValueError, match="stop"), BarProgress(Console(file=screen, force_terminal=True)) as progress:
        work_that_fails(progress)
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l") >= 0  # the cursor is back


def test_stderr_decides_between_bars_lines_and_silence(monkeypatch):
    for stream, quiet, kind in (
        (Terminal(), False, BarProgress),
        (io.StringIO(), False, LineProgress),
        (Terminal(), True, SilentProgress),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with open_progress(quiet) as progress:
            assert isinstance(progress, kind)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with open_progress(False) as progress:
        assert isinstance(progress, LineProgress)


def test_colour_is_for_terminals_and_not_under_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured, plain, refused = Terminal(), io.StringIO(), Terminal()
    console_for(coloured).print("x", style="red")
    console_for(plain).print("x", style="red")
    monkeypatch.setenv("NO_COLOR", "1")
    console_for(refused).print("x", style="red")
    assert "\x1b[31m" in coloured.getvalue()
    assert plain.getvalue() == "x\n"
    assert "\x1b[31m" not in refused.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (130, "2m10s"), (11100, "3h05m")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
