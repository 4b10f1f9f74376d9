"""Tokens of an OIDC provider: a real HTTP server with its keys, which also stalls, fails and changes them."""

from __future__ import annotations

import base64
import http.server
import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from inferctl.config import spec
from inferctl.serve.edge import access
from inferctl.serve.edge.errors import ApiError
from inferctl.tenancy.access.key_table import BusyError, UnavailableError
from inferctl.tenancy.access.oidc import TokenTable
from tests.http_servers import Handler
from tests.processes import until

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def public(key: Any, kid: str) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if key is RSA_KEY else jwt.algorithms.ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}


class Provider(http.server.ThreadingHTTPServer):
    """A provider on a free port. `stalled`: it accepts connections and does not respond."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Pages)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.keys = [public(RSA_KEY, "rsa"), public(EC_KEY, "ec")]
        self.stalled = threading.Event()
        self.fetched = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def token(self, key: Any = RSA_KEY, kid: str = "rsa", algorithm: str = "RS256", **claims: Any) -> bytes:
        standard = {"iss": self.url, "aud": "inferctl", "sub": "team-a", "exp": int(time.time()) + 600}
        chosen = {name: value for name, value in {**standard, **claims}.items() if value is not None}
        return jwt.encode(chosen, key, algorithm, headers={"kid": kid}).encode()


class _Pages(Handler):
    server: Provider

    def do_GET(self) -> None:
        while self.server.stalled.is_set():
            time.sleep(0.05)
        if self.path == "/.well-known/openid-configuration":
            body: Any = {"jwks_uri": f"{self.server.url}/keys"}
        else:
            self.server.fetched += 1
            body = {"keys": self.server.keys}
        self.reply(200, json.dumps(body).encode())


@pytest.fixture
def provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.stalled.clear()
    found.shutdown()
    found.server_close()


@pytest.fixture
def table(provider: Provider) -> Iterator[TokenTable]:
    found = TokenTable(provider.url, "inferctl", None, lambda _: None)
    found.follow()
    until(lambda: found._keys is not None)
    yield found
    found.close()


def test_tokens_of_the_issuer_are_accepted(provider: Provider, table: TokenTable) -> None:
    for token in (provider.token(), provider.token(EC_KEY, "ec", "ES256"), provider.token(aud=["x", "inferctl"])):
        for _ in range(2):
            found = table.find(token, time.time())
            assert found and (found.id, found.admin) == ("team-a", False)


def test_other_tokens_are_not(provider: Provider, table: TokenTable) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    good = provider.token()
    bad = {
        "expired": provider.token(exp=int(time.time()) - 40),
        "not yet valid": provider.token(nbf=int(time.time()) + 600),
        "from the future": provider.token(iat=int(time.time()) + 600),
        "audience": provider.token(aud="other"),
        "no audience": provider.token(aud=None),
        "issuer": provider.token(iss="https://other.example.com"),
        "no end": provider.token(exp=None),
        "no subject": provider.token(sub=None),
        "long subject": provider.token(sub="a" * 300),
        "one of many audiences": provider.token(aud=["inferctl", 1]),
        # The ledger could not store them, and a terminal would obey the third.
        "no UTF-8": provider.token(sub="\ud800"),
        "NUL": provider.token(sub="a\0b"),
        "escape": provider.token(sub="\x1b[31m"),
        "key": provider.token(other),
        "unknown key": provider.token(other, "other"),
        "none": jwt.encode({"sub": "team-a"}, None, "none", headers={"kid": "rsa"}).encode(),
        "symmetric": provider.token("secret" * 10, "rsa", "HS256"),
        "changed": good[:-4] + (b"AAAA" if good[-4:] != b"AAAA" else b"BBBB"),
        "no key named": jwt.encode({"sub": "team-a"}, RSA_KEY, "RS256").encode(),
        "no token": b"a.b.c",
        "large": b"a." * 20_000,
    }
    assert {name for name, token in bad.items() if table.find(token, time.time())} == set()


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
def test_a_time_is_a_number_that_a_clock_can_show(provider: Provider, table: TokenTable, claim: str) -> None:
    later = str(int(time.time()) + 600)
    bad: list[Any] = [10**400, -(10**400), 10**20, 1e300, math.inf, -math.inf, math.nan, True, False, later, "1", "٣"]
    bad += [[], [1], {}]
    assert {repr(each)[:9] for each in bad if table.find(provider.token(**{claim: each}), time.time())} == set()
    good = time.time() + 600.5 if claim == "exp" else 0.5
    assert table.find(provider.token(**{claim: good}), time.time())


@pytest.mark.parametrize(("claim", "offset"), [("iat", 1.5), ("nbf", 1.5), ("iat", 20), ("nbf", 20), ("exp", -20)])
def test_clocks_may_differ_by_some_seconds(provider: Provider, table: TokenTable, claim: str, offset: float) -> None:
    token = provider.token(**{claim: time.time() + offset})
    for _ in range(2):  # the second time, it is known
        assert table.find(token, time.time())


def test_a_known_token_ends_at_its_time(provider: Provider, table: TokenTable) -> None:
    end = int(time.time()) + 600
    token = provider.token(exp=end)
    assert table.find(token, time.time())
    assert table.find(token, end + 29)
    assert table.find(token, end + 30) is None


def test_a_provider_that_stalls_delays_no_request(provider: Provider) -> None:
    provider.stalled.set()
    table = TokenTable(provider.url, "inferctl", None, lambda _: None)
    table.follow()
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        table.find(provider.token(), time.time())
    assert time.monotonic() - started < 2  # a fetch would take 5
    table.close()


def test_the_last_keys_stay_in_use(provider: Provider, table: TokenTable) -> None:
    provider.stalled.set()
    assert table.find(provider.token(kid="unknown"), time.time()) is None  # asks for a fetch
    assert table.find(provider.token(sub="team-b"), time.time())


def test_a_flood_of_new_tokens_is_bounded(provider: Provider, table: TokenTable) -> None:
    token = provider.token()
    now = float(int(time.time()))
    with pytest.raises(BusyError):
        for number in range(2000):
            table.find(token[:-9] + b"%08dA" % number, now)
    assert table.find(provider.token(sub="team-b"), now + 1)


def forged(token: bytes, number: int) -> bytes:
    """Return a token with the claims of `token` and a wrong signature."""
    head, payload, _ = token.split(b".")
    return b".".join([head, payload, base64.urlsafe_b64encode(number.to_bytes(256)).rstrip(b"=")])


def test_wrong_signatures_of_some_clients_cost_the_others_nothing(provider: Provider, table: TokenTable) -> None:
    token, now = provider.token(), float(int(time.time()))
    new = [provider.token(sub=f"team-{number}") for number in range(40)]
    rejected = 0
    for number in range(2000):
        try:
            assert table.find(forged(token, number), now, f"192.0.2.{number % 20}") is None
        except BusyError:
            rejected += 1
    assert rejected > 1500  # their signatures were not checked
    found = [table.find(each, now, "198.51.100.7") for each in new]
    assert [each.id if each else None for each in found] == [f"team-{number}" for number in range(40)]


def test_a_client_with_wrong_signatures_gets_429(provider: Provider) -> None:
    """Not 503: a gateway would take the server out, and one client could take out all of them."""
    settings = spec.Access.model_validate({"oidc": {"issuer": provider.url, "audience": "inferctl"}})
    found = access.EdgeAccess(settings, ["m"])
    assert found._tokens
    tokens = found._tokens
    until(lambda: tokens._keys is not None)
    codes, token = set(), provider.token()
    for number in range(2000):
        headers = [(b"authorization", b"Bearer " + forged(token, number))]
        with pytest.raises(ApiError) as error:
            found._find({"type": "http", "path": "/", "headers": headers, "client": ("192.0.2.1", 1)})
        codes.add((error.value.status, error.value.code))
    assert codes == {(401, "invalid_api_key"), (429, "too_many_tokens")}
    found._tokens.close()


def test_a_client_with_many_addresses_of_one_network_is_one_client(provider: Provider, table: TokenTable) -> None:
    token, now = provider.token(), float(int(time.time()))
    with pytest.raises(BusyError):
        for number in range(400):
            table.find(forged(token, number), now, f"2001:db8::{number:x}")
    assert table.find(provider.token(sub="team-b"), now, "2001:db8:0:1::1")


def test_a_client_with_many_networks_of_one_provider_is_one_client(provider: Provider, table: TokenTable) -> None:
    token, now, rejected = provider.token(), float(int(time.time())), 0
    for number in range(1000):
        try:
            table.find(forged(token, number), now, f"2001:db8:0:{number:x}::1")
        except BusyError:
            rejected += 1
    assert rejected == 1000 - 8 - 300, "after eight networks, the budget of suspects"
    assert table.find(provider.token(sub="team-b"), now, "2001:db8:1::1")


def test_what_a_token_says_is_checked_before_its_signature(
    provider: Provider, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, hopeless = (
        provider.token(),
        [
            provider.token(exp=int(time.time()) - 40),
            provider.token(aud="other"),
            provider.token(iss="https://other.example.com"),
            provider.token(sub=None),
            provider.token(kid="unknown"),
            provider.token("secret" * 10, "rsa", "HS256"),
        ],
    )
    checked = []
    monkeypatch.setattr(jwt, "decode", lambda *arguments, **_: checked.append(arguments) or {})
    assert [table.find(each, time.time()) for each in hopeless] == [None] * len(hopeless)
    assert not checked
    with pytest.raises(KeyError):  # this one is checked
        table.find(good, time.time())


def test_a_repeated_wrong_token_is_checked_once(
    provider: Provider, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, decode = [], jwt.decode
    monkeypatch.setattr(jwt, "decode", lambda *some, **named: checked.append(some) or decode(*some, **named))
    wrong = forged(provider.token(), 1)
    assert [table.find(wrong, time.time()) for _ in range(1000)] == [None] * 1000
    assert len(checked) == 1


def test_keys_in_a_file(provider: Provider, tmp_path: Any) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": provider.keys}))
    table = TokenTable(provider.url, "inferctl", str(file), lambda _: None)
    table.follow()
    until(lambda: table._keys is not None)
    assert table.find(provider.token(), time.time())
    assert provider.fetched == 0
    table.close()
