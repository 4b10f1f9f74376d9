"""Writes findings as SARIF 2.1.0, which code hosts show next to the lines of a change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import inferctl
from inferctl.manifests.lint.finding import LESSONS, LintFinding, Rule

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def log(findings: Sequence[LintFinding], rules: Sequence[Rule]) -> dict[str, Any]:
    """Return the SARIF log of one run. `rules`: all rules that ran, also those without a finding."""
    numbers = {rule.id: number for number, rule in enumerate(rules)}
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "inferctl",
                        "version": inferctl.__version__,
                        "rules": [_rule(each) for each in rules],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(each, numbers[each.rule]) for each in findings],
            }
        ],
    }


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": f"{rule.finds[:1].upper()}{rule.finds[1:]}."},
        "fullDescription": {"text": f"{LESSONS[rule.lesson]} What goes wrong: {rule.consequence}."},
        "help": {"text": f"Fix: {rule.fix}."},
        "defaultConfiguration": {"level": rule.level},
        "properties": {"tags": ["kubernetes", rule.lesson]},
    }


def _result(finding: LintFinding, number: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": f"{finding.object}/{finding.field}", "kind": "member"}]
    }
    if finding.file:
        place: dict[str, Any] = {"artifactLocation": {"uri": quote(PurePath(finding.file).as_posix())}}
        if finding.line:
            place["region"] = {"startLine": finding.line}
        location["physicalLocation"] = place
    # Stable while lines move: a code host recognizes the finding in the next run.
    identity = "\0".join((finding.rule, finding.file, finding.namespace, finding.object, finding.field))
    return {
        "ruleId": finding.rule,
        "ruleIndex": number,
        "level": finding.level,
        "message": {
            "text": f"{finding.object} {finding.field}: {finding.what}. {finding.lesson} "
            f"What goes wrong: {finding.consequence}. Fix: {finding.fix}."
        },
        "locations": [location],
        "partialFingerprints": {"inferctlFinding/v2": hashlib.sha256(identity.encode()).hexdigest()},
    }
