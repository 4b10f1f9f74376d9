"""The ledger in both databases: nothing twice, nothing lost without a trace."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import UsageError
from inferctl.tenancy.access.budgets import BudgetUse
from inferctl.tenancy.database import DatabaseUnavailableError, Schema
from inferctl.tenancy.fleet.key_store import KeyStore
from inferctl.tenancy.metering import ledger as ledger_module
from inferctl.tenancy.metering.ledger import SUMS, Ledger
from inferctl.tenancy.metering.outbox import EventBatch
from inferctl.tenancy.metering.usage_event import Item
from tests.tenancy.parts import DAY, batch, batch_of, end, event

ALL = (0, 2**62)
MIGRATIONS = Path(ledger_module.__file__).with_name("migrations")


def requests(ledger: Ledger) -> int:
    return sum(row["requests"] for row in ledger.usage([], *ALL))


def test_events_are_stored_with_their_watermark(ledger: Ledger) -> None:
    assert ledger.apply([batch("a", 1, 5), batch("b", 1, 3), batch("a", 6, 9)]) == {"a": 9, "b": 3}
    assert ledger.watermarks(["a", "b", "c"]) == {"a": 9, "b": 3}
    assert (requests(ledger), ledger.gaps(*ALL)) == (12, [])


def test_a_full_replay_twice_adds_nothing(ledger: Ledger) -> None:
    everything = [batch("a", 1, 200), batch("a", 201, 350, lost=[300]), end("a", 351, 353, clean=False)]
    for _ in range(3):
        assert ledger.apply(everything) == {"a": 353}
        assert requests(ledger) == 349
        assert [(gap.first, gap.last) for gap in ledger.gaps(*ALL)] == [(300, 300), (351, 352)]
        assert ledger.unclean_ends(*ALL) == ["a"]


def test_a_request_with_a_budget_counts_when_it_was_admitted(ledger: Ledger) -> None:
    """Also if the clock was set back before its end, over midnight."""
    share, midnight = ("k", "EUR total", 0), DAY - DAY % 86_400
    for number, (admitted, ended) in enumerate(((-1, 1), (1, -1)), 1):
        use = BudgetUse(5, "EUR", int(1000 * (midnight + admitted)), "a", [share], 9, 5, 0, 0)
        ledger.apply([batch_of("a", [Item(number, midnight + ended, event(budget=use))])])
    at = int(1000 * midnight)
    found = [row["day"] for span in ((0, at), (at, 2**62)) for row in ledger.usage(["day"], *span)]
    assert found == ["2026-09-20", "2026-09-21"]
    assert ledger.budgets(DAY) == {"ended": [], "spent": [(*share, "a", 10)]}


def test_a_batch_without_its_predecessor_waits(ledger: Ledger) -> None:
    assert ledger.apply([batch("a", 6, 9)]) == {"a": 0}
    assert ledger.apply([batch("a", 1, 5)]) == {"a": 5}
    assert ledger.apply([batch("a", 6, 9)]) == {"a": 9}
    assert ledger.apply([batch("a", 15, 20), batch("a", 10, 14)]) == {"a": 20}, "they arrived together"
    assert (requests(ledger), ledger.gaps(*ALL)) == (20, [])


def test_what_the_outbox_no_longer_has_is_a_gap(ledger: Ledger) -> None:
    """As after the ledger was lost: the outbox freed what that ledger had."""
    assert ledger.apply([batch("a", 6, 9, oldest=6)]) == {"a": 9}
    assert [(gap.first, gap.last) for gap in ledger.gaps(*ALL)] == [(1, 5)]


def test_usage_is_summed_by_what_is_asked(ledger: Ledger) -> None:
    ledger.apply([batch("a", 1, 5), batch("b", 1, 3, key="k2"), batch("c", 1, 2, at=DAY + 86_400)])
    rows = ledger.usage(["key", "day"], *ALL)
    found = [(row["key"], row["day"], row["requests"], row["input_tokens"]) for row in rows]
    assert found == [("k1", "2026-09-21", 5, 50), ("k1", "2026-09-22", 2, 20), ("k2", "2026-09-21", 3, 30)]
    (total,) = ledger.usage([], *ALL)
    assert (total["engine_seconds"], total["errors"]) == (Decimal("0.02"), 0)
    assert ledger.usage(["month"], int(1000 * DAY) + 1, 2**62)[0]["month"] == "2026-09"
    assert ledger.usage(["month"], int(1000 * DAY) + 1, 2**62)[0]["requests"] == 2


def summed(source: str, first: int) -> EventBatch:
    """Two events: of a request that was computed, and of 40 rejected ones."""
    rejected = event(tokens=0, status=429, engine_seconds=0.0)
    return batch_of(source, [Item(first, DAY, event(team="t")), Item(first + 1, DAY, rejected, 40)])


def test_an_event_counts_the_requests_that_it_stands_for(ledger: Ledger) -> None:
    for _ in range(2):  # again, as after a crash
        ledger.apply([summed("a", number) for number in (1, 3, 5)])
    rows = ledger.usage(["status"], *ALL)
    found = [tuple(row[name] for name in ("status", "requests", "errors", "inputs", "input_tokens")) for row in rows]
    assert found == [(200, 3, 0, 3, 30), (429, 120, 120, 0, 0)]
    assert ledger.gaps(*ALL) == []


def test_a_ledger_of_an_older_version_is_migrated(ledger_url: str) -> None:
    """Its rows are one request each without a team."""
    engine = Schema("it", MIGRATIONS, "usage_version").engine(DatabaseAddress(ledger_url))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes |= {"connection": connection, "version_table": "usage_version"}
        command.upgrade(config, "0001")
        row = "insert into usage_events (source, id, time_ms, day, status, {}) "
        row += "values ('old', {}, 0, '2026-01-01', 200, {})"
        sums = "inputs, input_tokens, cached_tokens, output_tokens, engine_ms"
        for number in (1, 2):
            connection.exec_driver_sql(row.format(sums, number, "1, 2, 0, 0, 1.5"))
        connection.exec_driver_sql("insert into usage_sources (source, watermark, sent) values ('old', 2, 2)")
    with pytest.raises(UsageError, match="has the version 0001") as caught:
        Ledger.read(ledger_url)
    assert "inferctl relay" in str(caught.value.hint)
    ledger = Ledger.open(ledger_url)
    ledger.apply([summed("new", 1)])
    assert ledger.watermarks(["old"]) == {"old": 2}
    found = [(row["source"], row["team"], row["requests"]) for row in ledger.usage(["source", "team"], *ALL)]
    assert sorted(found, key=str) == [("new", "t", 41), ("old", None, 2)]
    ledger.close()
    engine.dispose()


def test_what_is_no_batch_of_events_changes_nothing(ledger: Ledger) -> None:
    fields = list(batch("a", 1, 1).events[0].data)
    valid = dict.fromkeys(fields) | dict.fromkeys(SUMS, 1) | {"engine_ms": 1.0, "duration_ms": 1.0, "status": 200}
    common, row = valid, [1, 1000, *(valid[name] for name in fields[:11])]
    contents = [b"no json", b'[{"source": "a"}]', b"[1]", b'{"requests": []}', b"{}", b"1", b"[" * 100_000]
    # What a database would reject, as if it were not available.
    for name, value in [
        *((name, bad) for name in ("key_id", "endpoint", "code") for bad in (7, ["x"], "\0", "\ud800")),
        *((name, bad) for name in ("inputs", "input_tokens", "status") for bad in (-1, 2**63, 1.5, "1", True, None)),
        *((name, bad) for name in ("engine_ms", "duration_ms") for bad in (float("inf"), float("nan"), "1", None)),
        ("number", 0),
        ("number", 2),
        ("number", "1"),
        ("time", -1),
        ("time", 2**60),
    ]:
        place = ["number", "time", *fields].index(name)
        contents.append(json.dumps({"common": common, "requests": [[*row[:place], value, *row[place + 1 :]]]}).encode())
    for content in contents:
        with pytest.raises(ValueError, match="no batch"):
            ledger.apply([batch("b", 1, 5), EventBatch("a", 1, 1, 0, content)])
    for first, last, time_ms in ((0, 1, 0), (1, 2**63, 0), (1, 1, -1)):
        with pytest.raises(ValueError, match="the numbers"):
            ledger.apply([EventBatch("a", first, last, time_ms, b"[]")])
    assert requests(ledger) == 0
    assert ledger.apply([EventBatch("a", 1, 1, 0, json.dumps({"common": common, "requests": [row]}).encode())])


def test_several_relays_can_start_at_the_same_time(ledger_url: str) -> None:
    def work(source: str) -> None:
        ledger = Ledger.open(ledger_url)
        for number in range(10):
            ledger.apply([batch(source, 1 + 10 * number, 10 + 10 * number)])
        ledger.close()

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, "abc"))
    ledger = Ledger.open(ledger_url)
    assert requests(ledger) == 300
    ledger.close()


def test_errors_name_the_ledger_but_no_password(tmp_path: Path) -> None:
    for address in ("no url: secret", "mysql://u:secret@h/d"):
        with pytest.raises(UsageError, match="an address of a database") as rejected:
            Ledger.open(address)
        assert "secret" not in rejected.value.message
    with pytest.raises(UsageError, match="no ledger at"):
        Ledger.read(f"sqlite:///{tmp_path}/none.sqlite")
    with pytest.raises(DatabaseUnavailableError) as failed:
        Ledger.open("postgresql://u:secret@127.0.0.1:1/d")
    assert "secret" not in failed.value.message and "u:***@" in failed.value.message


def test_a_relay_creates_its_ledger_and_its_keys_at_the_same_time(tmp_path: Path) -> None:
    """Both upgrades run in one process, and Alembic has one connection for all of them in its globals."""
    for attempt in range(10):
        barrier = threading.Barrier(2)

        def opened(kind: type[Ledger] | type[KeyStore], file: Path, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            kind.open(f"sqlite:///{file}").close()

        usage, keys = tmp_path / f"usage-{attempt}.sqlite", tmp_path / f"keys-{attempt}.sqlite"
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(opened, (Ledger, KeyStore), (usage, keys)))
        engines = [sa.create_engine(f"sqlite:///{file}") for file in (usage, keys)]
        found = {name for engine in engines for name in sa.inspect(engine).get_table_names()}
        expected = {f"usage_{name}" for name in ("budgets", "events", "sources", "gaps", "version")}
        assert found == expected | {"api_keys", "api_key_changes", "api_key_version"}


def test_a_database_without_tables_is_named(tmp_path: Path) -> None:
    (tmp_path / "new.sqlite").touch()
    with pytest.raises(UsageError, match=r"new\.sqlite has no tables yet") as caught:
        Ledger.read(f"sqlite:///{tmp_path}/new.sqlite")
    assert "metering.mode" in str(caught.value.hint)
