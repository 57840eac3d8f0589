from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from flatq_cli.evaluation.junit import junit_xml
from tests.evaluation.judged import gate, judged_result

NOW = datetime(2026, 5, 1, 14, 30, 5, 999, tzinfo=timezone(timedelta(hours=2)))
SCHEMA = etree.XMLSchema(etree.parse(Path(__file__).parent / "junit.xsd"))


def parsed(xml: str) -> ElementTree.Element:
    return ElementTree.fromstring(xml)


def test_each_gate_is_a_test_case_and_each_that_failed_a_failure():
    suite = parsed(junit_xml(judged_result(), NOW, "here"))[0]
    counted = {
        name: suite.get(name) for name in ("tests", "failures", "errors", "time", "timestamp", "hostname", "name")
    }
    assert counted == {
        "tests": "4", "failures": "2", "errors": "0", "time": "12.346", "timestamp": "2026-05-01T12:30:05",
        "hostname": "here", "name": "flatq eval runs/mine",
    }  # fmt: skip
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert list(cases) == ["perplexity.prose", "piqa.acc_drop", "piqa.acc", "broken"]
    assert (cases["perplexity.prose"], cases["piqa.acc"]) == (None, None)
    failure = cases["piqa.acc_drop"]
    assert failure is not None
    assert failure.get("type") == "regression"
    assert failure.get("message") == "regression: 0.1 (0.06 to 0.14 at 0.95 confidence) is above the limit 0.02 by 0.08"
    assert failure.text == "piqa.acc_drop: limit max 0.02, measured 0.1"


def test_what_was_let_through_is_in_the_output():
    said = parsed(junit_xml(judged_result(), NOW, "here")).findtext("testsuite/system-out")
    assert said is not None
    assert "piqa.acc: undecided: about 3,400 would do" in said.splitlines()


def test_the_suite_says_what_was_judged_against_what_and_with_what():
    properties = parsed(junit_xml(judged_result(), NOW, "here")).iter("property")
    assert {each.get("name"): each.get("value") for each in properties} == {
        "target": "runs/mine", "kind": "fake-quant", "recipe": "flatq", "baseline": "gpt2", "flatq": "0.1.0",
        "torch": "2.13.0",
    }  # fmt: skip


def test_the_file_is_valid_by_the_junit_schema():
    SCHEMA.assertValid(etree.fromstring(junit_xml(judged_result()).encode()))
    SCHEMA.assertValid(etree.fromstring(junit_xml({**judged_result(), "gates": []}).encode()))


@pytest.mark.parametrize("wrong", ['tests="4"', "<system-err />", 'classname="flatq.gates"', ' type="regression"'])
def test_the_schema_refuses_a_file_without_what_it_asks_for(wrong: str):
    assert not SCHEMA.validate(etree.fromstring(junit_xml(judged_result()).replace(wrong, "").encode()))


@given(st.text(min_size=1), st.text())
def test_any_name_and_reason_give_a_valid_file_that_reads_back(name: str, reason: str):
    judged = {**judged_result(), "gates": [gate(name, "regression", reason)]}
    SCHEMA.assertValid(etree.fromstring(junit_xml(judged).encode()))
    failure = parsed(junit_xml(judged)).find("testsuite/testcase/failure")
    assert failure is not None
    if reason.isprintable():
        assert failure.get("message") == f"regression: {reason}"
