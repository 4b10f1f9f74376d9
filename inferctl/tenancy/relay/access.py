"""What a relay does for keys and limits: the relay between servers, and the copy of the key store on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from inferctl.config.spec import Access
from inferctl.core import outputs
from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.tenancy.access import key_file
from inferctl.tenancy.fleet.key_store import KeyStore
from inferctl.tenancy.metering import outbox

log = logging.getLogger("inferctl.relay")

# Not the lock of usage events: `metering.data` may be the same folder, with another relay.
_EXCHANGE_LOCK = "access.lock"
_ONLY_RELAY_S, _LOG_AFTER = 0.5, 4
# How often a relay asks the key store for changes. With a broker, it also does at each message.
_ASK_S = 1.0
_PAUSE_S = 0.1  # between two questions, however many messages arrive
_SHOWN = 20  # ids of keys in a message


class AccessRelay:
    """The relay of one folder `access.data`."""

    def __init__(self, settings: Access) -> None:
        self._settings, self._folder = settings, Path(settings.data)
        self._changed = asyncio.Event()

    async def run(self, ending: asyncio.Event) -> None:
        """Work until `ending`. Raises `UsageError` for an invalid address, `OSError` if the folder is not writable."""
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(ending.wait())]
        if url := self._settings.broker:
            from inferctl.tenancy.relay.exchange import ExchangeRelay

            relay = ExchangeRelay(self._folder, url, self._changed.set)
            tasks.append(asyncio.create_task(self._alone(_EXCHANGE_LOCK, relay.run)))
        if address := self._settings.key_store:
            file = Path(self._settings.key_file or "")
            # One lock for each database: the relay of another one must not keep this one from copying.
            copying = self._alone(f"{file.stem}.lock", lambda: self._copy_keys(address, file))
            tasks.append(asyncio.create_task(copying))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _alone(self, lock: str, work: Callable[[], Awaitable[None]]) -> None:
        """Work while this process has the lock. If another one has it, its relay also serves this folder."""
        for attempt in itertools.count():
            with outbox.exclusive(self._folder, lock) as alone:
                if alone:
                    await work()
                    return
            if attempt == _LOG_AFTER:
                log.warning("another relay has %s; this one waits for its end", self._folder / lock)
            await asyncio.sleep(_ONLY_RELAY_S)

    async def _copy_keys(self, address: DatabaseAddress, file: Path) -> None:
        """Write the keys to the file that the servers read, whenever they change."""
        copy = _Copy(address, file)
        failed = False
        try:
            while True:
                self._changed.clear()
                try:
                    await asyncio.to_thread(copy.update)
                    failed = False
                except (NotReadyError, UsageError, OSError) as error:
                    if not failed:
                        log.warning("%s; the last keys stay in use", getattr(error, "message", error))
                    failed = True
                await asyncio.sleep(_PAUSE_S)
                # Not `wait_for`: in Python 3.11 it ignores a cancellation that comes at the same moment as the change.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ASK_S):
                        await self._changed.wait()
        finally:
            copy.close()


class _Copy:
    """A key file with the content of a key store."""

    def __init__(self, address: DatabaseAddress, file: Path) -> None:
        self._address, self._file = address, file
        self._store: KeyStore | None = None
        self._changes: int | None = None

    def update(self) -> None:
        """Write the file if the keys changed. Raises `NotReadyError`, `UsageError` and `OSError`."""
        if self._store is None:
            self._store = KeyStore.open(self._address)
        if self._store.changes() == self._changes and self._file.exists():
            return
        content, changes = self._store.read()
        with contextlib.suppress(UsageError):  # there is no copy yet, or another program wrote it
            content, revived = key_file.keep_ended(content, key_file.read(self._file))
            self._report(revived, changes)
        outputs.replace(self._file, content.model_dump_json(exclude_none=True) + "\n", mode=0o600)
        self._changes = changes

    def _report(self, revived: list[str], changes: int) -> None:
        """Log that the store was restored from a backup, if so."""
        if self._changes is not None and changes < self._changes:
            log.error(
                "THE KEY STORE WENT BACK from change %d to %d, as after a restored backup; it lacks later keys",
                self._changes,
                changes,
            )
        if revived:
            log.error(
                "THE KEY STORE HAS KEYS THAT WERE REVOKED OR ROTATED BEFORE, as after a restored backup. This machine "
                "still rejects them, others may not: run `inferctl keys revoke %s`%s",
                " ".join(revived[:_SHOWN]),
                f" and {len(revived) - _SHOWN:,} more" if len(revived) > _SHOWN else "",
            )

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()
