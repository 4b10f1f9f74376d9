"""Finds what goes wrong with manifests of model servers although every schema accepts them."""

from __future__ import annotations

from collections.abc import Sequence

from inferctl.manifests.lint import access, gpu, life, observability, overflow, placement, scaling, values, version
from inferctl.manifests.lint.finding import LESSONS, RULES, Context, Finding, Level, ModelFacts, Rule
from inferctl.manifests.lint.manifests import Manifests
from inferctl.manifests.lint.pod_templates import unread
from inferctl.manifests.manifests_file import Located

__all__ = ["LESSONS", "RULES", "Context", "Finding", "Level", "ModelFacts", "Rule", "lint", "unread"]

# The modules of rules. Importing them registers their rules.
MODULES = (gpu, placement, values, overflow, scaling, life, access, observability, version)


def lint(objects: Sequence[Located], context: Context | None = None) -> list[Finding]:
    """Return the findings about `objects`, by file and line. Rules that an object's annotation ignores find nothing."""
    manifests, context = Manifests(objects), context or Context()
    found = {finding for rule in RULES.values() for finding in rule.findings(manifests, context)}
    return sorted(
        found, key=lambda each: (each.file, each.line or 0, each.object, each.namespace, each.rule, each.field)
    )
