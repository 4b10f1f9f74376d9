"""The configuration of Envoy, as data. Envoy's API: https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/api.

Each value that is not Envoy's default has its reason next to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.gateway import overload
from inferctl.gateway.servers import Server

_TYPE = "type.googleapis.com/envoy"
# Headers that a server trusts or reports. A client must neither send the first nor see the second.
TRUSTED_HEADERS = ("x-inferctl-key-id",)
# By which a client names the vector space that it stores.
_SPACE_HEADER = "x-inferctl-space"
# The endpoints of generation, whose responses take as long as they need.
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

# The cluster of the servers without a space.
_OTHERS = "servers"
_LEAST_REQUEST = {
    "@type": f"{_TYPE}.extensions.load_balancing_policies.least_request.v3.LeastRequest",
    "choice_count": 2,
    "slow_start_config": {"slow_start_window": "10s"},
}


@dataclass(frozen=True)
class Settings:
    """What a gateway does. Times are in seconds, sizes in bytes.

    `timeout_s`: to receive a request, and for the response of one without a stream. `begin_s`: of a new connection
    until its first bytes and the end of its TLS handshake, and of a request until the end of its headers.
    `keep_alive_s`: between two requests, if not too many connections are open. `max_connections`: of clients.
    `max_heap_bytes`: above 95% of it, Envoy rejects new requests. `buffered_body_bytes`: smaller bodies are sent to a
    server when they are complete. `max_repeated_bytes`: larger bodies are not repeated. `requests_per_server`: retries
    are allowed for so many requests at once, because all of them fail at once if a server dies. `certificate`, `key`:
    PEM files; both or none.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    metrics_port: int | None = None
    timeout_s: float = 60.0
    idle_s: float = 60.0
    begin_s: float = 10.0
    keep_alive_s: float = 300.0
    max_connections: int = 16_000
    buffered_body_bytes: int = 16 * 1024
    max_repeated_bytes: int = 8 * 1024 * 1024
    max_heap_bytes: int = 1024 * 1024 * 1024
    requests_per_server: int = 256
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


def bootstrap(settings: Settings, folder: Path, servers: Sequence[Server]) -> dict[str, Any]:
    """Return the configuration of one Envoy in front of `servers`. Its files are in `folder`: `tls/` and `admin`."""
    by_space: dict[str | None, list[Server]] = {}
    for server in servers:
        by_space.setdefault(server.space, []).append(server)
    listeners = [_listener(settings, folder, [space for space in by_space if space])]
    clusters = [_servers(settings, space or _OTHERS, found) for space, found in by_space.items()]
    if settings.metrics_port is not None:
        listeners.append(_metrics_listener(settings.metrics_port))
        clusters.append(_admin_cluster(folder))
    return {
        "node": {"id": "gateway", "cluster": "inferctl"},  # Envoy requires a node for a certificate from a file
        # A Unix socket: whoever reaches the admin interface can stop Envoy and read its configuration.
        "admin": {"address": {"pipe": {"path": str(folder / "admin"), "mode": 0o600}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "overload_manager": overload.manager(settings.max_connections, settings.max_heap_bytes),
    }


def certificates(settings: Settings) -> dict[str, Any]:
    """Return the file with the names of certificate and key, which Envoy reads again when they are replaced."""
    assert settings.certificate
    assert settings.key
    return {
        "resources": [
            {
                "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.Secret",
                "name": "server",
                "tls_certificate": {
                    "certificate_chain": {"filename": str(settings.certificate)},
                    "private_key": {"filename": str(settings.key)},
                    "watched_directory": {"path": str(settings.certificate.parent)},
                },
            }
        ]
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(settings: Settings, folder: Path, spaces: Sequence[str]) -> dict[str, Any]:
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": _http(settings, spaces)}]}
    inspector = "http"
    if settings.certificate:
        chain["transport_socket"] = {"name": "tls", "typed_config": _tls(settings, folder)}
        chain["transport_socket_connect_timeout"] = _seconds(settings.begin_s)
        inspector = "tls"
    name = f"{inspector}_inspector"
    kind = f"{_TYPE}.extensions.filters.listener.{name}.v3.{inspector.title()}Inspector"
    return {
        "name": "clients",
        "address": _address(settings.host, settings.port),
        # They wait for the first bytes. So a client that sends nothing cannot keep its connection.
        "listener_filters": [{"name": name, "typed_config": {"@type": kind}}],
        "listener_filters_timeout": _seconds(settings.begin_s),
        "filter_chains": [chain],
        "per_connection_buffer_limit_bytes": 1024 * 1024,
    }


def _tls(settings: Settings, folder: Path) -> dict[str, Any]:
    source = {"path": str(folder / "tls" / "certificate.yaml"), "watched_directory": {"path": str(folder / "tls")}}
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificate_sds_secret_configs": [{"name": "server", "sds_config": {"path_config_source": source}}],
    }
    if settings.client_ca:
        common["validation_context"] = {"trusted_ca": {"filename": str(settings.client_ca)}}
    return {
        "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": common,
        "require_client_certificate": settings.client_ca is not None,
    }


def _http(settings: Settings, spaces: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "use_remote_address": True,  # a client must not choose its own address
        "server_name": "inferctl-gateway",
        "request_headers_timeout": _seconds(settings.begin_s),
        "request_timeout": _seconds(settings.timeout_s),  # a slow body would hold its memory for ever
        "stream_idle_timeout": _seconds(settings.idle_s),
        "common_http_protocol_options": {
            "idle_timeout": _seconds(settings.keep_alive_s),  # 1 h by default
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {"max_concurrent_streams": 256},
        "http_filters": [
            {
                "name": "buffer",  # Envoy repeats complete requests only. Streams of responses are not buffered.
                "typed_config": {
                    "@type": f"{_TYPE}.extensions.filters.http.buffer.v3.Buffer",
                    "max_request_bytes": settings.buffered_body_bytes,
                },
            },
            {"name": "router", "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"}},
        ],
        "route_config": {
            "name": "routes",
            "request_headers_to_remove": list(TRUSTED_HEADERS),
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    # Envoy repeats bodies up to 1 MiB by default.
                    "request_body_buffer_limit": settings.max_repeated_bytes,
                    "retry_policy": _retries(),
                    "routes": [route for space in (*spaces, None) for route in _routes(settings, space)],
                }
            ],
        },
    }


