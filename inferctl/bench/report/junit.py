"""Write the result of `inferctl compare` as JUnit XML, which GitLab, Jenkins and others show in a merge request.

Each configuration is a test suite, and each metric a test case.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from inferctl.bench.judge.compare_result import CompareResult, MetricResult
from inferctl.bench.report import comparison

_ELEMENTS = {"regression": "failure", "not enough evidence": "error", "invalid": "error", "not compared": "skipped"}


def render(result: CompareResult) -> str:
    """Return the XML document.

    A regression is a failure. An inconclusive metric and an invalid pair are errors, since they must not pass.
    """
    root = Xml.Element("testsuites", name="inferctl compare")
    for pair in result.pairs:
        outcomes: list[str] = [metric.outcome for metric in pair.metrics] or [pair.outcome]
        elements = [_ELEMENTS.get(outcome) for outcome in outcomes]
        kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
        counts = {name: str(elements.count(kind)) for name, kind in kinds.items()}
        suite = Xml.SubElement(root, "testsuite", {"name": pair.name, "tests": str(len(outcomes)), **counts})
        for metric in pair.metrics:
            _add_case(suite, pair.name, metric.name, metric.outcome, _message(metric))
            Xml.SubElement(suite[-1], "system-out").text = "  ".join(text for text in comparison.cells(metric) if text)
        if not pair.metrics:
            _add_case(suite, pair.name, "comparison", pair.outcome, "; ".join(pair.reasons))
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: Xml.Element, suite_name: str, name: str, outcome: str, message: str) -> None:
    case = Xml.SubElement(suite, "testcase", classname=suite_name, name=name)
    if element := _ELEMENTS.get(outcome):
        Xml.SubElement(case, element, message=message, type=outcome)


def _message(metric: MetricResult) -> str:
    change = f"{100 * metric.change:+.1f}%" if metric.change is not None else ""
    if metric.points:
        change = f"{metric.points.difference:+.2f} {comparison.points_of(metric)}"
    needed = f"about {metric.repeats_needed} repeats are needed" if metric.repeats_needed else ""
    return "; ".join(part for part in (change, metric.reason, needed) if part)
