"""How long another key and `/livez` wait while one key sends what costs vLLM much.

    VENV/bin/python benchmarks/peers/generation_abuse.py MODEL [--rounds 3] [--json FILE]

Run it with a Python that has vLLM and inferctl; it takes about ten minutes on two cores. It starts a server with two
keys. In each round, a process of its own sends each attack with the first key, and this process sends one chat of
the second key at a time, and `GET /livez` every 0.1 s. The first key may use 1,000 tokens per minute for `tokenize`,
and any number for the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import peers
from generation_failures import Server

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
LONGEST_S = 120.0


def sequences(number: int) -> tuple[str, list[bytes]]:
    """Six requests of `number` sequences each."""
    body = CHAT | {"max_tokens": 200, "n": number}
    return "/v1/chat/completions", [json.dumps(body).encode()] * 6


def tokenize() -> tuple[str, list[bytes]]:
    """200 texts of 78 KB for the tokenizer."""
    return "/tokenize", [json.dumps({"prompt": f"{n} " + "word and " * 8_600}).encode() for n in range(200)]


def messages() -> tuple[str, list[bytes]]:
    """Ten chats of 100,000 empty messages."""
    many = [{"role": "user", "content": ""}] * 100_000
    return "/v1/chat/completions", [json.dumps({"messages": many}, separators=(",", ":")).encode()] * 10


ATTACKS: dict[str, Callable[[], tuple[str, list[bytes]]]] = {
    "six requests with n: 1": lambda: sequences(1),
    "six requests with n: 64": lambda: sequences(64),
    "six requests with n: 128": lambda: sequences(128),
    "200 bodies of 78 KB to /tokenize": tokenize,
    "ten chats of 100,000 messages": messages,
}


def attack(name: str, url: str, secret: str, results: multiprocessing.SimpleQueue[dict[str, int]]) -> None:
    """Send all requests of an attack at once, and put the count of each status."""

    async def send() -> Counter[str]:
        path, bodies = ATTACKS[name]()
        headers = {"authorization": f"Bearer {secret}", "content-type": "application/json"}
        seen: Counter[str] = Counter()
        async with httpx.AsyncClient(timeout=LONGEST_S, limits=httpx.Limits(max_connections=None)) as client:

            async def one(body: bytes) -> None:
                try:
                    answer = await client.post(f"{url}{path}", content=body, headers=headers)
                    code = (answer.json().get("error") or {}).get("code") if answer.status_code >= 400 else ""
                    seen[f"{answer.status_code} {code}".strip()] += 1
                except httpx.HTTPError as error:
                    seen[type(error).__name__] += 1

            await asyncio.gather(*map(one, bodies))
        return seen

    results.put(dict(asyncio.run(send())))


async def watch(url: str, secret: str, done: Callable[[], bool]) -> dict[str, Any]:
    """Return the latencies of another key and of `/livez` until `done()`, and at least for 3 s."""
    latencies: dict[str, list[float]] = {"chat": [], "livez": []}
    failed: Counter[str] = Counter()
    started = time.monotonic()

    def running() -> bool:
        spent = time.monotonic() - started
        return spent < 3 or (not done() and spent < LONGEST_S)

    async with httpx.AsyncClient(timeout=LONGEST_S, headers={"authorization": f"Bearer {secret}"}) as client:

        async def repeat(name: str, method: str, path: str, body: Any, pause: float) -> None:
            while running():
                sent = time.monotonic()
                try:
                    answer = await client.request(method, f"{url}{path}", json=body)
                    if answer.status_code != 200:
                        failed[f"{name} {answer.status_code}"] += 1
                except httpx.HTTPError as error:
                    failed[f"{name} {type(error).__name__}"] += 1
                latencies[name].append(time.monotonic() - sent)
                await asyncio.sleep(pause)

        await asyncio.gather(
            repeat("chat", "POST", "/v1/chat/completions", CHAT, 0.05), repeat("livez", "GET", "/livez", None, 0.1)
        )
    figures = {
        f"{name}_{kind}_s": round(value(found), 3)
        for name, found in latencies.items()
        for kind, value in (("median", statistics.median), ("max", max))
    }
    return {**figures, "seconds": round(time.monotonic() - started, 1), "failed": dict(failed)}


def measure(url: str, secrets: dict[str, str], name: str) -> dict[str, Any]:
    """Run one attack, and return what another key saw meanwhile."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    attacker = secrets["limited" if "tokenize" in name else "attacker"]
    process = context.Process(target=attack, args=(name, url, attacker, results))
    process.start()
    try:
        seen = asyncio.run(watch(url, secrets["other"], lambda: process.exitcode is not None))
        process.join(LONGEST_S)
        return {"attack": name, **seen, "responses": results.get() if process.exitcode == 0 else None}
    finally:
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, secrets = Path(folder) / "keys.json", {}
        for name, limit in (("attacker", []), ("limited", ["--tokens-per-minute", "1000"]), ("other", [])):
            secrets[name] = peers.create_key(file, *limit)
        server = Server(options.model, Path(folder), {"access": {"keys": str(file)}})
        try:
            measure(server.url, secrets, "six requests with n: 1")  # the first requests are slower
            found = []
            for _ in range(options.rounds):
                for name in ATTACKS:
                    found.append(measure(server.url, secrets, name))
                    print(json.dumps(found[-1]), file=sys.stderr, flush=True)
                    time.sleep(5)
        finally:
            server.process.terminate()
            server.process.wait(60)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
