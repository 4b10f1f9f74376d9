"""Fixtures of the tests of metering: ledgers in the real databases, and the real broker."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferctl.tenancy.metering.ledger import Ledger
from tests.required import missing
from tests.tenancy.parts import Nats, Postgres


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A running PostgreSQL. Skips without one, or fails with INFERCTL_REQUIRE=services."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        missing("services", "PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("p")
    started = Postgres(folder / "pg")
    started.start()
    yield started
    started.kill()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[Nats]:
    """A running NATS server. Skips without one, or fails with INFERCTL_REQUIRE=services."""
    if not shutil.which("nats-server"):
        missing("services", "nats-server is not installed")
    started = Nats(tmp_path / "nats")
    started.start()
    yield started
    started.kill()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database for a new ledger or store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/data.sqlite"
    started: Postgres = request.getfixturevalue("postgres")
    return started.url()


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    """A new ledger."""
    opened = Ledger.open(ledger_url)
    yield opened
    opened.close()
