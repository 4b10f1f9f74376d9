"""What is wrong with an expression of PromQL, and which metrics it reads."""

from __future__ import annotations

import re

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


def unknown_metrics(expression: str) -> list[str]:
    """Return the names inferctl_... in `expression` that no server of inferctl has, in alphabetical order."""
    names = metric_names.used(_STRINGS.sub('""', expression)) - metric_names.SERVER
    return sorted(name for name in names if name.startswith("inferctl_"))
