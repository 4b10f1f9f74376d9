"""What three real servers spend of budgets until nothing is left: a small run of benchmarks/peers/budgets.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tenancy.parts import Nats, Postgres

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks" / "peers"))


def test_three_servers_spend_budgets_to_the_cent(
    nats: Nats, postgres: Postgres, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import budgets

    fleet = budgets.Fleet(tmp_path, minilm, nats, postgres, monkeypatch.setenv)
    try:
        figures, wrong = budgets.measure(fleet, requests=200, keys=2, pause_s=None)
    finally:
        fleet.end()
    assert not wrong, figures
