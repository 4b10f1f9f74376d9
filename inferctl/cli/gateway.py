"""`inferctl gateway`: run Envoy in front of several servers."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from inferctl.cli import console
from inferctl.core import outputs
from inferctl.core.errors import UsageError
from inferctl.gateway import config, supervisor
from inferctl.gateway.servers import parse
from inferctl.serve.signals import StopSignals

EPILOG = """\b
Examples:
  # Balance between two servers
  inferctl gateway --server http://10.0.0.7:8080 --server http://10.0.0.8:8080
  # Listen with TLS in front of all addresses of a name
  inferctl gateway --server http://embed:8080 --host 0.0.0.0 --port 8443 --tls-certificate cert.pem --tls-key key.pem
  # Send requests whose header x-inferctl-space names a space to the servers of the new model
  inferctl gateway --server http://old:8080 --server dense_0123456789abcdef=http://new:8080
  # Print Envoy's configuration
  inferctl gateway --server http://10.0.0.7:8080 --print-config
"""


def gateway(
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SPACE=]URL",
            help="Use this server, as http://HOST:PORT, or all addresses of a name; with SPACE, for requests that name "
            "this vector space; repeatable.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Listen on this IP address; 0.0.0.0 means all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Listen on this port; 0 selects a free one.")
    ] = 8000,
    timeout: Annotated[
        float,
        typer.Option(metavar="S", min=0.1, max=86_400, help="End a request after S seconds; generation has no limit."),
    ] = 60.0,
    drain: Annotated[
        float,
        typer.Option(metavar="S", min=0, max=86_400, help="After SIGTERM, finish requests for at most S seconds."),
    ] = 25.0,
    tls_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Listen with TLS, with this certificate chain (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The private key of the certificate (PEM).")
    ] = None,
    client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Require certificates of clients, signed by this CA (PEM).")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", min=1, max=65535, help="Publish Envoy's metrics at 127.0.0.1:PORT/metrics for Prometheus."
        ),
    ] = None,
    announce: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write {url, pid} as JSON to FILE when the gateway is ready.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print Envoy's configuration, which is YAML and JSON, and exit.")
    ] = False,
) -> None:
    """Balance requests between several servers with Envoy.

    Least request, retries on another server, ejection of servers that fail, TLS, and a drain without lost requests.
    Keys, limits and usage stay in the servers.
    """
    if not server:
        raise UsageError("no server is named", "pass `--server http://HOST:PORT`")
    if (tls_certificate is None) != (tls_key is None):
        raise UsageError("`--tls-certificate` and `--tls-key` belong together", "pass both, or none")
    if client_ca and not tls_certificate:
        raise UsageError("`--client-ca` requires TLS", "pass `--tls-certificate` and `--tls-key` too")
    for file in (tls_certificate, tls_key, client_ca):
        if file and not file.is_file():
            raise UsageError(f"{file} is not a file", "name a PEM file")
    servers = list(dict.fromkeys(map(parse, server)))
    if all(each.space for each in servers):
        raise UsageError("each server has a space", "name the servers of other requests too: `--server URL`")
    settings = config.Settings(
        host=host,
        port=port,
        metrics_port=metrics_port,
        timeout_s=timeout,
        certificate=tls_certificate.absolute() if tls_certificate else None,
        key=tls_key.absolute() if tls_key else None,
        client_ca=client_ca.absolute() if client_ca else None,
    )
    if print_config:
        console.data(json.dumps(config.bootstrap(settings, Path("/run/inferctl-gateway"), servers), indent=2))
        return
    if announce:
        outputs.retract(announce)

    async def run() -> int:
        with StopSignals() as signals:
            running = supervisor.Gateway(
                settings,
                servers,
                console.note,
                threads=min(4, len(os.sched_getaffinity(0))),
                drain_s=drain,
                announce=announce,
            )
            return await running.run(signals.connect)

    raise typer.Exit(asyncio.run(run()))
