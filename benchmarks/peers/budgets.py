"""What three servers spend of ten budgets until nothing is left, while servers, relays, broker and ledger are killed.

    python benchmarks/peers/budgets.py [--requests 10000] [--keys 10] [--no-kills] [--json FILE]

Clients send requests of random cost for random keys to random servers (with the echo engine, NATS and PostgreSQL). The
oracle is the sum of what clients received, at the prices of the script. It fails if a key spends more than its budget
and two requests, if a request is rejected although it fits, or if headers, ledger and invoice differ.
"""

from __future__ import annotations

import asyncio
import csv
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import peers

sys.path.insert(0, str(peers.ROOT))

from inferctl.config.budget import amount
from inferctl.tenancy.fleet.key_store import KeyStore
from inferctl.tenancy.metering.ledger import Ledger
from tests.processes import ServerProcess, start, until
from tests.tenancy.key_files import add
from tests.tenancy.parts import Nats, Postgres

PRICES = """prices:
  - {hardware: "*", currency: EUR, from: 2026-01-01, input: 1000, cached: 100}
"""
INPUT, CACHED, MOST_WORDS, CLIENTS = 1_000_000, 100_000, 120, 16  # billionths for each token
# What is not an error: one request more for each other server, and what is uncertain.
_MAY_BE = (
    "above the budget, received by clients",
    "above the budget, in the ledger",
    "left at budget_pending",
    "received and not in the ledger",  # events of the last 20 ms before a SIGKILL
    "in flight at kills",
)
WORDS = ("sea", "sun", "tree", "road", "door", "bird")


@dataclass
class Account:
    """What clients know of a key. `uncertain`: the most that requests without a response can cost."""

    id: str
    secret: str
    spent: int = 0
    in_flight: int = 0
    uncertain: int = 0
    largest: int = 0
    early: int = 0  # what was left at a `budget_pending`, at most
    done: int = 0  # servers in a row that rejected one token


class Fleet:
    """Three servers with their folders, a broker, and a database for keys and ledger."""

    def __init__(
        self, folder: Path, model: Path, nats: Nats, postgres: Postgres, setenv: Callable[[str, str], None]
    ) -> None:
        self.folder, self.model, self.random = folder, str(model), random.Random(7)
        self.nats, self.postgres = nats, postgres
        self.keys, self.ledger = self.postgres.url(), self.postgres.url()
        (folder / "prices.yaml").write_text(PRICES)
        access = {"KEYS": self.keys, "BROKER": self.nats.url, "REPLICAS": "3", "OPEN": "[metrics]"}
        metering = {"MODE": "required", "LEDGER": self.ledger, "PRICES": str(folder / "prices.yaml")}
        for section, settings in (("ACCESS", access), ("METERING", metering), ("CACHE", {"SIZE": "16MiB"})):
            for name, value in settings.items():
                setenv(f"INFERCTL_{section}_{name}", value)
        self.servers = [self.start(number) for number in range(3)]
        self.kills = Counter[str]()

    def start(self, number: int) -> ServerProcess:
        folder = self.folder / f"machine{number}"
        folder.mkdir(exist_ok=True)
        return start(folder, "--model", self.model, "--engine", "echo", "--name", "echo")

    def accounts(self, count: int, budget: str) -> list[Account]:
        store = KeyStore.open(self.keys)
        made = [add(self.folder / "keys.json", f"key{number}", budget=budget) for number in range(count)]
        with store.edit() as found:
            found.update({key.id: key for key, _ in made})
        store.close()
        until(lambda: all(one.get("/v1/models", made[-1][1]).status_code == 200 for one in self.servers))
        return [Account(key.id, secret) for key, secret in made]

    async def trouble(self, pause_s: float, accounts: list[Account], limit: int) -> None:
        """Kill one part after another, and start it again, until 99% is spent: the rest needs all servers."""
        kinds = ["server", "relay", "broker", "ledger"]
        while any(account.spent < limit * 0.99 for account in accounts):
            await asyncio.sleep(pause_s)
            kind = kinds[sum(self.kills.values()) % len(kinds)]
            self.kills[kind] += 1
            number = self.random.randrange(3)
            if kind == "server":
                await asyncio.to_thread(self.servers[number].kill)
                self.servers[number] = await asyncio.to_thread(self.start, number)
            elif kind == "relay":
                for pid in self.servers[number].children("inferctl.tenancy.relay"):
                    os.kill(pid, signal.SIGKILL)
            else:
                part = self.nats if kind == "broker" else self.postgres
                await asyncio.to_thread(part.kill)
                await asyncio.sleep(1)
                await asyncio.to_thread(part.start)

    def end(self) -> None:
        for server in self.servers:
            server.stop()


async def send(client: httpx.AsyncClient, fleet: Fleet, account: Account, limit: int, found: Counter[str]) -> None:
    """Send one request, and hold what comes of it against what is known."""
    words = 1 if account.done else fleet.random.randint(1, MOST_WORDS)
    text = " ".join(fleet.random.choice(WORDS) for _ in range(words))
    most = (words + 2) * INPUT  # [CLS] and [SEP]
    account.in_flight += most
    account.largest = max(account.largest, most)
    number = fleet.random.randrange(3) if not account.done else account.done % 3
    try:
        body, headers = {"input": text}, {"authorization": f"Bearer {account.secret}"}
        response = await client.post(f"{fleet.servers[number].url}/v1/embeddings", json=body, headers=headers)
    except httpx.HTTPError as error:
        account.uncertain += 0 if isinstance(error, httpx.ConnectError) else most
        found["no response"] += 1
        await asyncio.sleep(0.1)
        return
    finally:
        account.in_flight -= most
    code = str(response.status_code) if response.is_success else response.json()["error"]["code"]
    found[code] += 1
    if response.is_success:
        tokens, cached = (int(response.headers.get(f"x-inferctl-{name}", 0)) for name in ("tokens", "cached-tokens"))
        account.spent += (tokens - cached) * INPUT + cached * CACHED
    elif code == "budget_exceeded":
        if account.spent + account.in_flight + account.uncertain + most <= limit:
            found["FALSE 429"] += 1
        account.done += 1
    elif code == "budget_pending":
        account.early = max(account.early, limit - account.spent - account.in_flight - account.uncertain - most)
        await asyncio.sleep(0.2)
    elif code == "budget_unavailable":
        await asyncio.sleep(0.2)
    elif response.status_code >= 500:
        account.uncertain += most
        await asyncio.sleep(0.1)


