"""The page `/docs` of every server, from its OpenAPI document: without scripts, and without files of other hosts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

_STYLE = "body{font:16px/1.5 sans-serif;max-width:52rem;margin:2rem auto}:root{color-scheme:light dark}"


def render(document: Mapping[str, Any], *parts: str) -> str:
    """Return the page with the routes of an OpenAPI document, and `parts` (HTML) after them."""
    title = html.escape(document["info"]["title"])
    rows = [
        (f"{method.upper()} {path}", operation.get("summary", ""))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    intro = f"<h1>{title}</h1><p><a href=/openapi.json>/openapi.json</a> has all details.</p>"
    return "".join([head, intro, table(rows), *parts])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of names and their descriptions."""
    cells = (f"<tr><td><code>{html.escape(a)}</code><td>{html.escape(b)}" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"
