"""Renders invoices: one HTML page with the costs of each group, and a picture of them by day and model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inferctl.core import assets

if TYPE_CHECKING:
    from inferctl.tenancy.metering.report import Report

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b2a100", "#8c8c8c")  # Okabe and Ito


def page(report: Report) -> str:
    """Return the page of a report with costs, of which two dimensions are model and day."""
    by = [name for name in report.dimensions if name not in ("model", "day")]

    def group(row: dict[str, object]) -> str:
        # Keys that were created again have the name of earlier ones.
        named = {"key": f"{row['key_name']} ({row['key']})"} if row.get("key_name") else {}
        return ", ".join(str(named.get(name) or row[name] or "-") for name in by)

    rows = [row | {"group": group(row) or "all requests", "model": row["model"] or "-"} for row in report.rows]
    models = sorted({row["model"] for row in rows})
    colors = {model: _COLORS[number % len(_COLORS)] for number, model in enumerate(models)}
    days = sorted({row["day"] for row in rows})
    return assets.page("invoice.html.j2", report=report, rows=rows, days=days, colors=colors)
