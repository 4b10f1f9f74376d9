"""Renders invoices: one HTML page with the costs of each group, and a picture of them by day and model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from inferctl.core import assets

if TYPE_CHECKING:
    from inferctl.tenancy.metering.report import Report

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b2a100", "#8c8c8c")  # Okabe and Ito


def with_names(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with the name of a key in place of its id, which follows only if the name could mean another row."""
    shown = Counter(name for _, name in {(row.get("key"), row.get("key_name") or row.get("key")) for row in rows})
    return [
        {**row, "key": name if shown[name] == 1 else f"{name} ({row['key']})"} if (name := row.get("key_name")) else row
        for row in rows
    ]


def page(report: Report) -> str:
    """Return the page of a report with costs, of which two dimensions are model and day."""
    by = [name for name in report.dimensions if name not in ("model", "day")]

    def group(row: dict[str, object]) -> str:
        return ", ".join(str(row[name] or "-") for name in by)

    named = with_names(report.rows)
    rows = [row | {"group": group(row) or "all requests", "model": row["model"] or "-"} for row in named]
    models = sorted({row["model"] for row in rows})
    colors = {model: _COLORS[number % len(_COLORS)] for number, model in enumerate(models)}
    numbers = [date.fromisoformat(row["day"]).toordinal() for row in rows]
    days = [date.fromordinal(each).isoformat() for each in range(min(numbers), max(numbers) + 1)] if rows else []
    return assets.page("invoice.html.j2", report=report, rows=rows, days=days, colors=colors)
