"""Adds keys to key files, for the tests of all rooms."""

from __future__ import annotations

from pathlib import Path

from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey, StoredDigest


def add(path: Path, name: str = "a", **fields: object) -> tuple[ApiKey, str]:
    """Add a key to a file, and return it with its text."""
    key_id = keys.new_id()
    secret = keys.generate(key_id)
    stored = StoredDigest(sha256=keys.digest(secret.encode()).hex())
    key = ApiKey.model_validate({"id": key_id, "name": name, "digests": [stored], "created": key_file.now(), **fields})
    with key_file.edit(path, create=True) as found:
        found[key_id] = key
    return key, secret
