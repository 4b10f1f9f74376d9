"""`inferctl usage` on a real ledger."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from inferctl.metering.ledger import Ledger
from tests.metering.parts import DAY, batch, end


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose ledger has 12 requests, 3 lost events and a killed server."""
    ledger = Ledger.open(f"sqlite:///{tmp_path}/metering/ledger.sqlite")
    ledger.apply([batch("a", 1, 6, lost=[2]), end("a", 7, 9, clean=False)])
    ledger.apply([batch("b", 1, 7, key="[k2]", at=DAY + 86_400), end("b", 8, 8, clean=True)])
    ledger.close()
    (tmp_path / "prices.yaml").write_text("prices: [{hardware: l4, currency: EUR, from: 2026-09-22, input: 1000}]")
    return tmp_path


def usage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inferctl", "usage", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_table_with_totals_and_what_is_missing(folder: Path) -> None:
    done = usage(folder, "--by", "key,day")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["key", "day", "requests", "errors", "inputs", "tokens", "in", "engine", "s"] in lines
    assert ["k1", "2026-09-21", "5", "0", "5", "50", "0.010"] in lines
    assert ["[k2]", "2026-09-22", "7", "0", "7", "70", "0.014"] in lines
    assert ["total", "12", "0", "12", "120", "0.024"] in lines
    assert "warning: 3 events were lost, so the sums are too low: a 2-2, a 7-8" in done.stderr
    assert "warning: server processes that were killed: 1" in done.stderr


def test_csv_and_json_have_costs(folder: Path) -> None:
    options = ("--by", "key", "--since", "2026-09-22", "--prices", "prices.yaml")
    (row,) = csv.DictReader(io.StringIO(usage(folder, *options, "--format", "csv").stdout))
    assert (row["key"], row["input_tokens"], row["cost"]) == ("[k2]", "70", "0.070")
    document = json.loads(usage(folder, *options, "--json").stdout)
    assert (document["currency"], document["total"]["cost"], document["lost_events"]) == ("EUR", "0.070", 0)


CALLERS = ["=1+1", "+1", "-1", "@SUM(A1)", "a=1", "\x1b[31mred"]


def test_a_spreadsheet_runs_no_caller_and_a_terminal_obeys_none(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/metering/ledger.sqlite")
    for number, name in enumerate(CALLERS):
        ledger.apply([batch(f"s{number}", 1, 2, key=name), end(f"s{number}", 3, 3, clean=True)])
    ledger.close()
    rows = list(csv.DictReader(io.StringIO(usage(tmp_path, "--by", "key", "--format", "csv").stdout)))
    assert {row["key"] for row in rows} == {*(f"'{name}" for name in CALLERS[:4]), *CALLERS[4:]}
    assert {row["requests"] for row in rows} == {"2"}
    document = json.loads(usage(tmp_path, "--by", "key", "--json").stdout)
    assert {row["key"] for row in document["rows"]} == set(CALLERS)
    table = usage(tmp_path, "--by", "key").stdout
    assert "\x1b" not in table
    assert "\\x1b[31mred" in table


def test_a_narrow_terminal_breaks_no_key_or_day(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/metering/ledger.sqlite")
    ledger.apply([batch("a", 1, 6, key="70zriuf6ni90")])
    ledger.close()
    lines = usage(tmp_path, "--by", "key,day,model,hardware").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("70zriuf6ni90" in line and "2026-09-21" in line for line in lines)


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    done = usage(folder, "--prices", "prices.yaml")
    assert (done.returncode, "no price in EUR for l4 on 2026-09-21" in done.stderr) == (2, True)
    done = usage(folder, "--by", "kye")
    assert (done.returncode, "did you mean key?" in done.stderr) == (2, True)
    done = usage(folder, "--since", "yesterday")
    assert (done.returncode, "'yesterday' is not a time" in done.stderr) == (2, True)
    done = usage(folder, "--ledger", "sqlite:///none.sqlite")
    assert (done.returncode, "no ledger at none.sqlite" in done.stderr) == (2, True)
