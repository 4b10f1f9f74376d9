"""Measure what engine failures cost under load: lost requests, and the time to recovery.

    python benchmarks/peers/failures.py [--kills 5] [--load 0.4] [--hang 5] [--json FILE]

The injected faults: the engine is killed five times, stopped once (SIGSTOP), and out of memory once. An open loop runs
all the time, at a share of the measured capacity. The time to recovery is from the fault to the first response to a
request that was sent after it. A request is lost if its status is none of 200, 429 and 503. The script starts the
server itself, on the loopback address.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peers
from load import requests, run_closed
from recorder import OpenLoop, engine, statuses

EXPECTED = {"200", "429", "503"}
TIMEOUT_S = 120


def post(url: str, body: object) -> int:
    """Send one bulk request, which no SLO rejects, and return its status; 0 without a response."""
    headers = {"content-type": "application/json", "x-priority": "bulk"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return 0


def send_signal(server: peers.Server, number: signal.Signals) -> Callable[[], None]:
    """Return a fault: the engine receives a signal."""

    def fault() -> None:
        if pid := engine(server.process.pid):
            os.kill(pid, number)

    return fault


def exhaust_memory(server: peers.Server, responses: list[int]) -> Callable[[], None]:
    """Return a fault: no memory for 4 s, while three large requests arrive. `responses` receives their statuses."""

    def fault() -> None:
        pid = engine(server.process.pid)
        assert pid
        # The limit is below what the process has. The kernel rejects new allocations; memory that it holds stays
        # usable.
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        text = " ".join(peers.texts(20))
        with ThreadPoolExecutor(3) as pool:
            responses.extend(pool.map(lambda _: post(server.url + server.path, {"input": [text] * 64}), range(3)))
        time.sleep(4)
        try:
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except ProcessLookupError:
            responses.append(-1)

    return fault


def inject(load: OpenLoop, name: str, fault: Callable[[], None]) -> dict[str, object]:
    """Inject a fault, wait for the recovery and 5 s more, and return the time to recovery."""
    start = time.monotonic()
    fault()
    recovered = None
    while recovered is None and time.monotonic() < start + TIMEOUT_S:
        time.sleep(0.05)
        ends = [r.ended for r in list(load.records) if r.intended > start and r.status == 200 and r.ended]
        recovered = min(ends) - start if ends else None
    time.sleep(5)
    return {"blow": name, "began": start, "recovered_s": recovered}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.4, help="share of the measured capacity")
    parser.add_argument("--slo", type=float, default=1000, help="p99 SLO of the server, in ms")
    parser.add_argument("--hang", type=float, default=5, help="`--hang-seconds` of the server")
    parser.add_argument("--serve", type=shlex.split, default=[], help="more options of `inferctl serve`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "failures.yaml"
        spec.write_text(f"name: minilm\nmodel: {{source: {peers.MODEL}}}\nslo: {{p99_ms: {options.slo:g}}}\n")
        command = [
            sys.executable,
            "-m",
            "inferctl",
            "serve",
            "--spec",
            spec,
            "--port",
            "18522",
            "--hang-seconds",
            f"{options.hang:g}",
            *options.serve,
        ]
        server = peers.start("inferctl-failures", command, 18522, "/v1/embeddings", "/readyz", pausable=False)
    large: list[int] = []
    try:
        ready = requests(server.url, server.path, [{"input": text} for text in peers.texts(2000)])
        peak = run_closed(server.url, ready, 32, 8, warm=12).rate
        with OpenLoop(server.url, [("single", r) for r in ready], options.load * peak, 900) as load:
            time.sleep(5)
            faults = [
                inject(load, f"kill -9, {n + 1}", send_signal(server, signal.SIGKILL)) for n in range(options.kills)
            ]
            faults.append(inject(load, "SIGSTOP", send_signal(server, signal.SIGSTOP)))
            faults.append(inject(load, "no memory", exhaust_memory(server, large)))
        status_after = post(server.url + server.path, {"input": "still there?"})
        metrics = urllib.request.urlopen(server.url + "/metrics").read().decode()
    finally:
        server.end()
    starts = [float(str(b["began"])) for b in faults] + [float("inf")]
    rows, lost = [], 0
    for fault, begin, end in zip(faults, starts, starts[1:], strict=False):
        during = [r for r in load.records if begin - 1 <= r.intended < end - 1]
        seen = statuses(during)
        lost_now = sum(count for status, count in seen.items() if status not in EXPECTED)
        lost += lost_now
        fault |= {
            "statuses": seen,
            "lost": lost_now,
            "slowest_s": max((r.ended - r.intended for r in during if r.status == 200 and r.ended), default=0.0),
        }
        rows.append((fault["blow"], fault["recovered_s"] or float("nan"), fault["slowest_s"], str(seen), lost_now))
    peers.table(("fault", "time to recovery (s)", "slowest 200 (s)", "responses", "lost"), rows)
    print(
        f"peak {peak:.1f} requests/s, load {options.load * peak:.1f}; "
        f"large requests (64 texts) without memory: {large}; "
        f"afterwards: {status_after}"
    )
    for line in metrics.splitlines():
        if line.startswith(
            ("inferctl_engine_deaths_total", "inferctl_out_of_memory_total", "inferctl_batch_limit_tokens ")
        ):
            print(line)
    print(f"{len(load.records)} requests, {lost} lost")
    peers.write(
        options.json, {"peak": peak, "blows": faults, "large": large, "requests": len(load.records), "lost": lost}
    )


if __name__ == "__main__":
    main()
