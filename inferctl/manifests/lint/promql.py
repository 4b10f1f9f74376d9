"""What is wrong with an expression of PromQL, and which metrics it reads."""

from __future__ import annotations

import re

from inferctl.core.errors import did_you_mean
from inferctl.manifests import metric_names

_STRINGS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`")


def problem(expression: str) -> str | None:
    """Return why `expression` is not PromQL, None if it is.

    Without the package promql-parser (extra `lint`), only empty expressions are found.
    """
    if not expression.strip():
        return "the expression is empty"
    try:
        import promql_parser
    except ImportError:
        return None
    try:
        promql_parser.parse(expression)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def server_metrics() -> frozenset[str]:
    """Return the names in `/metrics` of the servers of inferctl."""
    return metric_names.SERVER


def metrics_of(expression: str, prefix: str) -> list[str]:
    """Return the metrics in `expression` whose names start with `prefix`, in alphabetical order."""
    return sorted(name for name in metric_names.used(_STRINGS.sub('""', expression)) if name.startswith(prefix))


def closest(name: str, known: frozenset[str]) -> str | None:
    """Return `did you mean ...?` for the known metric that is closest to `name`; None if none is close."""
    return did_you_mean(name, sorted(known))
