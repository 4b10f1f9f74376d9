"""The keys in memory: SHA-256 of a key -> who it is. A thread reads the key file again when it changes.

A request costs one hash and one look-up in a dict, so there is nothing to time and no store to ask.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from inferctl.core.errors import UsageError
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey, KeyFile

INTERVAL_S = 0.25
# A key has 63 to 84 characters. Longer texts are not hashed.
_MAX_LENGTH = 128
_MANY_REVOKED = 100_000


class UnavailableError(Exception):
    """A credential cannot be checked now. A retry after some seconds may succeed."""


class Entry(NamedTuple):
    """What a key opens, until `not_after` (Unix time)."""

    key: ApiKey
    not_after: float


class KeyTable:
    """The keys of one file. `warn` gets a line if the file is no longer valid; the last valid content stays in use.

    `awaited`: the relay writes the file, which may not exist yet. `ready`: it was read.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], *, awaited: bool = False) -> None:
        """Raises `UsageError` if the file is missing or not valid."""
        self._path, self._warn = path, warn
        self._version = self._stat()
        self._closed = threading.Event()
        self._revoked: dict[str, None] = {}
        self._entries: dict[bytes, Entry] = {}
        self._ids: dict[str, Entry] = {}
        self.ready = self.shared = False
        if not awaited or self._version:
            self._load(key_file.read(path))

    def find(self, credential: bytes, now: float) -> ApiKey | None:
        """Return the key that a client sent; None if it is unknown, revoked or expired. Raises `UnavailableError`."""
        if len(credential) > _MAX_LENGTH:
            return None
        return self._valid(self._entries.get(keys.digest(credential)), now)

    def find_id(self, key_id: str, now: float) -> ApiKey | None:
        """Return the key with an id; None if `find` would accept no credential of it. Raises `UnavailableError`."""
        return self._valid(self._ids.get(key_id), now)

    def _valid(self, entry: Entry | None, now: float) -> ApiKey | None:
        if not self.ready:
            raise UnavailableError("the keys are not known yet")
        if entry is None or now >= entry.not_after or entry.key.id in self._revoked:
            return None
        return entry.key

    def revoke(self, ids: Iterable[str]) -> None:
        """Reject these keys from now on, also if the file, or an older copy of it, still has them."""
        self._revoked |= dict.fromkeys(ids)
        # Who can publish could send any number. The file says the same of those that are forgotten.
        while len(self._revoked) > _MANY_REVOKED:
            del self._revoked[next(iter(self._revoked))]

    def follow(self) -> None:
        """Read the file again when it changes, on a thread, until `close`."""
        threading.Thread(target=self._follow, name="keys", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _load(self, content: KeyFile) -> None:
        entries = {}
        for key in content.keys:
            if key.revoked is None:
                for stored in key.digests:
                    end = min(_seconds(key.expires), _seconds(stored.not_after))
                    entries[bytes.fromhex(stored.sha256)] = Entry(key, end)
        self._entries = entries
        # Of several digests, the last one is accepted longest.
        self._ids = {entry.key.id: entry for entry in sorted(entries.values(), key=lambda entry: entry.not_after)}
        # With a single key, there is nobody to share the queue with.
        self.shared = sum(key.revoked is None for key in content.keys) > 1
        self.ready = True

    def _follow(self) -> None:
        warned: list[tuple[int, ...] | None] = []  # the version that could not be read, if any
        while not self._closed.wait(INTERVAL_S):
            version = self._stat()
            if version == self._version:
                continue
            try:
                self._load(key_file.read(self._path))
            except Exception as error:  # noqa: BLE001  # without this thread, no key could be revoked
                # The file is read again until that succeeds: a missing descriptor must not keep a revoked key valid.
                if not warned or warned[0] != version:
                    reason = f"the key file {self._path} cannot be loaded: {type(error).__name__}"
                    reason = error.message if isinstance(error, UsageError) else reason
                    self._warn(f"{reason}; the last valid keys stay in use")
                warned = [version]
            else:
                self._version, warned = version, []

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _seconds(time: datetime | None) -> float:
    return time.timestamp() if time else math.inf
