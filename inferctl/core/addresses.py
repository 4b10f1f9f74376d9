"""Addresses of stores, whose text has no password: only `secret` and `credentials` return one.

The grammar is what RFC 3986, SQLAlchemy, nats-py and urllib split in the same way. Other addresses are
rejected, because what is a password for one reader would be a host or a path for another, and appear in its messages.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, ClassVar
from urllib.parse import parse_qsl, unquote

from inferctl.core.errors import UsageError

# For `model_dump`: the relay of a server gets the passwords too.
WITH_SECRETS = {"secrets": True}
_HIDDEN = "***"
_ESCAPE = "%(?!00)[0-9A-Fa-f]{2}"
_GRAMMAR = re.compile(
    rf"""(?P<scheme>[A-Za-z][A-Za-z0-9+]*)://
    (?:(?P<user>(?:(?![/?\#@%\[\]:])[!-~]|{_ESCAPE})*)(?P<password>:(?:(?![/?\#@%\[\]])[!-~]|{_ESCAPE})*)?@)?
    (?P<host>\[[0-9A-Fa-f:.]+\]|[\w.,-]*)(?P<port>:[0-9]{{1,5}})?
    (?P<path>(?:/(?:(?![?\#@%])[!-~]|{_ESCAPE})*)?)
    (?:\?(?P<query>(?:(?![\#@%])[!-~]|{_ESCAPE})*))?""",
    re.ASCII | re.VERBOSE,
)
# Its path is a file name with any characters.
_SQLITE = re.compile(
    r"(?P<scheme>sqlite(?:\+pysqlite)?)://(?P<user>(?!))?(?P<password>(?!))?(?P<host>)(?P<port>(?!))?"
    r"(?P<path>(?:/[^?\r\n\0]*)?)(?:\?(?P<query>(?:(?!@)[!-~])*))?",
    re.IGNORECASE,
)
# The public parameters of libpq, and those of SQLite in the name of a file.
_DATABASE_PARAMETERS = """
    application_name channel_binding client_encoding connect_timeout dbname fallback_application_name gssdelegation
    gssencmode gsslib host hostaddr keepalives keepalives_count keepalives_idle keepalives_interval krbsrvname
    load_balance_hosts max_protocol_version min_protocol_version oauth_client_id oauth_issuer oauth_scope options
    passfile port replication require_auth requirepeer service ssl_max_protocol_version ssl_min_protocol_version
    sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey sslkeylogfile sslmode sslnegotiation sslrootcert sslsni
    target_session_attrs tcp_user_timeout user cache immutable mode nolock psow timeout uri vfs
"""


class StoreAddress:
    """An address of one kind of store. `str` and `repr` hide its password, and a user that may be a token.

    `public`: the address without them. `hidden`: whether they differ. Raises `UsageError`, which does not quote `text`.
    """

    what: ClassVar[str]
    example: ClassVar[str]
    schemes: ClassVar[tuple[str, ...]]
    # Names of parameters in the query. Others are rejected; without public names, all are secret.
    public_names: ClassVar[frozenset[str]] = frozenset()
    secret_names: ClassVar[frozenset[str]] = frozenset()
    shows_user: ClassVar[bool] = False

    def __init__(self, text: object) -> None:
        text = text.secret() if isinstance(text, StoreAddress) else text
        found = self._match(text) if isinstance(text, str) and _HIDDEN not in text else None
        if found is None or not self._valid(found):
            raise UsageError(
                f"expected an address of {self.what}; the given one is not shown, because it may have a password",
                f"write it as in {self.example}; in a user, a password and a path, write / as %2F, @ as %40, : as %3A, "
                "% as %25, and so on",
            )
        self.scheme = found["scheme"].lower()
        self._secret = self.scheme + found.string[found.end("scheme") :]
        self._user, self._password = found["user"], found["password"]
        query = found["query"]
        parts = query.split("&") if query else []
        public = [part for part in parts if unquote(part.partition("=")[0]) in self.public_names]
        shown = public if len(public) == len(parts) else [*public, _HIDDEN]
        rest = f"{found['host']}{found['port'] or ''}{found['path']}"
        user = f"{self._user}@" if self.shows_user and self._user is not None else ""
        self.public = f"{self.scheme}://{user}{rest}{'?' if public else ''}{'&'.join(public)}"
        if self._password or (self._user and not self.shows_user):
            user = f"{self._user}:{_HIDDEN}@" if self.shows_user else f"{_HIDDEN}@"
        self._text = f"{self.scheme}://{user}{rest}{'?' if shown else ''}{'&'.join(shown)}"

    @classmethod
    def _match(cls, text: str) -> re.Match[str] | None:
        return _GRAMMAR.fullmatch(text)

    @classmethod
    def _valid(cls, found: re.Match[str]) -> bool:
        """Return whether the parts are what this kind of store has."""
        if found["scheme"].lower() not in cls.schemes or int((found["port"] or ":0")[1:]) > 65535:
            return False
        if found["host"].startswith("["):
            try:
                ipaddress.IPv6Address(found["host"][1:-1])
            except ValueError:
                return False
        names = {name for name, _ in parse_qsl(found["query"] or "", keep_blank_values=True)}
        return not cls.public_names or names <= cls.public_names | cls.secret_names

    @property
    def hidden(self) -> bool:
        """Whether the address has a password or a token."""
        return self._text != self.public

    def secret(self) -> str:
        """Return the whole address, for a driver. It belongs into no message and no file."""
        return self._secret

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._secret == other._secret

    def __hash__(self) -> int:
        return hash(self._secret)

    @classmethod
    def of(cls, value: object) -> Any:
        """Return the value of a setting as an address. Raises an error of pydantic, which does not quote it."""
        from pydantic_core import PydanticCustomError

        try:
            return value if isinstance(value, cls) else cls(value)
        except UsageError as error:
            raise PydanticCustomError("address", "{what}", {"what": error.message, "hint": error.hint}) from None

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        from pydantic_core import core_schema

        serializer = core_schema.plain_serializer_function_ser_schema(serialized, info_arg=True)
        return core_schema.no_info_plain_validator_function(cls.of, serialization=serializer)

    @classmethod
    def __get_pydantic_json_schema__(cls, *_: Any) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^[^\r\n\x00]+$"}


class DatabaseAddress(StoreAddress):
    """A database in SQLite or PostgreSQL. Its user is shown, because it is no secret and often wrong."""

    what = "a database (SQLite, PostgreSQL)"
    example = "sqlite:///file.sqlite or postgresql://user@host/database"
    schemes = ("postgresql", "postgresql+psycopg", "sqlite", "sqlite+pysqlite")
    shows_user = True
    public_names = frozenset(_DATABASE_PARAMETERS.split())
    secret_names = frozenset(("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"))

    @classmethod
    def _match(cls, text: str) -> re.Match[str] | None:
        return _SQLITE.fullmatch(text) or (None if text.lower().startswith("sqlite") else super()._match(text))

    @property
    def is_file(self) -> bool:
        """Whether the database is a file of this machine."""
        return self.scheme.startswith("sqlite")


class NatsAddress(StoreAddress):
    """A NATS server. Without a scheme, it is nats://. A user without a password is a token."""

    what = "one NATS server"
    example = "nats://host:4222, nats://user:password@host:4222 or nats://token@host:4222"
    schemes = ("nats", "tls", "ws", "wss")

    @classmethod
    def _match(cls, text: str) -> re.Match[str] | None:
        return super()._match(text if "://" in text else f"nats://{text}")

    @classmethod
    def _valid(cls, found: re.Match[str]) -> bool:
        anywhere = found["path"] in ("", "/") or found["scheme"].lower() in ("ws", "wss")
        one = bool(found["host"]) and "," not in found["host"]
        return super()._valid(found) and anywhere and one and found["query"] is None

    def credentials(self) -> dict[str, str]:
        """Return the options of the client with user and password, or with the token.

        The client would send them as they are in the address, percent-encoded.
        """
        if self._password:
            return {"user": unquote(self._user or ""), "password": unquote(self._password[1:])}
        return {"token": unquote(self._user)} if self._user else {}


def serialized(value: Any, info: Any) -> Any:
    """Return a setting as data: without its password, unless the context of `model_dump` is `WITH_SECRETS`."""
    if not isinstance(value, StoreAddress):
        return value
    return value.secret() if info.context == WITH_SECRETS else str(value)


def is_address(text: str) -> bool:
    """Return whether a setting that is a file or an address is one: it has a colon before the first slash.

    So is `//user:password@host/database`, where the scheme is missing: as a file, its name would be shown.
    """
    return ":" in text.partition("/")[0] or text.startswith("//")
