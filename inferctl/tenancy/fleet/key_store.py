"""The keys of a fleet in SQLite or PostgreSQL, which `inferctl keys` edits and relays read. A server asks no store.

A key is one row, whose content is the same JSON as in a key file. So it has hashes, and no key.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa
from pydantic import ValidationError

from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import UsageError
from inferctl.tenancy.access.key_file import ApiKey, KeyFile
from inferctl.tenancy.database import Schema, file_of

_SCHEMA = Schema("the key store", Path(__file__).with_name("migrations"), "api_key_version")
_metadata = sa.MetaData()
_KEYS = sa.Table(
    "api_keys",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("content", sa.String, nullable=False),
)
# One row: how many changes there were.
_CHANGES = sa.Table("api_key_changes", _metadata, sa.Column("number", sa.BigInteger, nullable=False))


class KeyStore:
    """An open store. All methods raise `DatabaseUnavailableError`."""

    def __init__(self, engine: sa.Engine, address: DatabaseAddress) -> None:
        self._engine, self._address = engine, address

    @classmethod
    def open(cls, address: DatabaseAddress | str) -> KeyStore:
        """Open the store, and create or migrate its tables.

        Raises `UsageError` for an invalid URL, tables of a newer version, and a file that others can write.
        """
        address = DatabaseAddress(address)
        if file := file_of(address):
            with _SCHEMA.reported(address):
                _protect(file)
        return cls(_SCHEMA.open(address), address)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def changes(self) -> int:
        """Return how many changes there were."""
        with self._transaction() as connection:
            return int(connection.execute(sa.select(_CHANGES.c.number)).scalar_one())

    def read(self) -> tuple[KeyFile, int]:
        """Return all keys, and how many changes led to them. Raises `UsageError` for a key of another version."""
        with self._transaction() as connection:
            number = int(connection.execute(sa.select(_CHANGES.c.number)).scalar_one())
            return KeyFile(keys=list(self._all(connection).values())), number

    @contextlib.contextmanager
    def edit(self, deliver: Callable[[], None] = lambda: None) -> Iterator[dict[str, ApiKey]]:
        """Yield the keys by id, and store those that changed when the body ends. One edit runs at a time.

        `deliver` is called just before the keys become valid. If it raises, nothing changes.
        """
        with self._transaction() as connection:
            # The first statement locks the row, so what the second one reads stays the newest.
            connection.execute(sa.update(_CHANGES).values(number=_CHANGES.c.number + 1))
            before = self._all(connection)
            found = dict(before)
            yield found
            changed = [key for key in found.values() if before.get(key.id) is not key]
            if changed:
                connection.execute(sa.delete(_KEYS).where(_KEYS.c.id.in_([key.id for key in changed])))
                rows = [{"id": key.id, "content": key.model_dump_json(exclude_none=True)} for key in changed]
                connection.execute(sa.insert(_KEYS), rows)
            deliver()

    def _all(self, connection: sa.Connection) -> dict[str, ApiKey]:
        try:
            rows = connection.execute(sa.select(_KEYS).order_by(_KEYS.c.id))
            return {row.id: ApiKey.model_validate_json(row.content) for row in rows}
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(
                f"the key store has a key that is not valid: {where}: {first['msg']}",
                "`inferctl keys` writes it; another version of inferctl may have changed it",
            ) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with _SCHEMA.reported(self._address), self._engine.begin() as connection:
            yield connection


def _protect(file: Path) -> None:
    """Make a file that only its owner can read and write. Raises `UsageError` if others can write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        hint = f"run `chmod go-w {shlex.quote(str(file))}`"
        raise UsageError(f"the key store {file} can be written by other users, who could add keys", hint)
