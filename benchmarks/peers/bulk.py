"""Measure what a batch costs those who wait: latency of interactive requests with and without bulk requests.

    python benchmarks/peers/bulk.py [--loads 0.2,0.5] [--seconds 15] [--rounds 6] [--checkout DIR] [--json FILE]

An open loop sends interactive requests, Poisson arrivals of single texts of about 50 tokens, at parts of what the
server can carry. In every second phase (A B B A), `inferctl embed --url` computes in addition, whose sender is
`RemoteComputer`. It runs in idle time, because clients are elsewhere in production; what it uses counts for the batch.

- "p99": of all interactive requests with the batch, relative to without it, in the same round; the median of rounds.
- "idle": which part of the CPU time that a batch alone gets is left without it, by all processes of this script.
- "batch": the tokens/s of the batch, relative to a batch without interactive requests.
- "of idle": the batch, relative to what was idle. The goal is 0.85.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
from load import requests, run_closed
from recorder import OpenLoop, latencies, quantile

sys.path.insert(0, str(peers.ROOT))
TEXTS = peers.texts(4000, mean_tokens=50)


def send_bulk(url: str, tokens: Any) -> None:
    """Compute ranges of texts that never repeat, and count their tokens, until the process ends."""
    from inferctl.embed.remote import RemoteComputer

    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    async def count(computer: RemoteComputer) -> None:
        while True:
            tokens.value = computer.progress.tokens
            await asyncio.sleep(0.02)

    async def run() -> None:
        computer = RemoteComputer(url, truncate=True)
        await computer.start()
        counting = asyncio.create_task(count(computer))
        for number in range(10**6):
            computed = await computer.compute([f"{number} {text}" for text in TEXTS])
            assert not computed.errors, computed.errors
        await counting

    asyncio.run(run())


@contextlib.contextmanager
def bulk(url: str, runs: bool) -> Iterator[Any]:
    """Run the batch if `runs`, and yield the counter of its tokens."""
    tokens = multiprocessing.Value("q", 0)
    process = multiprocessing.Process(target=send_bulk, args=(url, tokens), daemon=True)
    if runs:
        process.start()
        peers.wait_until(lambda: tokens.value > 20_000)
    yield tokens
    if runs:
        process.terminate()
        process.join()


def cpu_s() -> float:
    """Return the CPU seconds of this process, the server and the batch so far."""
    files = [Path(f"/proc/{pid}/stat") for pid in peers.processes(os.getpid())]
    ticks = [sum(map(int, file.read_text().rpartition(")")[2].split()[11:13])) for file in files]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=15, rounds=6)
    parser.add_argument("--loads", default="0.2,0.5", help="interactive load as parts of the peak, with commas")
    parser.add_argument("--checkout", type=Path, default=peers.ROOT, help="folder of the project that serves")
    options = parser.parse_args()
    server = peers.inferctl(peers.free_port(), name="inferctl-bulk", checkout=options.checkout.resolve())
    with contextlib.suppress(PermissionError):  # else the load generator waits for cores, as no client elsewhere does
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    figures: dict[str, Any] = {}
    rows = []

    def measure(rate: float, with_bulk: bool) -> dict[str, float]:
        with bulk(server.url, with_bulk) as tokens:
            before, used, started = tokens.value, cpu_s(), time.monotonic()
            with OpenLoop(server.url, [("text", each) for each in ready], rate, options.seconds) as load:
                time.sleep(options.seconds)
                took = time.monotonic() - started
                found = {"tokens": (tokens.value - before) / took, "cores": (cpu_s() - used) / took}
        if rate >= 1:
            assert all(record.status == 200 for record in load.records)
            found |= {f"p{q}": quantile(latencies(load.records), q / 100) for q in (50, 90, 99)}
        return found

    try:
        ready = requests(server.url, server.path, [{"input": text} for text in TEXTS])
        peak = run_closed(server.url, ready, 16, options.seconds, warm=5).rate
        figures["peak"] = peak
        for load in map(float, options.loads.split(",")):
            found: dict[str, list[dict[str, float]]] = {"without": [], "with": [], "alone": []}
            for kind in peers.order(list(found), options.rounds):
                found[kind].append(measure(0.01 if kind == "alone" else load * peak, kind != "without"))
            figures[str(load)] = found
            pairs = list(zip(found["without"], found["with"], found["alone"], strict=True))
            ratios = [peers.median([b[q] / a[q] for a, b, _ in pairs]) for q in ("p50", "p90", "p99")]
            idle = [1 - a["cores"] / c["cores"] for a, _, c in pairs]
            batch = [b["tokens"] / c["tokens"] for _, b, c in pairs]
            p99, speed = (peers.median([each[name] for each in found["with"]]) for name in ("p99", "tokens"))
            of_idle = peers.median([got / left for got, left in zip(batch, idle, strict=True)])
            name = f"{load:g} of {peak:.0f}/s"
            rows.append((name, p99, *ratios, speed, peers.median(idle), peers.median(batch), of_idle))
    finally:
        server.end()
    peers.table(("load", "p99 ms", "p50 x", "p90 x", "p99 x", "bulk tokens/s", "idle", "batch", "of idle"), rows)
    peers.write(options.json, figures)


if __name__ == "__main__":
    main()
