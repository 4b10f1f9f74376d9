"""The verdict as JUnit XML, which GitLab, Jenkins and others show beside a merge request: a suite a configuration, a case a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as Xml

from inferctl.bench.report import comparison

_KINDS = {"regression": "failure", "not enough evidence": "error", "invalid": "error", "not compared": "skipped"}


def render(result: Mapping[str, Any]) -> str:
    """A regression is a failure; no evidence and what cannot be compared are errors, since neither may pass for green."""
    root = Xml.Element("testsuites", name="inferctl compare")
    for part in result["configurations"]:
        cases = part["metrics"] or [
            {"name": "comparison", "outcome": part["outcome"], "reason": "; ".join(part["reasons"])}
        ]
        kinds = [_KINDS.get(case["outcome"]) for case in cases]
        suite = Xml.SubElement(
            root,
            "testsuite",
            name=part["name"],
            tests=str(len(cases)),
            failures=str(kinds.count("failure")),
            errors=str(kinds.count("error")),
            skipped=str(kinds.count("skipped")),
        )
        for case, kind in zip(cases, kinds, strict=True):
            element = Xml.SubElement(suite, "testcase", classname=part["name"], name=case["name"])
            if kind:
                Xml.SubElement(element, kind, message=_message(case), type=case["outcome"])
            if "old" in case:
                Xml.SubElement(element, "system-out").text = "  ".join(text for text in comparison.cells(case) if text)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _message(case: Mapping[str, Any]) -> str:
    change = f"{100 * case['change']:+.1f} %" if case.get("change") is not None else ""
    if case.get("difference") is not None:
        change = f"{case['difference']:+.2f} percentage points"
    needed = f"about {case['repeats_needed']} repeats would settle it" if case.get("repeats_needed") else ""
    return "; ".join(part for part in (change, case["reason"], needed) if part)
