from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from flatq_cli.evaluation.report_html import STYLE, report_html
from tests.evaluation.report_data import TUNING, bare_data, report_data, untuned

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>\"&' onload=x"


class Page(HTMLParser):
    """A page's tags, attributes and text, and whether each tag that opens is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report_html(report_data()))


@pytest.mark.parametrize("data", [report_data(HOSTILE), bare_data(HOSTILE)], ids=["whole", "bare"])
def test_no_name_becomes_markup(data):
    page = Page(report_html(data))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(HOSTILE in text for text in page.texts)


def test_the_page_needs_nothing_from_elsewhere(page):
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(value.startswith("#") for value in page.values("href"))
    assert page.values("src") == []
    assert "url(" not in STYLE
    assert "@import" not in STYLE


def test_every_picture_has_a_title_and_a_description_of_its_own(page):
    labels = [value.split() for value in page.values("aria-labelledby")]
    named = [ident for pair in labels for ident in pair]
    assert len(named) == len(set(named)) == 2 * len(labels)
    assert set(named) <= set(page.values("id"))
    idents = page.values("id")
    assert len(idents) == len(set(idents))


def test_every_picture_is_there(page):
    titles = [text for text in page.texts if text]
    for title in (
        "Loss of each block, before and after training",
        "Rounding error of each block's weights",
        "perplexity of tiny-run against size",
        "perplexity of tiny-run against time",
        "Divergence at each step",
        "Block 0, attn_in: activation, channel",
        "Block 0, attn_in: weights, channels, sorted",
        "Block 0, key: queries, channel",
        "Rounding error by block at attn_in: weights",
    ):
        assert title in titles
    # Both sides of two sites, in order and sorted; errors of three sides; loss, rounding, size, time, tuning.
    assert len(page.values("aria-labelledby")) == 8 + 3 + 5


def lines(page: Page, style: str) -> int:
    return len([value for value in page.values("class") if value and value.split() == ["line", style]])


def test_a_tuned_run_has_a_third_curve_and_an_untuned_one_no_trace_of_it(page):
    # In order and sorted for the activations of two sites; their errors; two keys.
    assert lines(page, "tuned") == 4 + 2 + 2
    assert any(text == "as tuned" for text in page.texts)
    assert any("largest 40 → 3 → 2.5; peak 20 → 1.5 → 1.25" in text for text in page.texts)
    data = report_data()
    untuned(data)
    other = Page(report_html(data))
    assert lines(other, "tuned") == 0
    assert not any("uned" in text for text in other.texts if "{" not in text and "tuning" not in text)


def test_a_tuned_run_whose_steps_were_not_kept_has_the_sentence_alone():
    page = Page(report_html(report_data(tuning={**TUNING, "curve": None})))
    assert any(text.startswith("Tuning after rounding (64 steps") for text in page.texts)
    assert "Divergence at each step" not in page.texts
    assert "#tuning" in page.values("href")


def test_one_run_alone_is_no_trade_of_time():
    data = report_data()
    data["comparison"] = [row for row in data["comparison"] if row["name"] != "tiny-run b"]
    assert "perplexity of tiny-run against time" not in Page(report_html(data)).texts


def test_the_picture_of_time_says_in_words_who_took_how_long(page):
    (said,) = [text for text in page.texts if "at 1 min 30 s" in text]
    assert said == "tiny-run: 21.5 at 1 min 30 s; tiny-run b: 21.5 at 30 s; tiny-run full: 21.5"


def test_memory_stands_with_the_facts(page):
    where = page.texts.index("300.0 MiB")
    assert page.texts[where + 1] == " of memory for that"


def test_links_lead_to_sections(page):
    assert {value[1:] for value in page.values("href")} <= set(page.values("id"))


def test_a_bare_run_has_the_sections_that_it_can_have():
    page = Page(report_html(bare_data()))
    assert "tiny-run is missing" in page.texts
    assert page.values("aria-labelledby") == []
    assert page.values("href") == ["#results", "#made"]


def test_a_run_without_size_is_named_under_the_picture(page):
    assert any("not in that picture: tiny-run c." in text for text in page.texts)


def test_colours_have_a_dark_face_of_each_name():
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in STYLE.split("@media (prefers-color-scheme: dark)", 1))
    assert light == dark
