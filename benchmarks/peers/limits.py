"""Limits and revoked keys on three servers that share NATS and PostgreSQL, and a flood of random keys at one of them.

    python benchmarks/peers/limits.py [--seconds 130] [--revocations 50] [--flood 10000] [--json FILE] [PART ...]

The parts are `limits`, `revocation` and `flood`; default: all. Needs the programs nats-server and PostgreSQL.

limits: ten times the limit of a key is offered to three servers with the echo engine, in an open loop: evenly, to one
server only, and in bursts of eight seconds' worth at once. Then evenly, while the broker is stopped (SIGSTOP) after a
third of the time, and while it never runs. "Worst 60 s" is the largest number of admitted requests in any 60 s, by the
times at which their responses arrived at the one client, so it contains its own scheduling delays.

revocation: from before the key is changed in the store until each of the three servers has answered 401, which a client
asks every 5 ms.

flood: a client with a valid key, in a closed loop, alone and next to random keys; and next to as many requests for
/livez, which need no key. The transactions of PostgreSQL are counted in each phase. There is no bar: read the figures.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import load
import peers

sys.path.insert(0, str(peers.ROOT))

from inferctl.cli.key_place import Place
from inferctl.config.spec import Access
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey, StoredDigest
from inferctl.tenancy.fleet.key_store import KeyStore
from tests.tenancy.parts import Nats, Postgres

SERVERS, LIMIT, TIMES = 3, 600, 10
PORT = 18531
MAX_EXCESS = 1.05
BARS_S = {"with broker": 1.0, "without broker": 30.0}


class Fleet:
    """Three servers, each with a folder and a relay of its own, as on three machines."""

    def __init__(self, folder: Path) -> None:
        self.nats, self.postgres = Nats(folder / "nats"), Postgres(folder / "postgres")
        self.nats.start()
        self.postgres.start()
        self.address = self.postgres.url()
        self.store = KeyStore.open(self.address)
        self.place = Place(Access(keys=self.address, broker=self.nats.url))
        os.environ |= {
            "PYTHONPATH": str(peers.ROOT),
            "INFERCTL_ACCESS_KEYS": self.address,
            "INFERCTL_ACCESS_BROKER": self.nats.url,
            "INFERCTL_ACCESS_REPLICAS": str(SERVERS),
        }
        self.servers: list[peers.Server] = []
        for number in range(SERVERS):
            os.environ["INFERCTL_ACCESS_DATA"] = str(folder / f"access{number}")
            arguments = ("--engine", "echo", "--name", "echo")
            self.servers.append(peers.inferctl(PORT + number, *arguments, name=f"limits {number}"))

    def end(self) -> None:
        for server in self.servers:
            server.end()
        self.nats.kill()
        self.postgres.kill()

    def add(self, **fields: Any) -> tuple[str, str]:
        """Create a key, and return its id and text when all servers accept it."""
        key_id = keys.new_id()
        secret = keys.generate(key_id)
        digests = [StoredDigest(sha256=keys.digest(secret.encode()).hex())]
        with self.store.edit() as found:
            found[key_id] = ApiKey(id=key_id, name="k", digests=digests, created=key_file.now(), **fields)
        peers.wait_until(lambda: all(status(server, secret) == 200 for server in self.servers))
        return key_id, secret

    def wait_until_shared(self) -> None:
        """Wait until the servers hear of each other: then they show the whole limit of a key."""
        _, secret = self.add(requests_per_minute=1_000_000)
        body = {"json": {"input": [1, 2]}, "headers": {"authorization": f"Bearer {secret}"}}

        def shared() -> bool:
            found = [httpx.post(f"{server.url}{server.path}", **body).headers for server in self.servers]
            return all(each["x-ratelimit-limit-requests"] == "1000000" for each in found)

        peers.wait_until(shared)

    def commits(self) -> int:
        """Return how many transactions PostgreSQL has committed in the database of the keys."""
        with self.store._engine.connect() as connection:
            query = "select xact_commit from pg_stat_database where datname = current_database()"
            return int(connection.exec_driver_sql(query).scalar_one())


def status(server: peers.Server, secret: str) -> int:
    request = urllib.request.Request(f"{server.url}/v1/models", headers={"authorization": f"Bearer {secret}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


async def offer(servers: list[peers.Server], secret: str, times: list[tuple[float, int]]) -> list[float]:
    """Send a request at each time (s) to the server with that number; return when the admitted ones ended (s)."""
    admitted, waiting = list[float](), set[asyncio.Future[None]]()
    ready = [
        load.requests(server.url, server.path, [{"input": [101, 102]}], {"authorization": f"Bearer {secret}"})[0]
        for server in servers
    ]
    free: list[list[load._Connection]] = [[await load._connect(s.url) for _ in range(16)] for s in servers]
    begin = time.perf_counter()
    for at, index in times:
        if (pause := begin + at - time.perf_counter()) > 0:
            await asyncio.sleep(pause)
        connections = free[index]
        while connections and connections[-1].transport.is_closing():
            connections.pop()
        connection = connections.pop() if connections else await load._connect(servers[index].url)
        done = asyncio.get_running_loop().create_future()

        def on_response(found: int, c: Any = connection, d: Any = done, i: int = index) -> None:
            assert found in (200, 429), f"status {found}"
            if found == 200:
                admitted.append(time.perf_counter() - begin)
            free[i].append(c)
            if not d.done():
                d.set_result(None)

        connection.on_response = on_response
        waiting.add(done)
        done.add_done_callback(waiting.discard)
        connection.send(ready[index])
    if waiting:
        await asyncio.wait(list(waiting), timeout=30)
    for each in free:
        load._close(each)
    return sorted(admitted)


def worst(admitted: list[float]) -> int:
    """Return the largest number of admitted requests in any 60 s."""
    found = first = 0
    for last, at in enumerate(admitted):
        while admitted[first] <= at - 60:
            first += 1
        found = max(found, last - first + 1)
    return found


def arrivals(shape: str, seconds: float) -> list[tuple[float, int]]:
    """Return times and servers of ten times the limit."""
    rate = TIMES * LIMIT / 60
    if shape == "bursts":
        each = int(rate * 8)
        return [(start, number % SERVERS) for start in range(0, int(seconds), 8) for number in range(each)]
    one = shape == "one server"
    return [(number / rate, 0 if one else number % SERVERS) for number in range(int(rate * seconds))]


def measure_limits(fleet: Fleet, seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for shape in ("even", "one server", "bursts", "broker stops", "no broker"):
        if shape == "no broker":
            fleet.nats.kill()
            time.sleep(5)
        else:
            fleet.wait_until_shared()
        _, secret = fleet.add(requests_per_minute=LIMIT)
        timer = None
        if shape == "broker stops":
            timer = threading.Timer(seconds / 3, fleet.nats.signal, (signal.SIGSTOP,))
            timer.start()
        admitted = asyncio.run(offer(fleet.servers, secret, arrivals(shape, seconds)))
        if timer:
            timer.join()
            fleet.nats.signal(signal.SIGCONT)
        figures[shape] = {"admitted": len(admitted), "worst_60_s": worst(admitted), "share": worst(admitted) / LIMIT}
    fleet.nats.start()
    rows = [(name, each["admitted"], each["worst_60_s"], each["share"]) for name, each in figures.items()]
    print(f"limit {LIMIT} requests per minute, {TIMES}x offered for {seconds:g} s to {SERVERS} servers")
    peers.table(("load", "admitted", "worst 60 s", "of the limit"), rows)
    return figures


def measure_revocation(fleet: Fleet, count: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in BARS_S:
        if name == "without broker":
            fleet.nats.kill()
        found = sorted(seconds_until_rejected(fleet) for _ in range(count))
        p99 = found[min(len(found) - 1, int(0.99 * len(found)))]
        figures[name] = {"count": count, "p50_s": peers.median(found), "p99_s": p99, "max_s": found[-1]}
        if name == "without broker":
            fleet.nats.start()
    print(f"\nrevocation on {SERVERS} servers, seconds until the last one rejects the key")
    rows = [(name, each["count"], each["p50_s"], each["p99_s"], each["max_s"]) for name, each in figures.items()]
    peers.table(("", "keys", "p50 (s)", "p99 (s)", "max (s)"), rows)
    return figures


def seconds_until_rejected(fleet: Fleet) -> float:
    key_id, secret = fleet.add()
    begin = time.perf_counter()
    with fleet.place.edit() as found:
        found[key_id] = found[key_id].model_copy(update={"revoked": key_file.now(), "digests": []})
    publishing = threading.Thread(target=fleet.place.publish, args=([key_id],))
    publishing.start()
    waiting = list(fleet.servers)
    while waiting:
        waiting = [server for server in waiting if status(server, secret) != 401]
        time.sleep(0.005 if waiting else 0)
    seconds = time.perf_counter() - begin
    publishing.join()
    return seconds


def measure_flood(fleet: Fleet, rate: float, seconds: float, rounds: int) -> dict[str, Any]:
    _, secret = fleet.add()
    server = fleet.servers[0]
    valid = load.requests(server.url, server.path, [{"input": [101, 102]}], {"authorization": f"Bearer {secret}"})
    found: dict[str, list[tuple[load.Outcome, float, int]]] = {name: [] for name in ("alone", "livez", "random keys")}
    for name in peers.order(list(found), rounds):
        flood = None
        if name != "alone":
            command = [sys.executable, __file__, "send", server.url, str(rate), str(seconds + 1), name]
            flood = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert flood.stdout and flood.stdout.readline() == "ready\n"
        before = fleet.commits()
        outcome = load.run_closed(server.url, valid, 4, seconds - 1, warm=0.5)
        commits = fleet.commits() - before
        sent = float(flood.communicate()[0]) if flood else 0.0
        assert set(outcome.statuses) == {200}, outcome.statuses
        found[name].append((outcome, sent, commits))
    figures = {
        name: {
            "flood_rate": peers.median([sent for _, sent, _ in each]),
            "rate": peers.median([outcome.rate for outcome, _, _ in each]),
            "p50_ms": peers.median([outcome.quantile(0.5) for outcome, _, _ in each]),
            "p99_ms": peers.median([outcome.quantile(0.99) for outcome, _, _ in each]),
            "commits": peers.median([commits for _, _, commits in each]),
        }
        for name, each in found.items()
    }
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    driver = "psycopg" in maps or "libpq" in maps
    print(f"\na client with a valid key at one server, next to a flood; driver of the store in the server: {driver}")
    head = ("flood", "flood/s", "requests/s", "p50 (ms)", "p99 (ms)", "commits in PostgreSQL (of three relays)")
    peers.table(head, [(name, *each.values()) for name, each in figures.items()])
    return {**figures, "driver_in_server": driver}


def send_flood(url: str, rate: float, seconds: float, what: str) -> None:
    """Send requests that need no engine at `rate`. Print `ready`, and at the end how many per second got a response.

    If the server or this process is too slow for `rate`, the time is longer than `seconds`.
    """
    if what == "livez":
        host = url.removeprefix("http://")
        ready = [f"GET /livez HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()]
    else:
        bearers = (f"ik_live_{secrets.token_hex(6)}_{secrets.token_urlsafe(36)}" for _ in range(100_000))
        ready = [
            load.requests(url, "/v1/embeddings", [{"input": [1]}], {"authorization": f"Bearer {each}"})[0]
            for each in bearers
        ]
    print("ready", flush=True)
    begin = time.perf_counter()
    outcome = load.run_open(url, ready, rate, seconds)
    print(sum(outcome.statuses.values()) / (time.perf_counter() - begin))


def main() -> None:
    if sys.argv[1:2] == ["send"]:
        send_flood(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
        return
    parser = peers.options(__doc__ or "")
    parser.add_argument("parts", nargs="*", metavar="PART", help="limits, revocation, flood; default: all")
    parser.add_argument("--revocations", type=int, default=50)
    parser.add_argument("--flood", type=float, default=10_000, help="random keys per second")
    parser.set_defaults(seconds=130, rounds=2)
    options = parser.parse_args()
    parts = options.parts or ["limits", "revocation", "flood"]
    with tempfile.TemporaryDirectory(prefix="limits-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        fleet = Fleet(Path(folder))
        figures: dict[str, Any] = {}
        try:
            if "limits" in parts:
                figures["limits"] = measure_limits(fleet, options.seconds)
            if "revocation" in parts:
                figures["revocation"] = measure_revocation(fleet, options.revocations)
            if "flood" in parts:
                figures["flood"] = measure_flood(fleet, options.flood, min(options.seconds, 8), options.rounds)
        finally:
            fleet.end()
    failed = [f"limits, {name}" for name, each in figures.get("limits", {}).items() if each["share"] > MAX_EXCESS]
    revoked = figures.get("revocation", {})
    failed += [f"revocation, {name}" for name, each in revoked.items() if each["p99_s"] > BARS_S[name]]
    figures["failed"] = failed
    print(f"\nNOT MET: {'; '.join(failed)}" if failed else "\nall bars of limits and revocation are met, if measured")
    peers.write(options.json, figures)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
