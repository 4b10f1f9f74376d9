"""Where `inferctl keys` keeps keys: in a file or a database. Tells the servers of a fleet about changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl import passwords
from inferctl.cli import console
from inferctl.errors import NotReadyError, UsageError, install_hint

if TYPE_CHECKING:
    from inferctl.access.key_file import ApiKey
    from inferctl.fleet.key_store import KeyStore
    from inferctl.spec import Access

_PUBLISH_S = 2.0


class Place:
    """The keys of one section `access`. `name`: of the file or the database, without a password."""

    def __init__(self, settings: Access) -> None:
        self._settings = settings
        self.name = passwords.hide(settings.keys or "")

    @property
    def file(self) -> Path | None:
        """The file with the keys; None if they are in a database server."""
        address = self._settings.keys or ""
        file = address.removeprefix("sqlite:///")
        return None if self._settings.key_store and file == address else Path(file)

    def read(self) -> list[ApiKey]:
        """Return all keys. Raises `UsageError` and `NotReadyError`."""
        if self._settings.key_store:
            with self._store(create=False) as store:
                return store.read()[0].keys
        from inferctl.access import key_file

        return key_file.read(Path(self._settings.keys or "")).keys

    @contextlib.contextmanager
    def edit(self, *, create: bool = False, deliver: Callable[[], None] = lambda: None) -> Iterator[dict[str, ApiKey]]:
        """Yield the keys by id, and write them when the body ends. `create`: a missing file has no keys.

        `deliver` is called just before the keys become valid. If it raises, nothing changes.
        """
        if self._settings.key_store:
            with self._store(create=create) as store, store.edit(deliver) as found:
                yield found
            return
        from inferctl.access import key_file

        with key_file.edit(Path(self._settings.keys or ""), create=create, deliver=deliver) as found:
            yield found

    def publish(self, revoked: list[str]) -> None:
        """Tell the workers of all servers that keys changed, if they have a broker. Otherwise they find out later."""
        if not self._settings.broker:
            return
        try:
            from inferctl.fleet import broker

            asyncio.run(broker.publish_change(self._settings.broker, revoked, _PUBLISH_S))
        except ModuleNotFoundError as error:
            console.warn(f"servers do not hear of the change at once, because {error.name} is not installed")
        except NotReadyError as error:
            console.warn(f"servers do not hear of the change at once: {error.message}")

    @contextlib.contextmanager
    def _store(self, *, create: bool) -> Iterator[KeyStore]:
        if not create and self.file and not self.file.exists():
            raise UsageError(f"there is no key store at {self.file}", "make one with `inferctl keys create NAME`")
        try:
            from inferctl.fleet.key_store import KeyStore
        except ModuleNotFoundError as error:
            raise NotReadyError(
                f"keys in a database require the package {error.name}, not installed", install_hint("ledger")
            ) from None
        store = KeyStore.open(self._settings.keys or "")
        try:
            yield store
        finally:
            store.close()
