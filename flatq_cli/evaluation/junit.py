"""Gates as JUnit XML, which the test reports of CI systems read: one test case a gate, a failure with its reason.

The file keeps to what both schemas in use agree on, that of Ant's JUnit task and that of Jenkins.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from xml.etree import ElementTree

from flatq_cli.evaluation.tables import gate_limit

_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
"""Characters that XML 1.0 has no way to write."""


def junit_xml(result: Mapping[str, Any], now: datetime | None = None, host: str | None = None) -> str:
    """The gates of an evaluation (schema `flatq.eval/1`) as a JUnit file.

    Args:
        now: when they were judged, any time zone; None: now. host: where; None: here.
    """
    gates: Sequence[Mapping[str, Any]] = result["gates"]
    when = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    root = ElementTree.Element("testsuites")
    suite = _child(
        root,
        "testsuite",
        id="0",
        package="flatq",
        name=f"flatq eval {result['target']}",
        timestamp=when.strftime("%Y-%m-%dT%H:%M:%S"),
        hostname=host or socket.gethostname() or "localhost",
        tests=str(len(gates)),
        failures=str(sum(not gate["passed"] for gate in gates)),
        errors="0",
        time=f"{result['seconds']:.3f}",
    )
    properties = _child(suite, "properties")
    for name, value in _facts(result):
        _child(properties, "property", name=name, value=value)
    for gate in gates:
        _add_case(suite, gate)
    lines = [f"{gate['name']}: {gate['verdict']}: {gate['reason']}" for gate in gates]
    _child(suite, "system-out").text = _clean("\n".join(lines))
    _child(suite, "system-err")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ElementTree.Element, gate: Mapping[str, Any]) -> None:
    case = _child(suite, "testcase", classname="flatq.gates", name=gate["name"], time="0")
    if not gate["passed"]:
        failure = _child(case, "failure", message=f"{gate['verdict']}: {gate['reason']}", type=gate["verdict"])
        failure.text = _clean(f"{gate['metric']}: limit {gate_limit(gate)}, measured {gate['value']}")


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("target", result["target"]), ("kind", result["kind"]), ("recipe", result["recipe"])]
    baseline = result.get("baseline")
    if baseline is not None:
        facts.append(("baseline", baseline["target"]))
    return [*((key, value) for key, value in facts if value), *result["versions"].items()]


def _child(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name: _clean(value) for name, value in attributes.items()})


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
