"""`inferctl usage`: sum up the ledger, with prices, and show what is known to be missing."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from inferctl.cli import console, invoices, options
from inferctl.cli.key_place import Place
from inferctl.config.budget import parse
from inferctl.config.spec import Access, Spec
from inferctl.core.errors import InferctlError, UsageError, needs_packages
from inferctl.tenancy.access.budgets import states

if TYPE_CHECKING:
    from inferctl.tenancy.metering.report import Report

EPILOG = """\b
Examples:
  # Requests and tokens of each team and API key in the last 30 days
  inferctl usage --by team,key --since 30d
  # An invoice of November for each team, with a picture
  inferctl usage --by team --since 2026-11-01 --until 2026-12-01 --prices prices.yaml --format html >invoice.html
  # The cost of each key and day, as CSV
  inferctl usage --by key,day --since 2026-11-01 --prices prices.yaml --format csv
"""
_SHOWN_GAPS = 5
_ALWAYS = ("requests", "errors")
# Letters of a name that a narrow terminal does not break. An id of a key has 12, a day 10.
_WHOLE = 16
_GAP = 1  # between columns
_HEADINGS = {
    "input_tokens": "tokens in",
    "cached_tokens": "cached",
    "output_tokens": "out",
    "engine_seconds": "engine s",
}


@options.with_settings("metering.ledger")
def usage(
    flags: options.Flags,
    by: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Group by these: key, team, day, month, model, task, endpoint, hardware, status, code, source.",
        ),
    ] = "key,day,model",
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Count requests from TIME on: 2026-11-01, 7d or 12h. [default: all]"),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Count requests before TIME. [default: now]")
    ] = None,
    keys_: Annotated[
        str | None,
        typer.Option(
            "--keys",
            metavar="FILE|URL",
            help="Show the names of these keys. [default: access.keys of the spec, else keys.json]",
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compute costs with this price book (YAML). [default: metering.prices]"),
    ] = None,
    currency: Annotated[
        str | None, typer.Option(metavar="CODE", help="Use the prices in this currency. [default: the only one]")
    ] = None,
    format_: Annotated[
        Literal["text", "csv", "json", "html"],
        typer.Option("--format", help="Print text, CSV, JSON, or an invoice as a page (costs by --by, model and day)."),
    ] = "text",
    budgets: Annotated[
        bool, typer.Option("--budgets", help="Print limit, spent, reserved, left and reset of all budgets instead.")
    ] = False,
    json_: options.Json = False,
    spec_file: options.SpecFile = None,
) -> None:
    """Print the usage that `metering` recorded, by API key, day, model and more. Days are in UTC.

    Inputs and tokens are those of requests that were computed. Warns about lost events and about servers that were
    killed, whose last requests may be missing.
    """
    style = "json" if json_ else format_
    spec = options.without_model(spec_file, {**flags, "access.keys": keys_})
    if budgets:
        if style in ("csv", "html"):
            raise UsageError(f"`--budgets` cannot be printed as {style}", "use `--format json`")
        if since or until or currency:
            raise UsageError("`--since`, `--until` and `--currency` do not select budgets", "remove them")
        _print_budgets(spec, as_json=style == "json")
        return
    with needs_packages("`inferctl usage`", "ledger"):
        from inferctl.tenancy.metering import ledger as ledgers
        from inferctl.tenancy.metering import prices as price_books
        from inferctl.tenancy.metering import report as reports
        from inferctl.tenancy.metering import times

        names = [options.known(name.strip(), ledgers.DIMENSIONS, "--by") for name in by.split(",") if name.strip()]
        if style == "html":
            names += ["model", "day"]
        if not prices and spec.metering.prices:
            prices = Path(spec.metering.prices)
        if (currency or style == "html") and not prices:
            option = "--currency" if currency else "--format html"
            raise UsageError(f"`{option}` requires prices", "pass `--prices FILE`")
        now_ms = ledgers.now_ms()
        span = (times.parse(since, now_ms, "--since") if since else 0, times.parse(until or "0h", now_ms, "--until"))
        book = price_books.read(prices, currency) if prices else None
        opened = ledgers.Ledger.read(spec.metering.ledger_url)
        known_keys = _names(spec.access, required=keys_ is not None) if "key" in names else {}
        report = reports.make(opened, list(dict.fromkeys(names)), *span, book, known_keys)
        opened.close()
    if style == "json":
        console.document(report.to_json())
    elif style == "csv":
        console.data(report.to_csv())
    elif style == "html":
        console.data(invoices.page(report))
    else:
        _print(report)
    _warn(report)


def _names(access: Access, *, required: bool) -> dict[str, str]:
    """Return the names of keys by id. Only if they are `required`, it is an error that they cannot be read."""
    place = Place(options.with_keys(access))
    if not required and place.file and not place.file.exists():
        return {}
    try:
        return {key.id: key.name for key in place.read()}
    except (InferctlError, OSError) as error:
        if required:
            raise
        console.warn(f"the names of keys are not shown: {getattr(error, 'message', error)}")
        return {}


def _print_budgets(spec: Spec, *, as_json: bool) -> None:
    """Print the budgets of the keys and of the spec, as the ledger and the servers of this machine know them."""
    with needs_packages("`inferctl usage`", "ledger"):
        from inferctl.tenancy.metering.ledger import Ledger
    keys = [key for key in Place(options.with_keys(spec.access)).read() if key.budget and not key.revoked]
    names = {key.id: key.name for key in keys}
    needed = [parse(key.id, key.budget) for key in keys if key.budget]
    needed += [parse(account, text) for account, text in spec.access.budgets.items()]
    opened, now = Ledger.read(spec.metering.ledger_url), time.time()
    found = states(needed, opened.budgets(now), Path(spec.metering.data), now)
    opened.close()
    rows: list[dict[str, Any]] = [
        {
            "account": budget.account,
            "name": names.get(budget.account),
            "window": budget.window(now).label,
            "soft": budget.soft,
            **dict(part.split("=") for part in use.header().split(", ")),
        }
        for budget, use in zip(needed, found, strict=True)
    ]
    if as_json:
        console.document({"budgets": rows})
        return
    lines: list[tuple[str, ...]] = [("budget", "window", "limit", "spent", "reserved", "left", "alert", "reset")]
    for row in rows:
        who, window = console.plain(str(row["name"] or row["account"])), f"{row['window']}{' soft' * row['soft']}"
        money = (_money(row[name]) for name in lines[0][2:6])
        lines.append((who, window, *money, row.get("alert", "-"), row.get("reset", "-").replace("T00:00:00Z", "")))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for number, name in enumerate(lines[0]):
        table.add_column(name, justify="right" if number > 1 else "left", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    console.report(table, sum(_GAP + max(map(len, column)) for column in zip(*lines, strict=True)))


def _money(text: str) -> str:
    """Return an amount with two decimals, or with four if it has more."""
    shown = f"{Decimal(text):,.4f}"
    return shown.removesuffix("00")


def _print(report: Report) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, show_footer=True)
    # Columns without a value would make the table too wide for a terminal.
    sums = [name for name in report.columns if name in _ALWAYS or report.total.get(name)]
    rows, least = invoices.with_names(report.rows), 0
    for index, name in enumerate(report.dimensions):
        # Days and ids of keys stay on one line, so that they can be copied. Ids that gateways name may be longer.
        longest = max((len(str(row[name])) for row in rows), default=0)
        width = max(len(name), min(_WHOLE, longest))
        footer = "" if index else "total"
        table.add_column(name, footer=footer, overflow="fold", min_width=width, no_wrap=longest <= _WHOLE)
        least += width + _GAP
    for name in sums:
        heading = f"cost ({report.currency})" if name == "cost" else _HEADINGS.get(name, name)
        footer = _shown(name, report.total[name])
        table.add_column(heading.replace(" ", "\n"), footer=footer, justify="right", no_wrap=True)
        least += max(map(len, (*heading.split(), footer, *(_shown(name, row[name]) for row in rows)))) + _GAP
    for row in rows:
        names = ["-" if row[name] is None else console.plain(str(row[name])) for name in report.dimensions]
        # As Text, because Rich reads brackets in a str as markup.
        table.add_row(*map(Text, [*names, *(_shown(name, row[name]) for name in sums)]))
    console.report(table, least)


def _shown(name: str, value: object) -> str:
    if name == "cost":
        return f"{value:,.6f}"
    return f"{value:,.3f}" if name == "engine_seconds" else f"{value:,}"


def _warn(report: Report) -> None:
    if report.gaps:
        ranges = [f"{gap.source} {gap.first}-{gap.last}" for gap in report.gaps[:_SHOWN_GAPS]]
        more = f" and {len(report.gaps) - _SHOWN_GAPS} more" if len(report.gaps) > _SHOWN_GAPS else ""
        console.warn(f"{report.lost:,} events were lost, so the sums are too low: {', '.join(ranges)}{more}")
    if report.unclean_ends:
        console.warn(
            f"server processes that were killed: {len(report.unclean_ends)}; "
            "requests without a complete response left no event"
        )
