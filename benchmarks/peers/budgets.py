"""What three servers spend of ten budgets until nothing is left, while servers, relays, broker and ledger are killed.

    python benchmarks/peers/budgets.py [--requests 10000] [--keys 10] [--no-kills] [--json FILE]

Clients send requests of random cost for random keys to random servers (with the echo engine, NATS and PostgreSQL). The
oracle is the sum of what clients received, at the prices of the script. It fails if a key spends more than its budget
and two requests, if a request is rejected although it fits, or if headers, ledger and invoice differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import peers

sys.path.insert(0, str(peers.ROOT))

from inferctl.tenancy.fleet.key_store import KeyStore
from inferctl.tenancy.metering.ledger import Ledger
from tests.processes import ServerProcess, start, until
from tests.tenancy.key_files import add
from tests.tenancy.parts import Nats, Postgres

PRICES = """prices:
  - {hardware: "*", currency: EUR, from: 2026-01-01, input: 1000, cached: 100}
"""
INPUT, CACHED, MOST_WORDS, CLIENTS = 1_000_000, 100_000, 120, 16  # billionths for each token
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

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model, self.random = folder, model, random.Random(7)
        self.nats, self.postgres = Nats(folder / "nats"), Postgres(folder / "pg")
        self.nats.start()
        self.postgres.start()
        self.keys, self.ledger = self.postgres.url(), self.postgres.url()
        (folder / "prices.yaml").write_text(PRICES)
        access = {"KEYS": self.keys, "BROKER": self.nats.url, "REPLICAS": "3", "OPEN": "[metrics]"}
        metering = {"MODE": "required", "LEDGER": self.ledger, "PRICES": str(folder / "prices.yaml")}
        os.environ |= {f"INFERCTL_ACCESS_{name}": value for name, value in access.items()}
        os.environ |= {f"INFERCTL_METERING_{name}": value for name, value in metering.items()}
        os.environ["INFERCTL_CACHE_SIZE"] = "16MiB"
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

    async def trouble(self, pause_s: float) -> None:
        """Kill one part after another, and start it again."""
        kinds = ["server", "relay", "broker", "ledger"]
        while True:
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
        self.nats.kill()
        self.postgres.kill()


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
    elif response.status_code >= 500:
        account.uncertain += most
        await asyncio.sleep(0.1)


async def spend(fleet: Fleet, accounts: list[Account], limit: int, *, pause_s: float | None) -> Counter[str]:
    found = Counter[str]()
    trouble = asyncio.create_task(fleet.trouble(pause_s)) if pause_s else None

    async def work(client: httpx.AsyncClient) -> None:
        while left := [account for account in accounts if account.done < 6]:
            await send(client, fleet, fleet.random.choice(left), limit, found)

    async with httpx.AsyncClient(timeout=30) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
    if trouble:
        while not fleet.postgres.process or fleet.postgres.process.poll() is not None:
            await asyncio.sleep(0.1)
        trouble.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await trouble
    return found


def header_units(server: ServerProcess, secret: str) -> int:
    found = server.post("/v1/embeddings", {"input": "sea"}, secret).headers["x-inferctl-budget-spent"]
    return int(found.replace(".", ""))


def compare(fleet: Fleet, accounts: list[Account]) -> dict[str, Any]:
    """Return what clients, headers, ledger and invoice say, when all events have arrived."""
    ledger = Ledger.read(fleet.ledger)

    def spent() -> dict[str, int]:
        totals = Counter[str]()
        for account, _, _, _, units in ledger.budgets(time.time())["spent"]:
            totals[account] += units
        return totals

    until(lambda: all(server.metric("inferctl_outbox_events") <= 1 for server in fleet.servers) or None, 60)
    time.sleep(3)  # the newest totals reach the servers
    in_ledger, headers = (
        spent(),
        [[header_units(each, account.secret) for each in fleet.servers] for account in accounts],
    )
    file = fleet.folder / "invoice.csv"
    options = ("usage", "--by", "key", "--invoice", str(file), "--ledger", fleet.ledger)
    subprocess.run(
        [sys.executable, "-m", "inferctl", *options], check=True, cwd=fleet.folder, stderr=subprocess.DEVNULL
    )
    invoice = Counter[str]()
    with file.open() as stream:
        for row in csv.DictReader(stream):
            invoice[row["key"]] += round(float(row["cost"]) * 1e9)
    ledger.close()
    return {
        "headers differ": sum(len(set(each)) > 1 for each in headers),
        "invoice - ledger (most)": max(abs(invoice[account.id] - in_ledger[account.id]) for account in accounts) / 1e9,
        "headers - ledger (most)": max(max(h) - in_ledger[a.id] for h, a in zip(headers, accounts, strict=True)) / 1e9,
        "clients - ledger (most)": max(account.spent - in_ledger[account.id] for account in accounts) / 1e9,
        "headers - clients (most)": max(max(h) - a.spent for h, a in zip(headers, accounts, strict=True)) / 1e9,
        "headers - clients (least)": min(min(h) - a.spent for h, a in zip(headers, accounts, strict=True)) / 1e9,
        "of these uncertain (most)": max(account.uncertain for account in accounts) / 1e9,
    }


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="budgets for about N requests")
    parser.add_argument("--keys", type=int, default=10, metavar="N", help="how many keys")
    parser.add_argument("--no-kills", action="store_true", help="kill nothing")
    options = parser.parse_args()
    limit = options.requests * MOST_WORDS // 2 // options.keys * INPUT
    with tempfile.TemporaryDirectory(prefix="budgets-") as folder:
        Path(folder).chmod(0o755)
        fleet = Fleet(Path(folder), peers.MODEL)
        try:
            accounts = fleet.accounts(options.keys, f"{limit // 10**9}.{limit % 10**9:09d} EUR/month")
            time.sleep(2)
            found = asyncio.run(spend(fleet, accounts, limit, pause_s=None if options.no_kills else 3.0))
            figures = {"requests": sum(found.values()), **found, **fleet.kills, **compare(fleet, accounts)}
        finally:
            fleet.end()
    over = max((account.spent - limit - 2 * account.largest) / 1e9 for account in accounts)
    figures |= {"budget": limit / 1e9, "above the bound (most)": over}
    figures |= {"left at budget_pending (most)": max(account.early for account in accounts) / 1e9}
    figures |= {"above the budget (most)": max(account.spent - limit for account in accounts) / 1e9}
    peers.table(("", "value"), list(figures.items()))
    peers.write(options.json, figures)
    lost = figures["of these uncertain (most)"]
    same = not figures["headers differ"] and figures["invoice - ledger (most)"] < 0.01
    same = same and figures["headers - clients (least)"] > -0.01 and figures["headers - clients (most)"] < lost + 0.01
    sys.exit(None if over <= 0 and same and not found["FALSE 429"] else "error: a budget does not hold")


if __name__ == "__main__":
    main()
