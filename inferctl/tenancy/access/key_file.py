"""The key file: JSON with the names, scopes, limits and hashes of all keys. It has no key, so a copy opens nothing.

Who can write the file can add a key, so it must not be writable for others than its owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from inferctl.config.budget import PATTERN
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.tenancy.access import keys

_MAX_BYTES = 64 * 1024 * 1024
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NEVER = datetime.min.replace(tzinfo=UTC)
Priority = Literal["interactive", "bulk"]
Status = Literal["active", "expired", "revoked"]


class _Record(BaseModel):
    # An older version must not ignore a restriction that it does not know.
    model_config = ConfigDict(extra="forbid", frozen=True)


def _printable(text: str) -> str:
    if not text.isprintable():  # PostgreSQL stores no NUL, so it would stop the ledger
        raise ValueError("must have printable characters only")
    return text


class StoredDigest(_Record):
    """The SHA-256 (hex) of one key, which is accepted until `not_after`."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    not_after: AwareDatetime | None = None


class ApiKey(_Record):
    """One API key. A key that was rotated has several digests for some time.

    `team`: who pays for its usage. `models`, `endpoints`: the names that it may use, None for all. `admin`: whether it
    may read metrics, documentation and the description of the server. `priority`: `bulk` makes each of its requests a
    bulk request. Limits: None for the default of the server.
    """

    id: Annotated[str, Field(pattern=rf"^{keys.ID}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    team: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_printable)] | None = None
    digests: list[StoredDigest]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    models: list[str] | None = None
    endpoints: list[str] | None = None
    admin: bool = False
    priority: Priority = "interactive"
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    budget: Annotated[str, Field(pattern=PATTERN)] | None = None

    def status(self, now: datetime) -> Status:
        """Return whether the key is accepted at `now`."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and self.expires <= now else "active"


class KeyFile(_Record):
    """The content of a key file."""

    version: Literal[1] = 1
    keys: list[ApiKey] = []

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def read(path: Path) -> KeyFile:
    """Return the content of a key file. Raises `UsageError`, whose text has no value of the file."""
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        command = f"inferctl keys create NAME --keys {shlex.quote(str(path))}"
        hint = f"write one with `{command}`" if isinstance(error, FileNotFoundError) else None
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the key file {path} cannot be read: {reason}", hint) from None
    if mode & _WRITABLE_BY_OTHERS:
        raise UsageError(
            f"the key file {path} has mode {stat.S_IMODE(mode):o}: others could add keys", f"run `chmod go-w {path}`"
        )
    if len(content) > _MAX_BYTES:
        raise UsageError(f"the key file {path} is larger than {_MAX_BYTES:,} bytes")
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # An unknown field has the name that an edit by hand gave it. A terminal would obey escapes.
        where = ".".join(map(str, first["loc"])).encode("unicode_escape").decode()
        raise UsageError(
            f"the key file {path} is not valid: {where + ': ' if where else ''}{first['msg']}",
            "`inferctl keys` writes it; an edit by hand, or another version of inferctl, may have changed it",
        ) from None


def keep_ended(found: KeyFile, before: KeyFile) -> tuple[KeyFile, list[str]]:
    """Return `found`, in which no key lives longer than `before` says, and the ids of keys that did.

    No command takes back that a key was revoked or rotated. So those come from a store that was restored from a backup.
    """
    revoked = {key.id: key.revoked for key in before.keys if key.revoked}
    ends = {each.sha256: each.not_after for key in before.keys for each in key.digests if each.not_after}
    kept, revived = [], []
    for key in found.keys:
        if key.revoked is None:
            digests = [
                each.model_copy(update={"not_after": end})
                if (end := ends.get(each.sha256)) and (each.not_after is None or each.not_after > end)
                else each
                for each in key.digests
            ]
            if key.id in revoked or digests != key.digests:
                revived.append(key.id)
                key = key.model_copy(update={"revoked": revoked.get(key.id), "digests": digests})
        kept.append(key)
    return KeyFile(keys=kept), revived


@contextlib.contextmanager
def edit(
    path: Path, *, create: bool = False, deliver: Callable[[], None] = lambda: None
) -> Iterator[dict[str, ApiKey]]:
    """Yield the keys by id, and write them to the file when the body ends. `create`: a missing file has no keys.

    `deliver` is called just before the keys become valid. If it raises, nothing changes. Two commands at the same time
    do not lose each other's change. Raises `UsageError` for a file that is not valid, `OSError` if it is not writable.
    """
    path = path.resolve()  # a link stays a link
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.exists():
        read(path)  # raises
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        current = KeyFile() if create and not path.exists() else read(path)
        found = {key.id: key for key in current.keys}
        yield found
        changed = KeyFile(keys=list(found.values()))
        content = changed.model_dump_json(indent=1, exclude_none=True) + "\n"
        outputs.replace(path, content, mode=0o600, before=deliver)
        os.fsync(folder)
    finally:
        os.close(folder)


def is_caller_id(text: str) -> bool:
    """Return whether `text` can name a caller: not empty, and without control characters and lone surrogates.

    The latter are no UTF-8, so no event can be written with them. PostgreSQL stores no NUL, and terminals obey escapes.
    """
    return text != "" and text.isprintable()


def caller(caller_id: str) -> ApiKey:
    """Return a caller that is not in the file, but known by a token or a proxy. It has the limits of the server."""
    return ApiKey.model_construct(id=caller_id, name=caller_id, digests=[], created=_NEVER)


def now() -> datetime:
    """Return the time in UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
