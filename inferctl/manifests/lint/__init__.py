"""Finds what goes wrong with manifests of model servers although every schema accepts them."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.manifests.lint import (
    gpu,
    images,
    life,
    observability,
    overflow,
    placement,
    ports,
    scaling,
    version,
)
from inferctl.manifests.lint.finding import LESSONS, Level, LintFinding, Rule
from inferctl.manifests.lint.manifests import Manifests
from inferctl.manifests.lint.pod_templates import unread
from inferctl.manifests.manifests_file import Located
from inferctl.manifests.versions import OLDEST_SUPPORTED

__all__ = ["LESSONS", "RULES", "Level", "LintFinding", "Rule", "lint", "unread"]

MODULES = (gpu, images, life, observability, overflow, placement, ports, scaling, version)
# By id, in the order of `MODULES`.
RULES = {each.id: each for module in MODULES for each in vars(module).values() if isinstance(each, Rule)}


def lint(objects: Sequence[Located], minor: int = OLDEST_SUPPORTED) -> list[LintFinding]:
    """Return the findings about `objects` in Kubernetes 1.`minor`, by file and line. Rules that an object's annotation ignores find nothing."""
    manifests = Manifests(objects, minor)
    found = {finding for rule in RULES.values() for finding in rule.findings(manifests)}
    return sorted(
        found, key=lambda each: (each.file, each.line or 0, each.object, each.namespace, each.rule, each.field)
    )
