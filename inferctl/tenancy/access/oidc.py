"""Tokens of an OIDC provider (JWT), checked with keys that a thread fetches: no request waits for the provider.

While the provider does not respond, the last keys stay in use. A verified token is known by its hash until it ends.
Everything that costs little is checked before the signature, which costs 80 to 150 us of the event loop. Clients that
send wrong signatures have a budget of their own, so they cannot use up the one of the others.
"""

from __future__ import annotations

import ipaddress
import json
import math
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt

from inferctl.tenancy.access import keys
from inferctl.tenancy.access.key_file import ApiKey, caller, is_caller_id
from inferctl.tenancy.access.key_table import BusyError, Entry, UnavailableError

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
# The clocks of the issuer and of this server differ: by so much, a token may begin later and end earlier.
_LEEWAY_S = 30.0
_TIMES = ("exp", "nbf", "iat")
_LATEST = 2**53  # a larger time is not exact in JSON, and the largest ones are not even a float
# New tokens whose signatures are checked. More of them are rejected until the next second.
_CHECKS_PER_S = 1000
# The same for all clients together that sent a wrong signature in the last minute.
_SUSPECT_CHECKS_PER_S, _SUSPECT_S = 300, 60.0
# A /48 is suspect too if so many of its /64 networks are: one customer of a provider often has a whole one.
_MANY_PARTS = 8
# What a token says of itself is checked before its signature.
_UNVERIFIED: Any = {"verify_signature": False, "require": _REQUIRED} | dict.fromkeys(
    ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss", "verify_sub"), True
)


class _Budget:
    """Allows so many checks per second."""

    def __init__(self, per_second: int) -> None:
        self._per_second, self._second, self._used = per_second, 0, 0

    def take(self, now: float) -> bool:
        """Return whether one more check is allowed at `now`."""
        if int(now) != self._second:
            self._second, self._used = int(now), 0
        self._used += 1
        return self._used <= self._per_second


class TokenTable:
    """The tokens of one issuer. `jwks`: URL or file of its keys; None to ask the issuer where they are."""

    def __init__(self, issuer: str, audience: str, jwks: str | None, warn: Callable[[str], None]) -> None:
        self._issuer, self._audience, self._jwks, self._warn = issuer, audience, jwks, warn
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._known: dict[bytes, Entry] = {}
        self._forged: set[bytes] = set()  # hashes of tokens with wrong signatures
        self._checks, self._suspect_checks = _Budget(_CHECKS_PER_S), _Budget(_SUSPECT_CHECKS_PER_S)
        self._suspects: dict[str, float] = {}  # network -> until when
        self._parts: dict[str, list[float]] = {}  # wider network -> until when networks in it are suspects
        self._wanted, self._closed = threading.Event(), False
        self._failed = False

    def find(self, credential: bytes, now: float, address: str = "") -> ApiKey | None:
        """Return who sent a token; None if it is not valid. Raises `UnavailableError` and `BusyError`.

        `address`: of the client, whose wrong signatures do not count against the budget of others.
        """
        if len(credential) > _MAX_TOKEN_BYTES:
            return None
        digest = keys.digest(credential)
        if entry := self._known.get(digest):
            if now < entry.not_after:
                return entry.key
            del self._known[digest]
            return None
        if digest in self._forged:
            return None
        if self._keys is None:
            raise UnavailableError("the keys of the token issuer are not known yet")
        if (key := self._key_of(credential)) is None:
            return None
        network = _network(address)
        wider = _wider_network(address)
        suspect = now < max(self._suspects.get(each, -math.inf) for each in (network, wider))
        if not (self._suspect_checks if suspect else self._checks).take(now):
            raise BusyError("too many new tokens arrive; retry after 1 s")
        try:
            claims = jwt.decode(
                credential,
                key,
                algorithms=_ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_S,
                options={"require": _REQUIRED},
            )
        except jwt.PyJWTError:
            for found in (self._forged, self._suspects, self._parts):
                if len(found) >= _MAX_KNOWN:
                    found.clear()
            self._forged.add(digest)
            if wider and now >= self._suspects.get(network, -math.inf):
                self._parts[wider] = parts = [each for each in self._parts.get(wider, []) if now < each] + [
                    now + _SUSPECT_S
                ]
                if len(parts) >= _MANY_PARTS:
                    self._suspects[wider] = now + _SUSPECT_S
            self._suspects[network] = now + _SUSPECT_S
            return None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        entry = self._known[digest] = Entry(caller(claims["sub"]), claims["exp"] + _LEEWAY_S)
        return entry.key

    def _key_of(self, credential: bytes) -> jwt.PyJWK | None:
        """Return the key of the issuer that a token names; None if the token cannot be valid, whatever its signature.

        Asks for new keys if the key is not known.
        """
        try:
            token = jwt.decode_complete(
                credential, options=_UNVERIFIED, audience=self._audience, issuer=self._issuer, leeway=_LEEWAY_S
            )
        except (jwt.PyJWTError, OverflowError, RecursionError, TypeError):  # the others by versions before 2.15
            return None
        claims, header = token["payload"], token["header"]
        if len(claims["sub"]) > _MAX_SUBJECT or not is_caller_id(claims["sub"]) or header.get("alg") not in _ALGORITHMS:
            return None
        # PyJWT reads times with `int`, so it also accepts texts, booleans and numbers of any size.
        times = [claims.get(each, 0) for each in _TIMES]
        if any(type(each) not in (int, float) or abs(each) > _LATEST for each in times):
            return None
        kid = header.get("kid")
        key = (self._keys or {}).get(kid if isinstance(kid, str) else "")
        if key is None:
            self._wanted.set()
        return key

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
                self._forged = set()  # a key may have changed
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


def _network(address: str) -> str:
    """Return what one client can choose its address from: the /64 of an IPv6 address, else the address."""
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or int(parsed) >> 64)


def _wider_network(address: str) -> str:
    """Return the /48 of an IPv6 address, empty for others."""
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return ""
    return "" if parsed.ipv4_mapped else f"{int(parsed) >> 80}/48"


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
