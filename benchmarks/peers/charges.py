"""What usage events charge, next to what engines computed, for clients of every kind.

    python benchmarks/peers/charges.py [--requests 10000] [--engine echo] [--cpu-of-budgets] [--json FILE]

One server with a cache gets many requests: equal ones in flight, repeated ones, ones that share some inputs, clients
that leave with FIN or RST, and half-closed ones. With the echo engine, some inputs fail, are slow or crash the engine.
The script then compares the ledger with what the engines computed, and fails if they differ. With `--cpu-of-budgets`
it measures the CPU time of limits and budgets alone: of two equal keys, and of one with a budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

import peers

sys.path.insert(0, str(peers.ROOT))

from inferctl.config.budget import parse
from inferctl.serve.backend.charges import GenerationCharges
from inferctl.serve.work import Caller
from inferctl.tenancy.access.budgets import TOTALS_FILE, Budgets
from inferctl.tenancy.access.limits import Limiter
from inferctl.tenancy.metering import prices

CLIENTS = 64
_WAIT_S = 300  # on a busy machine, the relay needs more than a minute to start


def totals(folder: Path) -> dict[str, Any]:
    """Return the sums of the ledger, and how many requests each status has."""
    with sqlite3.connect(f"file:{folder}/ledger.sqlite?mode=ro", uri=True, timeout=30) as ledger:
        sums = "sum(requests), sum(input_tokens - cached_tokens), sum(cached_tokens), sum(engine_ms) / 1000"
        row = ledger.execute(f"select {sums} from usage_events").fetchone()
        statuses = dict(ledger.execute("select status, sum(requests) from usage_events group by status"))
        left = ledger.execute("select sum(input_tokens) from usage_events where status = 499").fetchone()[0]
    names = ("requests_in_ledger", "charged_tokens", "cached_tokens", "charged_engine_s")
    return {**dict(zip(names, row, strict=True)), "charged_tokens_of_leavers": left, "statuses": statuses}


def mixed_bodies(count: int, faults: bool) -> list[dict[str, Any]]:
    """Return bodies of which many are equal or share inputs. `faults`: for the echo engine (see `engines/echo.py`)."""
    random_, ids = random.Random(11), [peers.token_ids(text) for text in peers.texts(count)]
    bodies: list[dict[str, Any]] = []
    for number in range(count):
        share = random_.random()
        if share < 0.4:
            rows = [ids[random_.randrange(10)]]
        elif share < 0.7:
            rows = [ids[number], *(ids[random_.randrange(number + 1)] for _ in range(random_.randrange(1, 20)))]
        else:
            rows = [ids[number]]
        if faults and number % 50 == 25:
            rows = [*rows, [(13, 14, 16, 16)[number // 50 % 4], number % 1000]]
        elif faults and number % 2000 == 1050:
            rows = [*rows, [15, number % 1000]]
        bodies.append({"input": rows})
    return bodies


async def send_mixed(url: str, bodies: list[dict[str, Any]], leave_s: float) -> None:
    """Send all requests with clients that stay, end their sending side, or leave within `leave_s`, by FIN or RST."""
    random_, address, slots = random.Random(12), urllib.parse.urlsplit(url), asyncio.Semaphore(CLIENTS)

    async def send(body: dict[str, Any], kind: str, control: str, wait_s: float) -> None:
        content = json.dumps(body).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncache-control: {control}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        async with slots:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            with contextlib.suppress(ConnectionError):
                writer.write(head.encode() + content)
                await writer.drain()
                if kind == "half-closed":
                    writer.write_eof()
                if kind in ("FIN", "RST"):
                    await asyncio.sleep(wait_s)
                elif (await reader.read()).startswith(b"HTTP/1.1 503"):
                    await asyncio.sleep(1)  # an engine starts again
            if kind == "RST":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    kinds = random_.choices(("stays", "half-closed", "FIN", "RST"), (5, 1, 2, 2), k=len(bodies))
    controls = random_.choices(("", "no-cache", "no-store"), (18, 1, 1), k=len(bodies))
    each = zip(bodies, kinds, controls, strict=True)
    await asyncio.gather(*(send(*arguments, random_.uniform(0.001, leave_s)) for arguments in each))


def compare(count: int, engine: str) -> dict[str, Any]:
    """Return what the ledger has, next to what the engines computed."""
    folder = Path(tempfile.mkdtemp(prefix="metering-"))
    os.environ |= {"INFERCTL_METERING_MODE": "on", "INFERCTL_METERING_DATA": str(folder)}
    os.environ["INFERCTL_CACHE_SIZE"] = "256MiB"
    server = peers.inferctl(peers.free_port(), *(("--engine", "echo") if engine == "echo" else ()))
    try:
        asyncio.run(send_mixed(server.url, mixed_bodies(count, engine == "echo"), 0.05 if engine == "echo" else 1.0))
        peers.wait_until(lambda: peers.metrics(server)["inferctl_requests_in_flight"] == 0, _WAIT_S)

        def complete() -> bool:
            found = peers.metrics(server)
            finished = sum(value for name, value in found.items() if name.startswith("inferctl_requests_total"))
            return found["inferctl_outbox_events"] == 0 and totals(folder)["requests_in_ledger"] == finished

        peers.wait_until(complete, _WAIT_S)
        found = peers.metrics(server)
        computed, seconds = found["inferctl_batch_tokens_sum"], found["inferctl_batch_duration_seconds_sum"]
        return {"requests": count, "computed_tokens": int(computed), "engine_s": seconds, **totals(folder)}
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


def cpu_of_budgets(count: int) -> dict[str, Any]:
    """Return the CPU time (us) of what a server does for limits and budgets of a request, in alternating order.

    `more`: of a key with a budget, `same`: of an equal key without one; each the median of blocks of 200 requests, and
    its 95% interval.
    """
    folder = Path(tempfile.mkdtemp(prefix="budgets-"))
    (folder / "prices.yaml").write_text('prices: [{hardware: "*", currency: EUR, from: 2026-01-01, input: 1}]')
    budgets = Budgets({}, prices.read_all(folder / "prices.yaml"), folder)
    budgets.open("a", time.time())
    (folder / TOTALS_FILE).write_text(json.dumps({"at": time.time(), "totals": {"spent": [], "ended": []}}))
    budgets.read_totals(time.time())
    charges = GenerationCharges(Limiter(), budgets)
    limits = 10**9, 10**9
    callers = {name: Caller(name, limits) for name in ("first", "second")}
    callers["budget"] = Caller("budget", limits, budgets=(parse("budget", "1000 EUR/month"),))
    used: dict[str, list[float]] = {name: [] for name in callers}
    for block in range(count // 200):
        for name in sorted(callers, reverse=block % 2 == 1):
            caller, before = callers[name], time.thread_time_ns()
            for number in range(200):
                charges.charge(number, caller, 100)
                charges.reserve(number, 20)
                charges.hold(number, caller, "m", 10, 10)
                found = charges.settle(number, 10, 0, 10)
                charges.end(number)
                if found:
                    found.header()
            used[name].append((time.thread_time_ns() - before) / 200_000)
    shutil.rmtree(folder)

    def difference(one: str) -> list[float]:
        pairs = sorted(a - b for a, b in zip(used[one], used["second"], strict=True))
        edge = int(len(pairs) / 2 - 0.98 * len(pairs) ** 0.5)
        return [round(each, 2) for each in (statistics.median(pairs), pairs[edge], pairs[-1 - edge])]

    medians = {name: round(statistics.median(times), 2) for name, times in used.items()}
    return {"requests": count, **medians, "same": difference("first"), "more": difference("budget")}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="send N requests")
    parser.add_argument("--engine", choices=("model", "echo"), default="model", help="of the server")
    parser.add_argument("--cpu-of-budgets", action="store_true", help="measure the CPU time of a request with a budget")
    options = parser.parse_args()
    if options.cpu_of_budgets:
        figures = cpu_of_budgets(options.requests)
        peers.table(("", "us"), list(figures.items()))
        peers.write(options.json, figures)
        return
    figures = compare(options.requests, options.engine)
    peers.table(("", "value"), list(figures.items()))
    peers.write(options.json, figures)
    exact = figures["computed_tokens"] == figures["charged_tokens"]
    # An event has whole microseconds.
    close = abs(figures["engine_s"] - figures["charged_engine_s"]) <= 1e-6 * figures["requests_in_ledger"]
    sys.exit(None if exact and close else "error: the ledger and the engines differ")


if __name__ == "__main__":
    main()
