"""Compare how `inferctl gateway` chooses servers, when one of three is three times slower than the others.

    python benchmarks/peers/balancing.py [--seconds 20] [--rounds 2] [--json FILE]

The servers are those of the tests (four requests at a time, fixed times), so the capacity is known. The load is an open
loop at 80% of the capacity of all three. Latency is counted from the intended time of a request. Rounds are
interleaved. The check passes if the p99 of least request is at most half of that of round robin.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import httpx
import peers

BACKEND = peers.ROOT / "tests" / "gateway" / "backend.py"
DELAYS_S = {"a": 0.1, "b": 0.1, "slow": 0.3}
SLOTS = 4  # of each server
LOAD = 0.8
BALANCING = ("least-request", "round-robin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{url} does not respond")


async def measure(url: str, rate: float, seconds: float, seed: int) -> tuple[list[float], int]:
    """Return the latencies in ms of an open loop, and how many requests failed."""
    drawn, latencies, failed = random.Random(seed), [], 0
    start, due = time.monotonic() + 0.5, 0.0

    async def one(client: httpx.AsyncClient, at: float) -> None:
        nonlocal failed
        try:
            response = await client.post(f"{url}/v1/embeddings", json={"input": "x"})
            if response.status_code == 200:
                latencies.append(1000 * (time.monotonic() - at))
                return
        except httpx.TransportError:
            pass
        failed += 1

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
        tasks = []
        while due < seconds:
            await asyncio.sleep(max(0.0, start + due - time.monotonic()))
            tasks.append(asyncio.create_task(one(client, start + due)))
            due += drawn.expovariate(rate)
        await asyncio.gather(*tasks)
    return sorted(latencies), failed


def main() -> int:
    parser = peers.options(__doc__)
    parser.set_defaults(seconds=20)
    options = parser.parse_args()
    rate = LOAD * sum(SLOTS / delay for delay in DELAYS_S.values())
    processes: list[subprocess.Popen[bytes]] = []
    gateways: dict[str, str] = {}
    found: dict[str, list[list[float]]] = {name: [] for name in BALANCING}
    failures = 0
    try:
        servers = []
        for name, delay_s in DELAYS_S.items():
            port = free_port()
            processes.append(subprocess.Popen([sys.executable, str(BACKEND), name, str(port), str(delay_s)]))
            servers += ["--server", f"http://127.0.0.1:{port}"]
            wait_for(f"http://127.0.0.1:{port}/readyz")
        with tempfile.TemporaryDirectory() as folder:
            for name in BALANCING:
                file = Path(folder) / f"{name}.json"
                command = [sys.executable, "-m", "inferctl", "gateway", *servers, "--balancing", name, "--port", "0"]
                processes.append(subprocess.Popen([*command, "--threads", "1", "--announce", str(file)]))
                while not file.exists():
                    time.sleep(0.1)
                gateways[name] = json.loads(file.read_text())["url"]
        time.sleep(12)  # health checks and slow start
        for number, name in enumerate(peers.order(BALANCING, options.rounds)):
            latencies, failed = asyncio.run(measure(gateways[name], rate, options.seconds, number // len(BALANCING)))
            found[name].append(latencies)
            failures += failed
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(60)
    quantile = {
        name: {q: peers.median([run[int(q / 100 * len(run))] for run in runs]) for q in (50, 90, 99)}
        for name, runs in found.items()
    }
    rows = [(name, *values.values()) for name, values in quantile.items()]
    print(f"{rate:.0f} requests/s, {LOAD:.0%} of the capacity; failed: {failures}; ms from the intended time")
    peers.table(("balancing", "p50", "p90", "p99"), rows)
    ratio = quantile["least-request"][99] / quantile["round-robin"][99]
    print(f"p99 of least request / round robin: {ratio:.2f}")
    peers.write(options.json, {"quantiles_ms": quantile, "p99_ratio": ratio, "failed": failures})
    return 0 if ratio <= 0.5 and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
