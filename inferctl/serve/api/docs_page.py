"""The page `/docs` of every server, from its OpenAPI document: without scripts, and without files of other hosts."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
    "pre{white-space:pre-wrap}pre,td{overflow-wrap:anywhere}td{vertical-align:top;padding:.1rem .5rem .1rem 0}"
    "td:first-child{min-width:11rem}"
)


def render(document: Mapping[str, Any], *parts: str) -> str:
    """Return the page with the routes of an OpenAPI document, and `parts` (HTML) after them."""
    title = html.escape(document["info"]["title"])
    rows = [
        (f"{method.upper()} {path}", operation.get("summary", ""))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{title}</title><style>{_STYLE}</style>"
    intro = f"<h1>{title}</h1><p><a href=/openapi.json>/openapi.json</a> has all details.</p>"
    return "".join([head, intro, table(rows), *parts])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and their descriptions, in which words between backticks are code."""
    cells = (f"<tr><td><code>{html.escape(name)}</code><td>{_text(described)}" for name, described in rows)
    return f"<table>{''.join(cells)}</table>"


def _text(described: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(described))
