"""What a worker does for keys and limits: the relay between servers, and the copy of the key store on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Any

from inferctl import outputs
from inferctl.errors import NotReadyError, UsageError
from inferctl.fleet.key_store import KeyStore
from inferctl.metering import outbox
from inferctl.spec import Access

log = logging.getLogger("inferctl.worker")

_ONLY_WORKER_S = 0.5
# How often a worker asks the key store for changes. With a broker, it also does at each message.
_ASK_S = 1.0


class AccessWorker:
    """The worker of one folder `access.data`."""

    def __init__(self, settings: Access) -> None:
        self._settings, self._folder = settings, Path(settings.data)
        self._changed = asyncio.Event()

    async def run(self, ending: asyncio.Event) -> None:
        """Work until `ending`. Raises `UsageError` for an invalid address, `OSError` if the folder is not writable."""
        while not ending.is_set():
            with outbox.exclusive(self._folder) as alone:
                if alone:
                    await self._work(ending)
                    return
            # The worker of another server in this folder also serves this one.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), _ONLY_WORKER_S)

    async def _work(self, ending: asyncio.Event) -> None:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(ending.wait())]
        if self._settings.broker:
            from inferctl.worker.relay import Relay

            relay = Relay(self._folder, self._settings.broker, self._changed.set)
            tasks.append(asyncio.create_task(relay.run()))
        if address := self._settings.key_store:
            tasks.append(asyncio.create_task(self._copy_keys(address)))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _copy_keys(self, address: str) -> None:
        """Write the keys to the file that the servers read, whenever they change."""
        copy = _Copy(address, Path(self._settings.key_file or ""))
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
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _ASK_S)
        finally:
            copy.close()


class _Copy:
    """A key file with the content of a key store."""

    def __init__(self, address: str, file: Path) -> None:
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
        outputs.replace(self._file, content.model_dump_json(exclude_none=True) + "\n", mode=0o600)
        self._changes = changes

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()
