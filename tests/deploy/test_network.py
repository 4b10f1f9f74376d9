"""Network policies let pods connect to the hosts and ports of their addresses, and to no others."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.core.addresses import DatabaseAddress
from inferctl.core.errors import UsageError
from inferctl.deploy import layout
from inferctl.deploy.endpoints import Endpoint, endpoints
from tests.deploy import plans
from tests.deploy.conftest import parsed
from tests.deploy.test_layout import OVERLAYS, Build, egress, named


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://db.example.com/usage", [(5432, None)]),
        ("postgresql://db.example.com:6432/usage", [(6432, None)]),  # a pooler
        ("postgresql+psycopg://usage@pooler.databases:6432/usage", [(6432, "databases")]),
        ("postgresql://usage@db/usage", [(5432, "inference")]),
        ("postgresql://one.example.com:5433,two.example.com/usage", [(5433, None), (5432, None)]),
        ("postgresql://usage@/usage?host=db.databases&port=6433", [(6433, "databases")]),
        (
            "postgresql://usage@/usage?host=one.databases:5433&host=two.databases",
            [(5433, "databases"), (5432, "databases")],
        ),
        (
            "postgresql:///usage?host=one.databases,two.databases&port=5433,5434",
            [(5433, "databases"), (5434, "databases")],
        ),
        ("postgresql:///usage?host=one.example.com,two.example.com&port=6432", [(6432, None)]),
        ("postgresql://[2001:db8::1]:6432/usage", [(6432, None)]),
        ("nats://nats.messaging", [(4222, "messaging")]),
        ("tls://nats.example.com:4443", [(4443, None)]),
        ("wss://nats.example.com", [(443, None)]),
        ("ws://nats.messaging", [(80, "messaging")]),
        ("https://login.example.com/keys", [(443, None)]),
        ("http://keys.identity.svc.cluster.local/keys", [(80, "identity")]),
        ("https://keys.identity.svc:8443/keys", [(8443, "identity")]),
        ("HTTP://Keys.Identity", [(80, "identity")]),
    ],
)  # fmt: skip
def test_endpoints_of_an_address(url: str, expected: list[tuple[int, str | None]]) -> None:
    assert endpoints(url, "inference") == [Endpoint(port, namespace) for port, namespace in expected]


@pytest.mark.parametrize("url", ["postgresql://db:port/usage", "postgresql://db:99999/x", "postgresql:///x?port=no"])
def test_an_address_without_a_valid_port(url: str) -> None:
    with pytest.raises(UsageError, match="host and port") as caught:
        endpoints(url, "inference")
    assert url not in str(caught.value)


def test_what_no_policy_allows_is_denied(build: Build) -> None:
    for folder in (*OVERLAYS, "bench/aws-us-east-1"):
        found = named(build(plans.files(), folder), "NetworkPolicy", "default-deny")["spec"]
        assert found == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize(
    ("ledger", "expected"),
    [
        (None, [(None, 5432)]),  # only the Secret has the address
        ("sqlite:///ledger.sqlite", [(None, 5432)]),  # of a server that is not in Kubernetes
        ("postgresql://usage:secret@db.example.com:6432/usage", [(None, 6432)]),
        ("postgresql://pooler.databases:6432/usage", [("databases", 6432)]),
    ],
)
def test_the_ledger_has_the_port_of_its_address(ledger: str | None, expected: list[Any]) -> None:
    spec = plans.embed()
    metering = spec.metering.model_copy(update={"ledger": DatabaseAddress(ledger) if ledger else None})
    files = layout.files(plans.plan(spec.model_copy(update={"metering": metering})))
    assert egress([each for text in files.values() if "NetworkPolicy" in text for each in parsed(text)]) == expected
    assert "secret@" not in "".join(files.values())
