"""`inferctl usage` on a real ledger."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import subprocess
from pathlib import Path

import pytest

from inferctl import cli
from inferctl.tenancy.metering.ledger import Ledger
from inferctl.tenancy.metering.outbox import EventBatch
from tests.tenancy.parts import DAY, batch, end


def store(folder: Path, *batches: EventBatch) -> None:
    """Store events in the ledger of a folder."""
    ledger = Ledger.open(f"sqlite:///{folder}/metering/ledger.sqlite")
    ledger.apply(batches)
    ledger.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose ledger has 12 requests, 3 lost events and a killed server."""
    second = batch("b", 1, 7, key="[k2]", at=DAY + 86_400), end("b", 8, 8, clean=True)
    store(tmp_path, batch("a", 1, 6, lost=[2]), end("a", 7, 9, clean=False), *second)
    (tmp_path / "prices.yaml").write_text("prices: [{hardware: l4, currency: EUR, from: 2026-09-22, input: 1000}]")
    return tmp_path


def usage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `inferctl usage` in this process, which is faster."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = cli.run(["usage", *arguments])
    return subprocess.CompletedProcess([], code, stdout.getvalue(), stderr.getvalue())


def test_a_table_with_totals_and_what_is_missing(folder: Path) -> None:
    done = usage(folder, "--by", "key,day")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:2] == [["tokens", "engine"], ["key", "day", "requests", "errors", "inputs", "in", "s"]]
    assert ["k1", "2026-09-21", "5", "0", "5", "50", "0.010"] in lines
    assert ["[k2]", "2026-09-22", "7", "0", "7", "70", "0.014"] in lines
    assert ["total", "12", "0", "12", "120", "0.024"] in lines
    assert "warning: 3 events were lost, so the sums are too low: a 2-2, a 7-8" in done.stderr
    assert "warning: server processes that were killed: 1" in done.stderr


def test_the_names_of_keys_are_shown(tmp_path: Path) -> None:
    """Not of a removed key or the subject of a token; with ids where names are not enough."""
    names = {"70zriuf6ni90": "=a\x1b", "3k9x0a7bq2vd": "b", "3k9x0a7bq2ve": "b", "3k9x0a7bq2vf": "alice"}
    ids = [*names, "000000000000", "alice", None]
    store(tmp_path, *(batch(f"s{number}", 1, 1 + number, key=key_id) for number, key_id in enumerate(ids)))
    keys = [{"id": one, "name": name, "digests": [], "created": "2026-01-01T00:00:00Z"} for one, name in names.items()]
    (tmp_path / "keys.json").write_text(json.dumps({"version": 1, "keys": keys}))
    (tmp_path / "keys.json").chmod(0o600)
    table = usage(tmp_path, "--by", "key").stdout
    shown = ["=a\\x1b", "b (3k9x0a7bq2vd)", "b (3k9x0a7bq2ve)", "alice (3k9x0a7bq2vf)", "000000000000", "alice", "-"]
    lines = [line.rstrip() for line in table.splitlines()]
    for number, each in enumerate(shown, 1):
        assert any(re.match(rf" *{re.escape(each)} +{number} +0 +{number} +{10 * number} ", line) for line in lines), (
            each
        )
    found = json.loads(usage(tmp_path, "--by", "day,key", "--json").stdout)
    assert {row["key"]: row["key_name"] for row in found["rows"]} == dict.fromkeys(ids) | names
    rows = list(csv.DictReader(io.StringIO(usage(tmp_path, "--by", "key", "--format", "csv").stdout)))
    assert {row["key_name"] for row in rows} == {"'=a\x1b", "b", "alice", ""}
    assert "key_name" not in usage(tmp_path, "--by", "day", "--format", "csv").stdout
    (tmp_path / "prices.yaml").write_text('prices: [{hardware: "*", currency: EUR, from: 2026-01-01, input: 1000}]')
    page = usage(tmp_path, "--by", "key", "--format", "html", "--prices", "prices.yaml").stdout
    assert [page.count(f"<h2>{each}: ") for each in (*shown[1:4], "b")] == [1, 1, 1, 0]
    (tmp_path / "keys.json").write_text("{")
    done = usage(tmp_path, "--by", "key")
    assert (done.returncode, "names of keys are not shown: the key file" in done.stderr) == (0, True)
    assert usage(tmp_path, "--by", "key", "--keys", "keys.json").returncode == 2
    (tmp_path / "keys.json").unlink()
    done = usage(tmp_path, "--by", "key")
    assert (done.returncode, done.stderr, "3k9x0a7bq2vd" in done.stdout) == (0, "", True)
    assert usage(tmp_path, "--by", "key", "--keys", "none.json").returncode == 2


