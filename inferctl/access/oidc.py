"""Tokens of an OIDC provider (JWT), checked with keys that a thread fetches: no request waits for the provider.

While the provider does not respond, the last keys stay in use. A verified token is known by its hash until it ends.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt

from inferctl.access import keys
from inferctl.access.key_file import ApiKey, caller, is_caller_id
from inferctl.access.key_table import Entry, UnavailableError

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "ES512", "EdDSA"]
_REQUIRED = ["exp", "aud", "iss", "sub"]
_REFRESH_S = 300.0
_RETRY_S = 5.0  # after a failed fetch
_UNKNOWN_KEY_S = 30.0  # between two fetches because of tokens with unknown keys
_TIMEOUT_S = 5.0
_MAX_BYTES = 1_000_000
_MAX_TOKEN_BYTES = 16 * 1024
_MAX_SUBJECT = 200
_MAX_KNOWN = 10_000
# A signature takes 80 to 150 us. More new tokens than this are rejected until the next second.
_CHECKS_PER_S = 1000


class TokenTable:
    """The tokens of one issuer. `jwks`: URL or file of its keys; None to ask the issuer where they are."""

    def __init__(self, issuer: str, audience: str, jwks: str | None, warn: Callable[[str], None]) -> None:
        self._issuer, self._audience, self._jwks, self._warn = issuer, audience, jwks, warn
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._known: dict[bytes, Entry] = {}
        self._checks, self._second = 0, 0
        self._wanted, self._closed = threading.Event(), False
        self._failed = False

    def find(self, credential: bytes, now: float) -> ApiKey | None:
        """Return who sent a token; None if it is not valid. Raises `UnavailableError`."""
        if len(credential) > _MAX_TOKEN_BYTES:
            return None
        digest = keys.digest(credential)
        if entry := self._known.get(digest):
            if now < entry.not_after:
                return entry.key
            del self._known[digest]
            return None
        if self._keys is None:
            raise UnavailableError("the keys of the token issuer are not known yet")
        if int(now) != self._second:
            self._second, self._checks = int(now), 0
        if self._checks >= _CHECKS_PER_S:
            raise UnavailableError("too many new tokens arrive")
        claims = self._verified(credential)
        if claims is None:
            return None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        entry = self._known[digest] = Entry(caller(claims["sub"]), float(claims["exp"]))
        return entry.key

    def _verified(self, credential: bytes) -> dict[str, Any] | None:
        try:
            key_id = jwt.get_unverified_header(credential).get("kid")
            key = (self._keys or {}).get(key_id or "")
            if key is None:
                self._wanted.set()
                return None
            self._checks += 1
            claims = jwt.decode(
                credential,
                key,
                algorithms=_ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                options={"require": _REQUIRED},
            )
        except jwt.PyJWTError:
            return None
        subject = claims["sub"]
        return claims if isinstance(subject, str) and len(subject) <= _MAX_SUBJECT and is_caller_id(subject) else None

    def follow(self) -> None:
        """Fetch the keys of the issuer now and then, on a thread, until `close`."""
        threading.Thread(target=self._follow, name="jwks", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._wanted.set()

    def _follow(self) -> None:
        while not self._closed:
            started = time.monotonic()
            try:
                self._keys = {key.key_id or "": key for key in jwt.PyJWKSet.from_dict(self._fetch()).keys}
                self._failed = False
            except Exception as error:  # noqa: BLE001  # without this thread, no new key would be known
                if not self._failed:
                    self._warn(f"the keys of {self._issuer} cannot be read: {type(error).__name__}; trying again")
                self._failed = True
            if self._failed:
                time.sleep(_RETRY_S)
                continue
            self._wanted.wait(_REFRESH_S)
            if not self._closed and (pause := started + _UNKNOWN_KEY_S - time.monotonic()) > 0:
                time.sleep(pause)
            self._wanted.clear()

    def _fetch(self) -> dict[str, Any]:
        where = self._jwks
        if where is None:
            where = str(_json(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")["jwks_uri"])
        return _json(where)


def _json(where: str) -> dict[str, Any]:
    """Return a JSON object from a URL or a file. Raises `OSError` or `ValueError`."""
    if where.startswith(("https://", "http://")):
        with urllib.request.urlopen(where, timeout=_TIMEOUT_S) as response:
            content = response.read(_MAX_BYTES)
    else:
        content = Path(where).read_bytes()
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
