"""The format of an API key: `ik_<environment>_<id>_<secret><checksum>`.

The secret has 256 random bits, so a plain SHA-256 of the key is enough to store: nobody can try them all. The checksum
finds typing errors and truncated copies without the key file. A scanner for leaked keys can search for `PATTERN`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import zlib

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43  # 62 ** 43 > 2 ** 256
_CHECKSUM_LENGTH = 6  # 62 ** 6 > 2 ** 32
_ID_LENGTH = 12
ID = rf"[a-z0-9]{{{_ID_LENGTH}}}"
PREFIX = "ik_"
# New keys have the word `live`. Those of earlier versions can have another one.
PATTERN = rf"{PREFIX}[a-z0-9]{{1,16}}_({ID})_[0-9A-Za-z]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}"


def new_id() -> str:
    """Return a random id, which names a key in commands, events and reports."""
    return "".join(secrets.choice(_DIGITS[:10] + _DIGITS[36:]) for _ in range(_ID_LENGTH))


def generate(key_id: str) -> str:
    """Return a new key with this id."""
    body = f"{PREFIX}live_{key_id}_{_base62(secrets.randbits(256), _SECRET_LENGTH)}"
    return body + _checksum(body)


def parse(key: str) -> str | None:
    """Return the id in a key; None if the text is no key, or its checksum does not match."""
    found = re.fullmatch(PATTERN, key)
    return found[1] if found and _checksum(key[:-_CHECKSUM_LENGTH]) == key[-_CHECKSUM_LENGTH:] else None


def digest(key: bytes) -> bytes:
    """Return what is stored of a key: its SHA-256."""
    return hashlib.sha256(key).digest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
