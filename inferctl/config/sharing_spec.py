"""Defines the sections of `inferctl.yaml` for servers that several share: keys and limits, usage events, the cache."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema, field_validator

from inferctl.config.budget import PATTERN, parse
from inferctl.config.spec_types import OneLine, Section, Size
from inferctl.core import addresses
from inferctl.core.addresses import DatabaseAddress, NatsAddress


def _key_place(value: object) -> str | DatabaseAddress:
    if isinstance(value, str) and re.fullmatch(r"[^\r\n\x00]+", value) and not addresses.is_address(value):
        return value
    return cast(DatabaseAddress, DatabaseAddress.of(value))


_KeyPlace = Annotated[
    DatabaseAddress | str,
    PlainValidator(_key_place),
    PlainSerializer(addresses.serialized),
    WithJsonSchema({"type": "string", "pattern": r"^[^\r\n\x00]+$"}),
]
_Budget = Annotated[
    str,
    AfterValidator(lambda text: text if parse("", text) else ""),  # or a ValueError
    WithJsonSchema({"type": "string", "pattern": PATTERN}),
]


class Access(Section):
    """Who may use the server, and how much. Without keys, every client may use it without limits."""

    keys: _KeyPlace | None = Field(
        None,
        description="Key file that `inferctl keys` writes, or the URL of a database with keys (SQLite, PostgreSQL). "
        "Without it, the server asks for no keys.",
    )
    broker: NatsAddress | None = Field(
        None,
        description="URL of a NATS server, through which servers with the same name share the limits of keys, and hear "
        "of revoked keys.",
    )
    data: OneLine = Field(
        "access", description="Folder that a server with a broker or a database of keys shares with its relay."
    )
    open: list[Literal["metrics", "info", "docs"]] = Field(
        default_factory=list,
        description="With keys: pages open to everyone, of `metrics`, `info` and `docs`. Each names all models.",
    )
    trusted_proxies: list[OneLine] = Field(
        default_factory=list,
        description="Networks (CIDR) of gateways that name the caller in x-inferctl-key-id.",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, le=1_000_000_000, description="Limit of each key without its own. Default: no limit."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000_000,
        description="Limit of each key without its own: tokens in and out. Default: no limit.",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Number of servers that share the limits. Without `access.broker`, each applies limit / replicas.",
    )

    budgets: dict[Annotated[str, Field(pattern=r"^(team|model):[^\r\n\x00]{1,100}$")], _Budget] = Field(
        default_factory=dict,
        description="Budgets that several keys share: `team:NAME` or `model:NAME`, and an amount such as "
        "`50 EUR/month`, with an optional time zone and `soft`.",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"access.trusted_proxies: {error}") from None
        return networks

    @property
    def required(self) -> bool:
        """Whether a client must say who it is."""
        return bool(self.keys or self.trusted_proxies)

    @property
    def key_store(self) -> DatabaseAddress | None:
        """URL of the database with the keys; None if they are in a file."""
        return self.keys if isinstance(self.keys, DatabaseAddress) else None

    @property
    def public_key_store(self) -> str | None:
        """URL of the database with the keys, without its password. Servers and relays with it use the same file."""
        return self.key_store.public if self.key_store else None

    @property
    def key_file(self) -> str | None:
        """The file that a server reads. The relay writes that of a database, whose URL is in the name as a hash.

        So a server in the same folder does not accept the keys of another database.
        """
        if not self.public_key_store:
            return str(self.keys) if self.keys else None
        return f"{self.data}/keys-{hashlib.sha256(self.public_key_store.encode()).hexdigest()[:16]}.json"

    @property
    def has_relay(self) -> bool:
        """Whether keys and limits need a relay."""
        return self.required and bool(self.broker or self.key_store)


class Metering(Section):
    """Usage events: one per request, for show-back."""

    mode: Literal["off", "on", "required"] = Field(
        "off",
        description="`on`: record one event per request. `required`: if that is not possible, reject requests.",
    )
    data: OneLine = Field(
        "metering", description="Folder for events that the ledger does not have yet, on a local disk."
    )
    outbox_size: Size = Field(
        "1GiB",
        description="Maximum size of events on disk, per server. An event needs about 200 bytes.",
    )
    ledger: DatabaseAddress | None = Field(
        None,
        description="URL of the ledger (SQLite, PostgreSQL). Default: `ledger.sqlite` in `metering.data`.",
    )
    broker: NatsAddress | None = Field(
        None,
        description="URL of a NATS server. Publish events there, for `inferctl relay --consume`.",
    )

    prices: OneLine | None = Field(
        None,
        description="Price book (YAML). Budgets need it, and `inferctl usage` computes costs with it.",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _boolean(cls, value: Any) -> Any:
        """Accept true and false, which YAML reads for `on` and `off` without quotes."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def ledger_url(self) -> DatabaseAddress:
        """URL of the ledger."""
        return self.ledger or DatabaseAddress(f"sqlite:///{self.data}/ledger.sqlite")


class Cache(Section):
    """Cache of the vectors of inputs that a server of embeddings received before."""

    size: Size | None = Field(None, description="Memory for cached vectors, such as `256MiB`. Default: no cache.")
