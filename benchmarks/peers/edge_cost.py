"""What keys, limits and other features of the edge cost, on the echo engine: everything is real except the model.

    python benchmarks/peers/edge_cost.py [--with keys,metering,cache] [--seconds 3] [--rounds 20] [--json FILE]

A server without features and one with those of `--with` are measured in alternating order (A B B A). Throughput and CPU
time: 64 clients in a closed loop that send single texts. Latency: an open loop at 40% of the throughput of the server
without features. A figure is the median over the rounds of the ratio within one round, so a slow drift of the machine
cancels. Load generator and servers share the cores.

- `keys`: the key file has 10,000 keys, and the key that is used has limits of requests and of tokens.
- `metering`: each request leaves an event in the outbox, which a relay brings to a ledger in SQLite.
- `cache`: each text is looked up in a cache that has nearly none of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peers
from load import requests, run_closed
from recorder import OpenLoop, latencies, quantile, statuses

sys.path.insert(0, str(peers.ROOT))
KEYS, CLIENTS, LOAD = 10_000, 64, 0.4
# Sections of the spec, and headers of requests.
Feature = tuple[dict[str, Any], dict[str, str]]


def keys(folder: Path) -> Feature:
    """Return the section `access` with a key file, and the header with one of its keys."""
    from inferctl.tenancy.access import key_file, keys
    from inferctl.tenancy.access.key_file import ApiKey, StoredDigest

    file = folder / "keys.json"
    with key_file.edit(file, create=True) as found:
        for number in range(KEYS):
            key_id = keys.new_id()
            secret = keys.generate(key_id)
            digest = StoredDigest(sha256=keys.digest(secret.encode()).hex())
            found[key_id] = ApiKey(id=key_id, name=f"key {number}", digests=[digest], created=key_file.now())
    limits = {"requests_per_minute": 1_000_000_000, "tokens_per_minute": 1_000_000_000_000}
    return {"access": {"keys": str(file), **limits}}, {"authorization": f"Bearer {secret}"}


def metering(folder: Path) -> Feature:
    """Return the section `metering`: an event per request, and a relay with a ledger in SQLite."""
    return {"metering": {"mode": "on", "data": str(folder / "metering")}}, {}


def cache(folder: Path) -> Feature:
    """Return the section `cache`. It is so small that nearly every request computes and stores its vector."""
    return {"cache": {"size": "64KiB"}}, {}


FEATURES: dict[str, Callable[[Path], Feature]] = {"keys": keys, "metering": metering, "cache": cache}


def serve(
    folder: Path,
    port: int,
    name: str,
    features: Sequence[str],
    checkout: Path = peers.ROOT,
    spec: dict[str, Any] | None = None,
) -> tuple[peers.Server, dict[str, str]]:
    """Start a server of a checkout with the echo engine and these features; also return headers for its requests."""
    folder.mkdir()
    spec = {"name": "echo", "model": {"source": str(peers.MODEL)}, **(spec or {})}
    headers: dict[str, str] = {}
    for feature in features:
        sections, more = FEATURES[feature](folder)
        spec |= sections
        headers |= more
    file = folder / "inferctl.yaml"
    file.write_text(json.dumps(spec))
    return peers.inferctl(port, "--engine", "echo", "--spec", str(file), name=name, checkout=checkout), headers


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=20, seconds=3)
    parser.add_argument("--with", dest="features", default="keys", help=f"of {', '.join(FEATURES)}, with commas")
    options = parser.parse_args()
    bodies = [{"input": text} for text in peers.texts(500)]
    figures: dict[str, dict[str, list[float]]] = {}
    servers: list[tuple[peers.Server, list[bytes]]] = []
    # The relay may still write when its server was killed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        try:
            for port, label, features in (
                (18531, "without", []),
                (18532, f"with {options.features}", options.features.split(",")),
            ):
                server, headers = serve(Path(name) / str(port), port, label, features)
                ready = requests(server.url, server.path, bodies, headers)
                servers.append((server, ready))
                figures[label] = {"requests/s": [], "CPU us": [], "p50 ms": [], "p99 ms": []}
                outcome = run_closed(server.url, ready, CLIENTS, 2, warm=1)
                assert not outcome.failures, f"{label} rejected requests: {outcome.statuses}"
            rate = LOAD * outcome.rate
            for server, ready in peers.order(servers, options.rounds):
                found = figures[server.name]
                before = server.cpu_seconds()
                outcome = run_closed(server.url, ready, CLIENTS, options.seconds, warm=0)
                assert not outcome.failures, f"{server.name} rejected requests: {outcome.statuses}"
                found["requests/s"].append(outcome.rate)
                found["CPU us"].append(1e6 * (server.cpu_seconds() - before) / outcome.statuses[200])
                with OpenLoop(server.url, ready, rate, options.seconds) as load:
                    load.join()
                assert list(seen := statuses(load.records)) == ["200"], f"{server.name} rejected requests: {seen}"
                for name, q in (("p50 ms", 0.5), ("p99 ms", 0.99)):
                    found[name].append(quantile(latencies(load.records), q))
        finally:
            for server, _ in servers:
                server.end()
    without, after = figures.values()
    ratios = {
        measure: sorted(b / a for a, b in zip(values, after[measure], strict=True))
        for measure, values in without.items()
    }
    rows = [
        (name, *map(peers.median, (without[name], after[name], found)), found[0], found[-1])
        for name, found in ratios.items()
    ]
    print(f"with {options.features}; open loop at {rate:.0f} requests/s; {options.rounds} rounds")
    peers.table(("measure", "without", "with", "ratio (median)", "lowest", "highest"), rows)
    peers.write(options.json, {"features": options.features, "rate": rate, "figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
