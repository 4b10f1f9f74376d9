"""Where `inferctl keys` keeps keys: in a file or a database. Tells the servers of a fleet about changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.cli import console
from inferctl.config.spec import Access
from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import NotReadyError, UsageError, needs_packages
from inferctl.tenancy.access import key_file
from inferctl.tenancy.access.key_file import ApiKey

if TYPE_CHECKING:
    from inferctl.tenancy.fleet.key_store import KeyStore

_PUBLISH_S = 2.0


class Place:
    """The keys of one section `access`. `name`: of the file or the database, without a password."""

    def __init__(self, settings: Access) -> None:
        self._settings = settings
        self.name = str(settings.keys or "")

    @property
    def file(self) -> Path | None:
        """The file with the keys; None if they are in a database server."""
        address = self._settings.key_store
        return _file_of(address) if address else Path(self.name)

    def read(self) -> list[ApiKey]:
        """Return all keys. Raises `UsageError` and `NotReadyError`."""
        if address := self._settings.key_store:
            with _store(address, create=False) as store:
                return store.read()[0].keys

        return key_file.read(Path(self.name)).keys

    @contextlib.contextmanager
    def edit(self, *, create: bool = False, deliver: Callable[[], None] = lambda: None) -> Iterator[dict[str, ApiKey]]:
        """Yield the keys by id, and write them when the body ends. `create`: a missing file has no keys.

        `deliver` is called just before the keys become valid. If it raises, nothing changes.
        """
        if address := self._settings.key_store:
            with _store(address, create=create) as store, store.edit(deliver) as found:
                yield found
            return

        with key_file.edit(Path(self.name), create=create, deliver=deliver) as found:
            yield found

    def publish(self, revoked: list[str]) -> None:
        """Tell the relays of all servers that keys changed, if they have a broker. Otherwise they find out later."""
        if not self._settings.broker:
            return
        try:
            from inferctl.tenancy.fleet import broker

            asyncio.run(broker.publish_change(self._settings.broker, revoked, _PUBLISH_S))
        except ModuleNotFoundError as error:
            console.warn(f"servers do not hear of the change at once, because {error.name} is not installed")
        except NotReadyError as error:
            console.warn(f"servers do not hear of the change at once: {error.message}")


def _file_of(address: DatabaseAddress) -> Path | None:
    with needs_packages("a database of keys", "ledger"):
        from inferctl.tenancy.database import file_of
    return file_of(address)


@contextlib.contextmanager
def _store(address: DatabaseAddress, *, create: bool) -> Iterator[KeyStore]:
    with needs_packages("a database of keys", "ledger"):
        from inferctl.tenancy.fleet.key_store import KeyStore
    if not create and (file := _file_of(address)) and not file.exists():
        raise UsageError(f"there is no key store at {file}", "make one with `inferctl keys create NAME`")
    store = KeyStore.open(address)
    try:
        yield store
    finally:
        store.close()
