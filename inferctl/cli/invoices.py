"""Writes invoices: the costs of each group by model and day, as CSV or as one HTML page with a picture."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

from inferctl.core import assets, outputs
from inferctl.tenancy.metering.report import Report

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b2a100", "#8c8c8c")  # Okabe and Ito


def write(file: Path, report: Report) -> None:
    """Write a report by some groups, model and day, which has costs. Raises `NotReadyError`."""
    outputs.write(file, report.to_csv() if file.suffix == ".csv" else _page(report), "--invoice")


def _page(report: Report) -> str:
    import jinja2

    loader = jinja2.FileSystemLoader(assets.root() / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    *by, _, _ = report.dimensions
    days = sorted({row["day"] for row in report.rows})
    models = sorted({str(row["model"] or "-") for row in report.rows})
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    tokens: dict[tuple[Any, ...], dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0, 0]))
    for row in report.rows:
        group = tuple(str(row.get("key_name") or row[name] or "-") for name in by)
        model = str(row["model"] or "-")
        groups[group][model, row["day"]] += row["cost"]
        counted = (row["requests"], row["input_tokens"], row["cached_tokens"], row["output_tokens"])
        tokens[group][model] = [one + more for one, more in zip(tokens[group][model], counted, strict=True)]
    return environment.get_template("invoice.html.j2").render(
        by=", ".join(by),
        currency=report.currency,
        days=days,
        models=models,
        colors={model: _COLORS[number % len(_COLORS)] for number, model in enumerate(models)},
        groups=sorted(groups.items()),
        tokens=tokens,
        total=report.total["cost"],
        lost=report.lost,
    )
