"""What failures of the engine cost under load: killed five times, stopped once, no memory once. Which requests are lost, and when answers come again.

    python benchmarks/peers/failures.py [--kills 5] [--load 0.4] [--hang 5] [--json FILE]

An open loop runs all the time at a part of the measured capacity. Recovery: from the blow to the first answer to a request that was sent after it.
A request is lost when its answer is none of 200, 429 and 503. The server is this script's own, on the loopback address.
"""

from __future__ import annotations

import json
import os
import resource
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
from load import closed, requests
from recorder import Load, engine, statuses

HARMLESS = {"200", "429", "503"}
PATIENCE = 120


def post(url: str, body: object) -> int:
    """The status of one request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return 0


def signalled(server: peers.Server, number: signal.Signals) -> Callable[[], None]:
    def blow() -> None:
        if pid := engine(server.process.pid):
            os.kill(pid, number)

    return blow


def starved(server: peers.Server, said: list[int]) -> Callable[[], None]:
    """No more memory for a while, in which large requests come."""

    def blow() -> None:
        pid = engine(server.process.pid)
        assert pid
        # Below what it has already: whatever it asks the kernel for from now on is refused; what it holds it may use again.
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        text = " ".join(peers.texts(20))
        with ThreadPoolExecutor(3) as pool:
            said.extend(pool.map(lambda _: post(server.url + server.path, {"input": [text] * 64}), range(3)))
        time.sleep(4)
        try:
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except ProcessLookupError:
            said.append(-1)

    return blow


def suffer(load: Load, name: str, blow: Callable[[], None]) -> dict[str, object]:
    """Strike, wait until answers come again and 5 s more; what it cost."""
    began = time.monotonic()
    blow()
    recovered = None
    while recovered is None and time.monotonic() < began + PATIENCE:
        time.sleep(0.05)
        ends = [r.ended for r in list(load.records) if r.meant > began and r.status == 200 and r.ended]
        recovered = min(ends) - began if ends else None
    time.sleep(5)
    return {"blow": name, "began": began, "recovered_s": recovered}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.4, help="part of the measured capacity")
    parser.add_argument("--slo", type=float, default=1000, help="p99 that the server is told to hold, milliseconds")
    parser.add_argument("--hang", type=float, default=5, help="--hang-seconds of the server")
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
        ]
        server = peers.start("inferctl-failures", command, 18522, "/v1/embeddings", "/readyz", pausable=False)
    large: list[int] = []
    try:
        ready = requests(server.url, server.path, [{"input": text} for text in peers.texts(2000)])
        peak = closed(server.url, ready, 32, 8, warm=12).rate
        with Load(server.url, [("single", r) for r in ready], options.load * peak, 900) as load:
            time.sleep(5)
            blows = [suffer(load, f"kill -9, {n + 1}", signalled(server, signal.SIGKILL)) for n in range(options.kills)]
            blows.append(suffer(load, "SIGSTOP", signalled(server, signal.SIGSTOP)))
            blows.append(suffer(load, "no memory", starved(server, large)))
        answers_after = post(server.url + server.path, {"input": "still there?"})
        metrics = urllib.request.urlopen(server.url + "/metrics").read().decode()
    finally:
        server.end()
    starts = [float(str(b["began"])) for b in blows] + [float("inf")]
    rows, lost = [], 0
    for blow, begin, end in zip(blows, starts, starts[1:], strict=False):
        mine = [r for r in load.records if begin - 1 <= r.meant < end - 1]
        seen = statuses(mine)
        gone = sum(count for status, count in seen.items() if status not in HARMLESS)
        lost += gone
        blow |= {
            "statuses": seen,
            "lost": gone,
            "slowest_s": max((r.ended - r.meant for r in mine if r.status == 200 and r.ended), default=0.0),
        }
        rows.append((blow["blow"], blow["recovered_s"] or float("nan"), blow["slowest_s"], str(seen), gone))
    peers.table(("blow", "recovery, s", "slowest 200, s", "answers", "lost"), rows)
    print(
        f"peak {peak:.1f} requests/s, load {options.load * peak:.1f}; large requests without memory: {large} (64 texts each); afterwards: {answers_after}"
    )
    for line in metrics.splitlines():
        if line.startswith(
            ("inferctl_engine_deaths_total", "inferctl_out_of_memory_total", "inferctl_batch_limit_tokens ")
        ):
            print(line)
    print(f"{len(load.records)} requests, {lost} lost")
    peers.write(
        options.json, {"peak": peak, "blows": blows, "large": large, "requests": len(load.records), "lost": lost}
    )


if __name__ == "__main__":
    main()
