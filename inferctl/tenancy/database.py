"""SQLite and PostgreSQL: addresses, connections, errors without passwords, and migrations by Alembic."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import NotReadyError, UsageError

_MIGRATION_LOCK = 0x696E6665
# Alembic keeps the connection of an upgrade in globals, and a relay opens its ledger and its keys in two threads.
# Without the lock, tables would be missing that the version table calls complete.
_UPGRADE = threading.Lock()


class DatabaseUnavailableError(NotReadyError):
    """The database cannot be reached, or it reports an error. The same call may succeed later."""


@dataclass(frozen=True)
class Schema:
    """The tables of one part of inferctl. `what`: its name in messages. `migrations`: the folder of Alembic."""

    what: str
    migrations: Path
    version_table: str

    def open(self, address: DatabaseAddress) -> sa.Engine:
        """Connect for writing, and create or migrate the tables.

        Raises `UsageError` for tables of a newer version, and `DatabaseUnavailableError`.
        """
        if file := file_of(address):
            with self.reported(address):
                file.parent.mkdir(parents=True, exist_ok=True)
        engine = self.engine(address)
        with self.reported(address), engine.begin() as connection:
            self._migrate(connection)
        return engine

    def engine(self, address: DatabaseAddress) -> sa.Engine:
        """Return what connects to `address`.

        Raises `NotReadyError` without the driver of PostgreSQL, `UsageError` for a parameter that no driver can read.
        """
        try:
            return self._engine(address)
        except (sa.exc.ArgumentError, ValueError):  # its text may quote the address
            hint = "check the hosts and ports of the address, and the numbers in its query"
            raise UsageError(f"the address of {self.what} is not valid: {address}", hint) from None

    def _engine(self, address: DatabaseAddress) -> sa.Engine:
        url = _url(address)
        if not address.is_file:
            # A host that is gone without a word is noticed within 15 s, not after the hours of the defaults.
            options: dict[str, Any] = {"connect_timeout": 5, "tcp_user_timeout": 15_000}  # s, ms
            options |= {"keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3}
            # What the address says comes first: its `options` may have the schema of the tables.
            options = {name: value for name, value in options.items() if name not in url.query}
            given = url.normalized_query.get("options", ())
            options["options"] = " ".join(["-c statement_timeout=30000", *given])
            try:
                return sa.create_engine(url, connect_args=options, pool_pre_ping=True)
            except ModuleNotFoundError as error:
                raise NotReadyError(
                    f"{self.what} in PostgreSQL requires the package {error.name}",
                    "install it with `pip install psycopg`",
                ) from None
        engine = sa.create_engine(url, connect_args={"timeout": 10.0})

        # The driver would begin a transaction only with the first insert, after the first select.
        @sa.event.listens_for(engine, "connect")
        def _connected(connection: Any, _: Any) -> None:
            connection.isolation_level = None
            # Not WAL, which two writers can corrupt in versions of SQLite that are still common. FULL: see `Outbox`.
            connection.execute("pragma journal_mode = delete")
            connection.execute("pragma synchronous = full")

        @sa.event.listens_for(engine, "begin")
        def _begun(connection: sa.Connection) -> None:
            connection.exec_driver_sql("begin immediate")

        return engine

    @contextlib.contextmanager
    def reported(self, address: DatabaseAddress) -> Iterator[None]:
        """Raise `DatabaseUnavailableError` for errors of the database, without its password."""
        try:
            yield
        except (sa.exc.SQLAlchemyError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            message = f"{self.what} {address} is not available: {reason}"
            raise DatabaseUnavailableError(message, "check the address and that the database runs") from None

    def versions(self, connection: sa.Connection) -> tuple[str | None, str | None]:
        """Return the version of the tables, and the one that this inferctl needs."""
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        context = MigrationContext.configure(connection, opts={"version_table": self.version_table})
        return context.get_current_revision(), ScriptDirectory.from_config(self._config()).get_current_head()

    def _config(self) -> Any:
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(self.migrations).replace("%", "%%"))
        return config

    def _migrate(self, connection: sa.Connection) -> None:
        """Create the tables, or change them to what this version needs."""
        from alembic import command
        from alembic.util.exc import CommandError

        if connection.dialect.name == "postgresql":  # relays of several machines may start at the same time
            connection.execute(sa.text(f"select pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        config = self._config()
        config.attributes |= {"connection": connection, "version_table": self.version_table}
        try:
            with _UPGRADE:
                command.upgrade(config, "head")
        except CommandError:  # the tables have a version that this inferctl does not know
            raise UsageError(f"{self.what} was made by a newer version of inferctl", "update inferctl") from None


def file_of(address: DatabaseAddress) -> Path | None:
    """Return the file of a database in SQLite; None for PostgreSQL and a database in memory."""
    database = _url(address).database if address.is_file else None
    return Path(database) if database else None


def _url(address: DatabaseAddress) -> URL:
    url = make_url(address.secret())
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