def _routes(settings: Settings, space: str | None) -> list[dict[str, Any]]:
    """Return the routes of requests that name `space`; of all others without one.

    Streams and other requests have a route each for small bodies and for all others.
    Large bodies, and those of unknown size, go to a server while they arrive. It rejects clients without a key before
    it reads the body, so they cannot fill the memory of the gateway with slow uploads.
    """
    small = {"name": "content-length", "range_match": {"start": 0, "end": settings.buffered_body_bytes + 1}}
    disabled = {"buffer": {"@type": f"{_TYPE}.extensions.filters.http.buffer.v3.BufferPerRoute", "disabled": True}}
    # A stream has no limit of its own, only one of its pauses.
    cluster = space or _OTHERS
    stream = {"cluster": cluster, "timeout": "0s", "idle_timeout": _seconds(settings.idle_s)}
    other = {"cluster": cluster, "timeout": _seconds(settings.timeout_s)}
    # A client may name several spaces in one header.
    named = [{"name": _SPACE_HEADER, "string_match": {"contains": space}}] if space else []
    matches = [*(({"path": path}, stream) for path in GENERATION_PATHS), ({"prefix": "/"}, other)]
    found: list[dict[str, Any]] = []
    for match, route in matches:
        found.append({"match": {**match, "headers": [small, *named]}, "route": route})
        found.append({"match": {**match, "headers": named}, "route": route, "typed_per_filter_config": disabled})
    return found


def _retries() -> dict[str, Any]:
    """Repeat what another server can answer: no connection, a connection that broke before a response, and 503.

    A server says 503 only if it starts, drains or is broken, and 429 if it is full or a limit is reached, which is not
    repeated. A response whose head was sent is never repeated.
    """
    return {
        "retry_on": "reset,connect-failure,refused-stream,retriable-status-codes",
        "retriable_status_codes": [503],
        "num_retries": 2,
        "retry_host_predicate": [
            {
                "name": "previous_hosts",
                "typed_config": {"@type": f"{_TYPE}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }
        ],
        "host_selection_retry_max_attempts": 5,
    }


def _servers(settings: Settings, name: str, servers: Sequence[Server]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(each.host, each.port)}} for each in servers]
    check = {
        "timeout": "1s",
        "interval": "2s",
        "no_traffic_interval": "2s",  # 60 s by default: a new server would wait as long
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "http_health_check": {"path": "/readyz"},
    }
    limit = 4096  # 1024 by default, above which Envoy itself answers 503
    return {
        "name": name,
        # Envoy asks again for the addresses of a name, uses all of them, and keeps them if the name server fails.
        "cluster_type": {
            "name": "dns",
            "typed_config": {
                "@type": f"{_TYPE}.extensions.clusters.dns.v3.DnsCluster",
                "dns_refresh_rate": "2s",
                "dns_lookup_family": "ALL",
            },
        },
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "connect_timeout": "1s",
        "health_checks": [check],
        # Otherwise, an address that its name no longer has would be used as long as it is healthy.
        "ignore_health_on_host_removal": True,
        # 429 counts as a success here. A server that fails its check is not used, and its connections are closed.
        "outlier_detection": {
            "consecutive_5xx": 5,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_percent": 50,
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": limit,
                    "max_pending_requests": limit,
                    "max_requests": limit,
                    # 3 at once by default, so most requests of a dead server would fail.
                    "retry_budget": {
                        "budget_percent": {"value": 50},
                        "min_retry_concurrency": settings.requests_per_server,
                    },
                }
            ]
        },
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "policy", "typed_config": _LEAST_REQUEST}}]
        },
    }


def _metrics_listener(port: int) -> dict[str, Any]:
    """Publish two pages of Envoy's admin interface, and nothing else of it."""
    routes = [
        {
            "match": {"path": path, "headers": [{"name": ":method", "string_match": {"exact": "GET"}}]},
            "route": {"cluster": "admin", "prefix_rewrite": target},
        }
        for path, target in (("/metrics", "/stats/prometheus"), ("/ready", "/ready"))
    ]
    return {
        "name": "metrics",
        "address": _address("127.0.0.1", port),
        # Metrics are read when clients have all connections or the memory.
        "ignore_global_conn_limit": True,
        "bypass_overload_manager": True,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "http",
                        "typed_config": {
                            "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3."
                            "HttpConnectionManager",
                            "stat_prefix": "metrics",
                            "http_filters": [
                                {
                                    "name": "router",
                                    "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"},
                                }
                            ],
                            "route_config": {
                                "virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": routes}]
                            },
                        },
                    }
                ]
            }
        ],
    }


def _admin_cluster(folder: Path) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": {"pipe": {"path": str(folder / "admin")}}}}
    return {
        "name": "admin",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "admin", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _seconds(value: float) -> str:
    return f"{value:g}s"
