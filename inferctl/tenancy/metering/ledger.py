"""The ledger: all usage events of one machine (SQLite) or of a fleet (PostgreSQL).

An event is stored once, however often it arrives: its key is (source, id). The watermark of each source is written in
the transaction of its events, so a crash at any point repeats or loses nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from inferctl.config.budget import UNITS
from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import UsageError
from inferctl.tenancy.database import Schema, file_of
from inferctl.tenancy.metering.outbox import EventBatch

_metadata = sa.MetaData()
EVENTS = sa.Table(
    "usage_events",
    _metadata,
    sa.Column("source", sa.String, primary_key=True),
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time_ms", sa.BigInteger, nullable=False),
    sa.Column("day", sa.String, nullable=False),
    *(sa.Column(name, sa.String) for name in ("key_id", "model", "model_sha256", "task", "endpoint")),
    *(sa.Column(name, sa.BigInteger) for name in ("inputs", "input_tokens", "cached_tokens", "output_tokens")),
    *(sa.Column(name, sa.Double) for name in ("engine_ms", "duration_ms")),
    sa.Column("status", sa.Integer),
    *(sa.Column(name, sa.String) for name in ("code", "hardware", "request_id")),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("team", sa.String),
    # Of a request with a budget: what it cost in billionths of the currency, and when it was admitted.
    sa.Column("cost", sa.BigInteger),
    sa.Column("currency", sa.String),
    sa.Column("admitted_ms", sa.BigInteger),
)
# What each run of a server spent of a budget. `window_end`: Unix time (s), 0 for never.
BUDGETS = sa.Table(
    "usage_budgets",
    _metadata,
    *(sa.Column(name, sa.String, primary_key=True) for name in ("account", "label", "run")),
    sa.Column("window_end", sa.BigInteger, nullable=False, index=True),
    sa.Column("spent", sa.BigInteger, nullable=False),
)
# `ended`: None, clean or unclean (the process was killed).
SOURCES = sa.Table(
    "usage_sources",
    _metadata,
    sa.Column("source", sa.String, primary_key=True),
    sa.Column("watermark", sa.BigInteger, nullable=False),
    sa.Column("ended", sa.String),
    sa.Column("ended_ms", sa.BigInteger),
)
# Numbers whose events were lost. `time_ms`: of the batch that showed it.
GAPS = sa.Table(
    "usage_gaps",
    _metadata,
    sa.Column("source", sa.String, primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("time_ms", sa.BigInteger, nullable=False),
)
# What `usage` can group by -> its column.
DIMENSIONS: dict[str, Any] = {
    "key": EVENTS.c.key_id,
    "team": EVENTS.c.team,
    "day": EVENTS.c.day,
    "month": sa.func.substr(EVENTS.c.day, 1, 7),
    **{name: EVENTS.c[name] for name in ("model", "task", "endpoint", "hardware", "status", "code", "source")},
    "currency": EVENTS.c.currency,
}
SUMS = ("requests", "errors", "inputs", "input_tokens", "cached_tokens", "output_tokens", "engine_seconds")
_SCHEMA = Schema("the ledger", Path(__file__).with_name("migrations"), "usage_version")
# Windows and runs that ended earlier are not reported to servers.
BUDGETS_KEPT_S, _ENDED_KEPT_S = 2 * 86_400, 40 * 86_400
_EPOCH, _DAY_MS = datetime.date(1970, 1, 1), 86_400_000


@dataclass(frozen=True)
class Gap:
    """Lost events of a source: the numbers from `first` to `last`. `time_ms`: when it was noticed."""

    source: str
    first: int
    last: int
    time_ms: int


class Ledger:
    """An open ledger. All methods raise `DatabaseUnavailableError`."""

    def __init__(self, engine: sa.Engine, address: DatabaseAddress) -> None:
        self._engine, self._address = engine, address
        self._insert: Any = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
        self._insert_event = self._insert(EVENTS).on_conflict_do_nothing().compile(dialect=engine.dialect)

    @classmethod
    def open(cls, address: DatabaseAddress | str) -> Ledger:
        """Open the ledger for writing, and create or migrate its tables. Raises `UsageError` for an invalid URL."""
        address = DatabaseAddress(address)
        return cls(_SCHEMA.open(address), address)

    @classmethod
    def read(cls, address: DatabaseAddress | str) -> Ledger:
        """Open an existing ledger for reports. Raises `UsageError` for an invalid URL or another version."""
        address = DatabaseAddress(address)
        if address.is_file:
            file = file_of(address) or Path()
            if not file.is_file():
                hint = "check its address (`--ledger URL`); the relay of a server with `metering.mode: on` makes it"
                raise UsageError(f"there is no ledger at {file}", hint)
            uri = f"{file.absolute().as_uri()}?mode=ro&uri=true"
            engine = sa.create_engine(f"sqlite:///{uri}")
        else:
            engine = _SCHEMA.engine(address)
        with _SCHEMA.reported(address), engine.connect() as connection:
            found, newest = _SCHEMA.versions(connection)
        if found is None:
            hint = "a server with `metering.mode: on` and this ledger makes them when it starts"
            raise UsageError(f"the ledger {address} has no tables yet", hint)
        if found != newest:
            hint = "run `inferctl relay` of this version once, which migrates it"
            raise UsageError(f"the ledger has the version {found}, but this inferctl reads {newest}", hint)
        return cls(engine, address)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def watermarks(self, sources: Sequence[str]) -> dict[str, int]:
        """Return up to which number the ledger has all that exists, for each source that it knows."""
        query = sa.select(SOURCES.c.source, SOURCES.c.watermark).where(SOURCES.c.source.in_(sources))
        with self._transaction() as connection:
            return {row.source: row.watermark for row in connection.execute(query)}

    def apply(self, batches: Sequence[EventBatch]) -> dict[str, int]:
        """Store batches, in the order of their numbers for each source, and return the new watermarks.

        A batch that comes before its predecessor is not stored, nor are those after it: they must come again. Raises
        `ValueError` for what is no batch of events; then nothing is stored.
        """
        found: dict[str, int] = {}
        with self._transaction() as connection:
            # Sorted by source, so that two relays cannot wait for each other.
            ordered = sorted(batches, key=lambda batch: (batch.source, batch.first))
            for source, group in groupby(ordered, lambda batch: batch.source):
                found[source] = self._apply(connection, source, list(group))
        return found

    def _apply(self, connection: sa.Connection, source: str, batches: list[EventBatch]) -> int:
        new = {"source": source, "watermark": 0}
        connection.execute(self._insert(SOURCES).values(new).on_conflict_do_nothing())
        this = SOURCES.c.source == source
        watermark: int = connection.execute(sa.select(SOURCES.c.watermark).where(this).with_for_update()).scalar_one()
        rows: list[dict[str, Any]] = []
        gaps: list[dict[str, Any]] = []
        update: dict[str, Any] = {}
        spent = Counter[tuple[str, str, int, str]]()
        for batch in batches:
            if batch.last <= watermark:
                continue
            if batch.first > watermark + 1 and batch.first > batch.oldest:
                break  # its predecessor exists and will come
            events = {event.id: event for event in batch.events if event.id > watermark}
            expected = watermark + 1
            for number in [*sorted(events), batch.last + 1]:
                if number > expected:
                    gaps.append({"source": source, "first": expected, "last": number - 1, "time_ms": batch.time_ms})
                expected = number + 1
            for event in events.values():
                if event.ended:
                    update |= {"ended": event.ended, "ended_ms": event.time_ms}
                else:
                    day = _day((event.data["admitted_ms"] or event.time_ms) // _DAY_MS)
                    for share in event.shares:
                        spent[share] += event.data["cost"]
                    rows.append({"source": source, "id": event.id, "time_ms": event.time_ms, "day": day, **event.data})
            watermark = update["watermark"] = batch.last
        if rows:
            # Past SQLAlchemy's handling of parameters, which takes as long as the rest.
            names = self._insert_event.positiontup
            values = list(map(itemgetter(*names), rows)) if names else rows
            connection.exec_driver_sql(str(self._insert_event), values)
        if spent:
            columns = ("account", "label", "window_end", "run", "spent")
            sums = [dict(zip(columns, (*share, cost), strict=True)) for share, cost in sorted(spent.items())]
            add = self._insert(BUDGETS)
            total = BUDGETS.c.spent + add.excluded.spent
            keys = ["account", "label", "run"]
            connection.execute(add.on_conflict_do_update(index_elements=keys, set_={"spent": total}), sums)
        if gaps:
            connection.execute(self._insert(GAPS).on_conflict_do_nothing(), gaps)
        if update:
            connection.execute(sa.update(SOURCES).where(this).values(update))
        return watermark

    def usage(self, dimensions: Sequence[str], since_ms: int, until_ms: int) -> list[dict[str, Any]]:
        """Return the sums of requests from `since_ms` to before `until_ms`, by `dimensions` and in order.

        A request counts at its end, one with a budget at its admission.
        """
        columns = [DIMENSIONS[name].label(name) for name in dimensions]
        event = EVENTS.c
        errors = sa.func.sum(sa.case((event.status >= 400, event.requests), else_=0)).label("errors")
        sums = [sa.func.sum(event[name]).label(name) for name in SUMS if name in event]
        # Events have whole microseconds. Their sum as integers is exact, that of the floats is not.
        engine_us = sa.func.sum(sa.cast(sa.func.round(event.engine_ms * 1000), sa.BigInteger)).label("engine_us")
        cost = sa.func.sum(event.cost).label("cost")
        query = sa.select(*columns, errors, *sums, engine_us, cost)
        at = sa.func.coalesce(event.admitted_ms, event.time_ms)
        # The first one has an index. It is a day earlier, because a clock can be set back during a request.
        query = query.where(event.time_ms >= since_ms - _DAY_MS, at >= since_ms, at < until_ms)
        with self._transaction() as connection:
            found = connection.execute(query.group_by(*columns).order_by(*columns)).mappings().all()
        return [_sums(row, dimensions) for row in found if row["requests"]]

    def budgets(self, now_s: float) -> dict[str, Any]:
        """Return what runs of servers `spent` of the windows that have not ended long ago, and which have `ended`.

        `spent`: account, label, end, run, and billionths of the currency. The ledger has all that ended runs spent.
        """
        table, sources = BUDGETS.c, SOURCES.c
        ended = sa.select(sources.source).where(sources.ended_ms > 1000 * (now_s - _ENDED_KEPT_S))
        spent = sa.select(table.account, table.label, table.window_end, table.run, table.spent)
        spent = spent.where((table.window_end == 0) | (table.window_end > now_s - BUDGETS_KEPT_S))
        with self._transaction() as connection:
            names = sorted(connection.execute(ended.where(sources.ended.is_not(None))).scalars())
            # After that, so it has all of them.
            return {"ended": names, "spent": sorted(tuple(row) for row in connection.execute(spent))}

    def gaps(self, since_ms: int, until_ms: int) -> list[Gap]:
        """Return the lost events that were noticed from `since_ms` to before `until_ms`."""
        query = sa.select(GAPS).where(GAPS.c.time_ms >= since_ms, GAPS.c.time_ms < until_ms)
        with self._transaction() as connection:
            return [Gap(**row) for row in connection.execute(query.order_by(GAPS.c.time_ms)).mappings()]

    def unclean_ends(self, since_ms: int, until_ms: int) -> list[str]:
        """Return the sources of server processes that were killed from `since_ms` to before `until_ms`."""
        query = sa.select(SOURCES.c.source).where(
            SOURCES.c.ended == "unclean", SOURCES.c.ended_ms >= since_ms, SOURCES.c.ended_ms < until_ms
        )
        with self._transaction() as connection:
            return list(connection.execute(query.order_by(SOURCES.c.ended_ms)).scalars())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with _SCHEMA.reported(self._address), self._engine.begin() as connection:
            yield connection


@functools.lru_cache(maxsize=16)
def _day(number: int) -> str:
    """Return the date of a day, counted from 1970."""
    return (_EPOCH + datetime.timedelta(number)).isoformat()


def _sums(row: sa.RowMapping, dimensions: Sequence[str]) -> dict[str, Any]:
    """Return the dimensions and `SUMS` of a row. A sum of PostgreSQL is a Decimal."""
    sums = {name: int(row[name]) for name in SUMS if name in row}
    exact = {
        "engine_seconds": Decimal(int(row["engine_us"])) / 1_000_000,
        "cost": Decimal(int(row["cost"] or 0)) / UNITS,
    }
    return {name: row[name] for name in dimensions} | sums | exact


def now_ms() -> int:
    """Return the time in milliseconds since 1970."""
    return int(1000 * time.time())
