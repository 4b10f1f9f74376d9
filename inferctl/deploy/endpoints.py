"""Where the pods of a deployment connect to: the endpoints of URLs, and the brokers of limits and events."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError

SCHEME_PORTS = {
    "http": 80,
    "https": 443,
    "nats": 4222,
    "tls": 4222,
    "ws": 80,
    "postgresql": 5432,
    "postgres": 5432,
}


@dataclass(frozen=True)
class Endpoint:
    """A server that pods connect to. `namespace`: None if it is outside of the cluster, so its pods are unknown."""

    port: int
    namespace: str | None


def endpoint(url: str, default_namespace: str) -> Endpoint:
    """Return the endpoint of a URL with one host. `endpoints` has the details."""
    return endpoints(url, default_namespace)[0]


def endpoints(url: str, default_namespace: str) -> list[Endpoint]:
    """Return the endpoints of an address: of each host, with its port or that of the scheme, without duplicates.

    `NAME` and `NAME.NAMESPACE[.svc...]` are Services of the cluster. PostgreSQL accepts several hosts, also in the
    query. Raises `UsageError` if it is not a URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        query = urllib.parse.parse_qs(parts.query)
        if not any(hosts):
            hosts = ",".join(query.get("host", [])).split(",")
        given = ",".join(query.get("port", [])).split(",")
        default = SCHEME_PORTS.get(parts.scheme.partition("+")[0], 443)
        found = []
        for index, host in enumerate(hosts):
            address = urllib.parse.urlsplit(f"//{host}")
            port = address.port or int(given[min(index, len(given) - 1)] or default)
            found.append(Endpoint(port, _namespace(address.hostname or "", default_namespace)))
    except ValueError:
        # Not the URL itself, which may have a password.
        raise UsageError("a URL of the spec has no valid host and port", "write it as scheme://host:port") from None
    return list(dict.fromkeys(found))


def _namespace(host: str, default: str) -> str | None:
    """Return the namespace of a Service of the cluster; None for another host."""
    words = host.split(".")
    if ":" in words[0]:  # an address of IPv6
        return None
    if len(words) == 1:
        return default
    return words[1] if len(words) == 2 or words[2] == "svc" else None


def limits_broker(spec: Spec) -> str | None:
    """Return the URL of the broker of limits and revoked keys, without credentials; None if there is none."""
    return spec.access.broker.public if spec.access.required and spec.access.broker else None


def events_broker(spec: Spec) -> str | None:
    """Return the URL of the broker of usage events, without credentials; None if there is none."""
    return spec.metering.broker.public if spec.metering.mode != "off" and spec.metering.broker else None
