"""Addresses of stores: no text of them has a password, and their drivers split them in the same way."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from sqlalchemy.engine import make_url

from inferctl import cli
from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core import addresses
from inferctl.core.addresses import DatabaseAddress, NatsAddress, StoreAddress
from inferctl.core.errors import UsageError
from inferctl.tenancy.metering.ledger import Ledger

SECRET = "geheim"


@pytest.mark.parametrize(
    ("kind", "address", "shown", "public"),
    [
        (DatabaseAddress, "postgresql://u:geheim@h/d", "postgresql://u:***@h/d", "postgresql://u@h/d"),
        (DatabaseAddress, "postgresql://u:a:geheim@h/d", "postgresql://u:***@h/d", "postgresql://u@h/d"),
        (DatabaseAddress, "postgresql://u:%2F%40geheim@h/d", "postgresql://u:***@h/d", "postgresql://u@h/d"),
        (DatabaseAddress, "PostgreSQL://u:geheim@h/d", "postgresql://u:***@h/d", "postgresql://u@h/d"),
        (DatabaseAddress, "postgresql://u:geheim@[::1]:5432/d", "postgresql://u:***@[::1]:5432/d", None),
        (DatabaseAddress, "postgresql://u@h/d?password=geheim", "postgresql://u@h/d?***", "postgresql://u@h/d"),
        (DatabaseAddress, "postgresql://u@h/d?pass%77ord=geheim", "postgresql://u@h/d?***", "postgresql://u@h/d"),
        (
            DatabaseAddress,
            "postgresql:///d?password=geheim&host=/a",
            "postgresql:///d?host=/a&***",
            "postgresql:///d?host=/a",
        ),
        (
            DatabaseAddress,
            "postgresql://h/d?sslmode=require&sslpassword=geheim",
            "postgresql://h/d?sslmode=require&***",
            "postgresql://h/d?sslmode=require",
        ),
        (DatabaseAddress, "postgresql://u@/d?host=/a", "postgresql://u@/d?host=/a", "postgresql://u@/d?host=/a"),
        (DatabaseAddress, "sqlite:////a b/ü@x.sqlite?mode=ro", "sqlite:////a b/ü@x.sqlite?mode=ro", None),
        (NatsAddress, "nats://geheim@h:4222", "nats://***@h:4222", "nats://h:4222"),
        (NatsAddress, "geheim@h:4222", "nats://***@h:4222", "nats://h:4222"),
        (NatsAddress, "geheim@h", "nats://***@h", "nats://h"),
        (NatsAddress, "u:geheim@[::1]", "nats://***@[::1]", "nats://[::1]"),
        (NatsAddress, "tls://u:geheim@h:4222", "tls://***@h:4222", "tls://h:4222"),
        (NatsAddress, "nats://h:4222", "nats://h:4222", "nats://h:4222"),
    ],
)
def test_an_address_is_shown_without_its_password(
    kind: type[StoreAddress], address: str, shown: str, public: str | None
) -> None:
    found = kind(address)
    assert f"{found}" == shown and SECRET not in repr(found) + found.public
    assert found.public == (public or found.public) and kind(found.public).public == found.public
    assert found.hidden == (SECRET in address) and kind(found.secret()) == found
    if found.hidden:
        with pytest.raises(UsageError):
            kind(shown)  # no store is asked with the mask


# Where a password, a token or a parameter can be, and what may be in it.
_PLACES = [
    (DatabaseAddress, "postgresql://u:{}@h/d"),
    (DatabaseAddress, "postgresql://u:{}@h:5432/d?sslmode=require"),
    (DatabaseAddress, "postgresql://u:{}@[::1]/d"),
    (DatabaseAddress, "postgresql://u:{}@/d?host=/run"),
    (DatabaseAddress, "postgresql://h:1/d?password={}"),
    (DatabaseAddress, "postgresql://h/d?host=/a&password={}"),
    (DatabaseAddress, "postgresql://h/d?auth={}"),
    (DatabaseAddress, "postgresql:/u:{}@h/d"),
    (DatabaseAddress, "u:{}@h/d"),
    (NatsAddress, "nats://{}@h"),
    (NatsAddress, "{}@h:4222"),
    (NatsAddress, "u:{}@h"),
    (NatsAddress, "nats://u:{}@h:4222"),
    (NatsAddress, "nats://{}@a:1,nats://{}@b:1"),
    (NatsAddress, "NATS://{}@h"),
]
_HOSTILE = ["", *"/@:?#%&+= ,;[]\\'\"\n\0ü*", "%40", "%2F", "://", "@h/", "?a=", "&host=", "&application_name="]


def test_no_text_of_an_address_has_a_part_of_its_password() -> None:
    accepted = 0
    for (kind, place), before, after in itertools.product(_PLACES, _HOSTILE, _HOSTILE):
        # The rest of a query that a raw & divides is a parameter of its own, which has a public name.
        if "&" in before + after and "?" in place:
            continue
        address = place.replace("{}", f"{before}{SECRET}{after}")
        try:
            found = kind(address)
        except UsageError as error:
            assert SECRET not in f"{error.message}{error.hint}"
            continue
        accepted += 1
        assert SECRET not in f"{found} {found!r} {found.public}", address
    assert accepted > 1000


def split(kind: type[StoreAddress], text: str) -> tuple[Any, Any, Any]:
    """Return user, password and everything else, as the driver splits an address."""
    if kind is DatabaseAddress:
        url = make_url(text)
        rest = {key: value for key, value in url.query.items() if key != "password"}
        return url.username, url.password or url.query.get("password"), (url.host, url.port, url.database, rest)
    parts = Client._parse_server_uri(text)
    return parts.username, parts.password, (parts.scheme, parts.hostname, parts.port, parts.path)


def test_drivers_split_an_address_in_the_same_way() -> None:
    """Without its password, a driver finds the same host, port and path: it was only where it is hidden."""
    for (kind, place), before, after in itertools.product(_PLACES, _HOSTILE, _HOSTILE):
        try:
            found = kind(place.replace("{}", f"{before}{SECRET}{after}"))
        except UsageError:
            continue
        if "&" in before and "?" in place:
            continue
        user, password, rest = split(kind, found.secret())
        assert split(kind, found.public)[1:] == (None, rest), found.secret()
        assert SECRET in f"{user}{password}"


def test_a_password_of_nats_may_have_no_user() -> None:
    assert NatsAddress("nats://:p@h").credentials() == {"user": "", "password": "p"}


_SETTINGS = {
    "access.keys": "postgresql://u:geh/eim@h/d",
    "access.broker": "geheim@a,geheim@b",
    "metering.ledger": "postgresql://u:x@geheim@h/d",
    "metering.broker": "nats://u:x@geheim@h",
}


@pytest.mark.parametrize("path", _SETTINGS)
def test_a_rejected_setting_is_not_quoted(path: str) -> None:
    value = _SETTINGS[path]
    section, name = path.split(".")
    variable = f"INFERCTL_{path.upper().replace('.', '_')}"
    written: list[Any] = [{name: value}, {name: [value]}, {name: {value: 1}}, value]
    for document, environment, flags in [
        *((settings.parse(json.dumps({"model": {"source": "."}, section: each})), {}, {}) for each in written),
        (None, {variable: value}, {"model.source": "."}),
        (None, {variable: f"{value}\n"}, {"model.source": "."}),
        (None, {}, {path: value, "model.source": "."}),
    ]:
        with pytest.raises(UsageError, match=section) as failed:
            settings.resolve(document, environment, flags)
        assert "heim" not in f"{failed.value.message}{failed.value.hint}"


def test_a_spec_has_passwords_only_for_its_relay() -> None:
    values = {
        "access": {"keys": "postgresql://u:geheim@h/d", "broker": "geheim@h"},
        "metering": {"ledger": "postgresql://h/d?password=geheim", "broker": "geheim@h"},
    }
    spec = Spec.model_validate({"name": "x", "model": {"source": "."}, **values})
    shown = f"{spec!r} {spec} {spec.model_dump()} {spec.model_dump_json()} {spec.access.key_file}"
    assert SECRET not in shown
    changed = json.loads(json.dumps(values).replace(SECRET, "another"))
    assert Spec.model_validate({"name": "x", "model": {"source": "."}, **changed}).digest() == spec.digest()
    again = Spec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json", context=addresses.WITH_SECRETS))))
    assert again == spec and again.access.broker and again.access.broker.credentials() == {"token": SECRET}


@pytest.mark.parametrize(
    "command",
    [
        "config --json",
        "usage",
        "keys list",
        "keys create x",
        "relay",
        "usage --ledger postgresql://u:x/geheim@h/d",
        "usage postgresql://u:geheim@h/d",
        "keys list --keys u:geheim@h/d",
        "keys list --keys //u:geheim@h/d",
        "relay --broker geheim@a,geheim@b",
    ],
)
def test_no_command_quotes_a_password(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, value in _SETTINGS.items():
        monkeypatch.setenv(f"INFERCTL_{path.upper().replace('.', '_')}", value)
    assert cli.run(command.split()) == 2
    assert "heim" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("address", ["postgresql://u:geheim@h/d?port=x", "postgresql://u:geheim@h/d?host=a:1&host=b:x"])
def test_what_only_the_driver_finds_invalid_is_an_error_too(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["usage", "--ledger", address], ["keys", "create", "a", "--keys", address]):
        assert cli.run(command) == 2
        error = capfd.readouterr().err
        assert "is not valid: postgresql://u:***@h/d" in error and SECRET not in error


def test_numbers_in_queries_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite?timeout=x")
    with pytest.raises(UsageError):
        DatabaseAddress("sqlite://?mode=x:geheim@h")  # SQLAlchemy reads a host and a password
