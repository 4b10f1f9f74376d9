"""Fixtures of the tests of fleets: the real NATS and PostgreSQL."""

from __future__ import annotations

from tests.tenancy.metering.conftest import ledger_url as address  # noqa: F401  # of a store, too
from tests.tenancy.metering.conftest import nats, postgres  # noqa: F401  # fixtures
