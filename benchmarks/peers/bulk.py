"""Measure what a batch costs those who wait: latency of interactive requests with and without bulk requests.

    python benchmarks/peers/bulk.py [--through url|batches|products] [--loads 0.2,0.5] [--seconds 15] [--rounds 6]

An open loop sends interactive requests, Poisson arrivals of single texts of about 50 tokens, at parts of what the
server can carry. In every second phase (A B B A), a batch runs in addition: `inferctl embed --url`, or with `--through
batches`, one of `/v1/batches` with a text per line. The sender of `--url` runs in idle time, because in production it
is elsewhere; what it uses counts for the batch. With `--through products`, nothing is sent: one process per core
multiplies matrices in idle time, which shows what any work in idle time costs those who wait on this machine.

- "p99 x": of all interactive requests with the batch, relative to without it, in one round; the median of rounds, and
  their range. The arrivals of a round are the same with and without it.
- "idle": which part of the CPU time that a batch alone gets is left without it, by all processes of this script.
- "batch": the tokens/s of the batch, relative to a batch without interactive requests.
- "of idle": the batch, relative to what was idle. The goal is 0.85.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import peers
from load import requests, run_closed
from recorder import OpenLoop, latencies, quantile

sys.path.insert(0, str(peers.ROOT))
TEXTS = peers.texts(4000, mean_tokens=50)
SHOWN = (("with", "p99"), ("alone", "tokens"))


def send_ranges(url: str) -> None:
    """Compute ranges of texts that never repeat, until the process ends."""
    from inferctl.bench.load.target import connect
    from inferctl.embed.computer import Progress, compute
    from inferctl.embed.remote import RemoteComputer

    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    async def run() -> None:
        computer = RemoteComputer(connect(url), truncate=True)
        await computer.start()
        for number in range(10**6):
            computed = await compute(computer, [f"{number} {text}" for text in TEXTS], Progress())
            assert not computed.errors, computed.errors

    asyncio.run(run())


def multiply() -> None:
    """Compute products of MiniLM's shape until the process ends."""
    import torch

    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(1)
    rows, matrix = torch.randn(512, 384).bfloat16(), torch.randn(384, 1536).bfloat16()
    while True:
        rows @ matrix


def start_batch(url: str) -> Callable[[], object]:
    """Start a batch of 40,000 texts, and return what ends it."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    body = {"method": "POST", "url": "/v1/embeddings"}
    lines = [body | {"custom_id": f"{n}", "body": {"input": f"{n} {TEXTS[n % len(TEXTS)]}"}} for n in range(40_000)]
    file = client.files.create(file=("lines.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")

    def end() -> None:
        client.batches.cancel(batch.id)
        peers.wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled")

    return end


@contextlib.contextmanager
def bulk(server: peers.Server, through: str) -> Iterator[None]:
    """Run a batch."""
    before = tokens(server)
    if through == "batches":
        ends: list[Callable[[], object]] = [start_batch(server.url)]
    else:
        count, target, of = (1, send_ranges, (server.url,)) if through == "url" else (os.cpu_count() or 1, multiply, ())
        running = [multiprocessing.Process(target=target, args=of, daemon=True) for _ in range(count)]
        for process in running:
            process.start()
        ends = [process.terminate for process in running]
    if through == "products":
        time.sleep(5)  # both import torch
    else:
        peers.wait_until(lambda: tokens(server) > before + 20_000)
    yield
    for end in ends:
        end()
    time.sleep(2)  # what is in flight ends before the next phase, in which it would raise the p99 without a batch


def tokens(server: peers.Server) -> float:
    """Return the tokens of all requests so far."""
    return peers.metrics(server)["inferctl_tokens_total"]


def cpu_s() -> float:
    """Return the CPU seconds of this process, the server and the batch so far."""
    return peers.cpu_s(peers.processes(os.getpid()))


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=15, rounds=6)
    parser.add_argument("--loads", default="0.2,0.5", help="interactive load as parts of the peak, with commas")
    ways = ("url", "batches", "products")
    parser.add_argument("--through", default="url", choices=ways, help="what runs in addition")
    parser.add_argument("--checkout", type=Path, default=peers.ROOT, help="folder of the project that serves")
    options = parser.parse_args()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["INFERCTL_SERVE_BATCHES_FOLDER"] = folder.name
    server = peers.inferctl(peers.free_port(), name="inferctl-bulk", checkout=options.checkout.resolve())
    with contextlib.suppress(PermissionError):  # else the load generator waits for cores, as no client elsewhere does
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    figures: dict[str, Any] = {}
    rows = []

    def measure(rate: float, with_bulk: bool, seed: int) -> dict[str, float]:
        with bulk(server, options.through) if with_bulk else contextlib.nullcontext():
            before, used, started = tokens(server), cpu_s(), time.monotonic()
            with OpenLoop(server.url, ready, rate, options.seconds, seed) as load:
                time.sleep(options.seconds)
                took = time.monotonic() - started
                found = {"tokens": (tokens(server) - before) / took, "cores": (cpu_s() - used) / took}
        if rate >= 1:
            assert all(record.status == 200 for record in load.records)
            found["rate"] = len(load.records) / took
            found |= {f"p{q}": quantile(latencies(load.records), q / 100) for q in (50, 90, 99)}
        return found

    try:
        ready = requests(server.url, server.path, [{"input": text} for text in TEXTS])
        peak = run_closed(server.url, ready, 16, options.seconds, warm=5).rate
        figures["peak"] = peak
        for load in map(float, options.loads.split(",")):
            found: dict[str, list[dict[str, float]]] = {"without": [], "with": [], "alone": []}
            for number, kind in enumerate(peers.order(list(found), options.rounds)):
                rate = 0.01 if kind == "alone" else load * peak
                found[kind].append(measure(rate, kind != "without", number // len(found)))
            figures[str(load)] = found
            pairs = list(zip(found["without"], found["with"], found["alone"], strict=True))
            by_round = [[b[q] / a[q] for a, b, _ in pairs] for q in ("p50", "p90", "p99")]
            spread = f"{min(by_round[-1]):.2f} to {max(by_round[-1]):.2f}"
            idle = [1 - a["cores"] / c["cores"] for a, _, c in pairs]
            length = sum(a["tokens"] for a, _, _ in pairs) / sum(a["rate"] for a, _, _ in pairs)
            batch = [(b["tokens"] - length * b["rate"]) / c["tokens"] if c["tokens"] else 0.0 for _, b, c in pairs]
            p99, speed = (peers.median([b[name] for b in found[kind]]) for kind, name in SHOWN)
            of_idle = peers.median([got / left for got, left in zip(batch, idle, strict=True)])
            name = f"{load:g} of {peak:.0f}/s"
            ratios = (*map(peers.median, by_round), spread, speed)
            rows.append((name, p99, *ratios, peers.median(idle), peers.median(batch), of_idle))
    finally:
        server.end()
        folder.cleanup()
    head = ("load", "p99 ms", "p50 x", "p90 x", "p99 x", "rounds", "alone, tokens/s", "idle", "batch", "of idle")
    peers.table(head, rows)
    peers.write(options.json, figures)


if __name__ == "__main__":
    main()