async def spend(fleet: Fleet, accounts: list[Account], limit: int, *, pause_s: float | None) -> Counter[str]:
    found = Counter[str]()
    trouble = asyncio.create_task(fleet.trouble(pause_s, accounts, limit)) if pause_s else None

    async def work(client: httpx.AsyncClient) -> None:
        while left := [account for account in accounts if account.done < 6]:
            await send(client, fleet, fleet.random.choice(left), limit, found)

    async with httpx.AsyncClient(timeout=30) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
    if trouble:
        await trouble
    return found


def spent_of(server: ServerProcess, secret: str) -> int:
    """Return what a server says that a key spent. The request costs nothing more: nothing is left."""
    found = server.post("/v1/embeddings", {"input": "sea"}, secret).headers["x-inferctl-budget"]
    return int(dict(part.split("=") for part in found.split(", "))["spent"].replace(".", ""))


def compare(fleet: Fleet, accounts: list[Account], limit: int) -> dict[str, int]:
    """Return what clients, headers, ledger and invoice say, when all events have arrived, in billionths."""
    until(lambda: all(server.metric("inferctl_outbox_events") <= 1 for server in fleet.servers), 60)
    time.sleep(3)  # the newest totals reach the servers
    options = ("usage", "--by", "key", "--format", "csv", "--ledger", fleet.ledger)
    done = subprocess.run(
        [sys.executable, "-m", "inferctl", *options], check=True, cwd=fleet.folder, stdout=-1, text=True
    )
    invoice, in_ledger = Counter[str](), Counter[str]()
    for row in csv.DictReader(io.StringIO(done.stdout)):
        invoice[row["key"]] += int(Decimal(row["cost"]) * 10**9)
    ledger = Ledger.read(fleet.ledger)
    for key_id, _, _, _, units in ledger.budgets(time.time())["spent"]:
        in_ledger[key_id] += units
    ledger.close()
    found: dict[str, int] = {}
    for one in accounts:
        headers = [spent_of(server, one.secret) for server in fleet.servers]
        figures = {
            "above the budget, received by clients": one.spent - limit,
            "above the budget, in the ledger": in_ledger[one.id] - limit,
            "above the bound (budget and two requests)": in_ledger[one.id] - limit - 2 * one.largest,
            "left at budget_pending": one.early,
            "servers differ by": max(headers) - min(headers),
            "invoice and ledger differ by": abs(invoice[one.id] - in_ledger[one.id]),
            "headers and ledger differ by": max(abs(each - in_ledger[one.id]) for each in headers),
            "received and not in the ledger": one.spent - in_ledger[one.id],
            "in the ledger, and neither received nor in flight at a kill": in_ledger[one.id]
            - one.spent
            - one.uncertain,
            "in flight at kills": one.uncertain,
        }
        found = {name: max(value, found.get(name, value)) for name, value in figures.items()}
    return found


def measure(fleet: Fleet, requests: int, keys: int, pause_s: float | None) -> tuple[dict[str, Any], list[str]]:
    """Return figures in money, the highest of all keys, and what must not be."""
    limit = requests * MOST_WORDS // 2 // keys * INPUT
    accounts = fleet.accounts(keys, f"{amount(limit)} EUR/month")
    time.sleep(2)
    found = asyncio.run(spend(fleet, accounts, limit, pause_s=pause_s))
    differences = compare(fleet, accounts, limit)
    cent = INPUT * 10
    wrong = [name for name, value in differences.items() if name not in _MAY_BE and value > cent]
    wrong += ["a request was rejected although it fits"] if found["FALSE 429"] else []
    money = {name: value / 1e9 for name, value in differences.items()}
    return {
        "requests": found.total(),
        "keys": keys,
        "budget": limit / 1e9,
        **found,
        "kills": dict(fleet.kills),
        **money,
    }, wrong


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="budgets for about N requests")
    parser.add_argument("--keys", type=int, default=10, metavar="N", help="how many keys")
    parser.add_argument("--no-kills", action="store_true", help="kill nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="budgets-") as folder:
        Path(folder).chmod(0o755)
        nats, postgres = Nats(Path(folder) / "nats"), Postgres(Path(folder) / "pg")
        nats.start()
        postgres.start()
        fleet = Fleet(Path(folder), peers.MODEL, nats, postgres, os.environ.__setitem__)
        try:
            figures, wrong = measure(fleet, options.requests, options.keys, None if options.no_kills else 3.0)
        finally:
            fleet.end()
            nats.kill()
            postgres.kill()
    peers.table(("", "value"), list(figures.items()))
    peers.write(options.json, figures)
    sys.exit(f"error: {', '.join(wrong)}" if wrong else None)


if __name__ == "__main__":
    main()