def test_csv_and_json_have_costs(folder: Path) -> None:
    options = ("--by", "key", "--since", "2026-09-22", "--prices", "prices.yaml")
    (row,) = csv.DictReader(io.StringIO(usage(folder, *options, "--format", "csv").stdout))
    assert (row["key"], row["input_tokens"], row["cost"]) == ("[k2]", "70", "0.070")
    page = usage(folder, *options, "--format", "html").stdout
    assert page.count("<rect ") == page.count("<section>") == 1
    assert ("[k2]: 0.07 EUR" in page, "<td>70</td>" in page) == (True, True)
    document = json.loads(usage(folder, *options, "--json").stdout)
    assert (document["currency"], document["total"]["cost"], document["lost_events"]) == ("EUR", "0.070", 0)


CALLERS = ["=1+1", "+1", "-1", "@SUM(A1)", "a=1", "\x1b[31mred"]


def test_a_spreadsheet_runs_no_caller_and_a_terminal_obeys_none(tmp_path: Path) -> None:
    store(tmp_path, *(batch(f"s{number}", 1, 2, key=name) for number, name in enumerate(CALLERS)))
    rows = list(csv.DictReader(io.StringIO(usage(tmp_path, "--by", "key", "--format", "csv").stdout)))
    assert {row["key"] for row in rows} == {*(f"'{name}" for name in CALLERS[:4]), *CALLERS[4:]}
    assert {row["requests"] for row in rows} == {"2"}
    document = json.loads(usage(tmp_path, "--by", "key", "--json").stdout)
    assert {row["key"] for row in document["rows"]} == set(CALLERS)
    table = usage(tmp_path, "--by", "key").stdout
    assert "\x1b" not in table
    assert "\\x1b[31mred" in table


def test_a_narrow_terminal_breaks_no_key_or_day_and_truncates_no_figure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bill of 0.07 EUR was shown as 0."""
    monkeypatch.setenv("COLUMNS", "80")
    store(folder, batch("c", 1, 6, key="70zriuf6ni90"))
    lines = usage(folder, "--by", "key,day,model,hardware").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("70zriuf6ni90" in line and "2026-09-21" in line for line in lines)
    for names, columns in (("key", 80), ("key,day,model,hardware", 200)):
        options = ("--by", names, "--since", "2026-09-22", "--prices", "prices.yaml")
        lines = usage(folder, *options).stdout.splitlines()
        assert [line.split()[-1] for line in lines if "[k2]" in line or "total" in line] == ["0.070000"] * 2
        assert "(EUR)" in lines[1].split() and max(map(len, lines)) <= columns


def test_errors_say_what_to_do(folder: Path) -> None:
    for options, said in {
        ("--prices", "prices.yaml"): "no price in EUR for l4 on 2026-09-21",
        ("--by", "kye"): "did you mean key?",
        ("--since", "yesterday"): "'yesterday' is not a time",
        ("--ledger", "sqlite:///none.sqlite"): "no ledger at none.sqlite",
    }.items():
        done = usage(folder, *options)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    for time in ("0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", "1900-01-01", "999999d"):
        assert usage(folder, "--since", time).returncode == 0, time
        assert usage(folder, "--until", time, "--by", "month").returncode == 0, time
