"""Kill and stop vLLM under load, and compare what clients saw with the usage events.

    VENV/bin/python benchmarks/peers/generation_failures.py MODEL [--clients 8] [--json FILE]

Run it with a Python that has vLLM and inferctl; it takes about eight minutes on two cores. The engine is killed four
times, vLLM's API process once, and the engine is stopped (SIGSTOP) once; clients send chat completions, half of them
streams, all the time. Then 200 clients leave in mid-stream, and SIGTERM arrives under load.

A stream without `finish_reason` and without an error is a silent early end, and there must be none. Each response that
a client saw has an event with its status, except for those that a killed API process took with it: these clients see a
connection error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import peers

FAULTS = ("engine", "relay", "engine", "API process", "relay", "hang")
HANG_SECONDS = 10
TOKENS = 40


class Server:
    """`inferctl serve` with its log as JSON."""

    def __init__(self, model: str, folder: Path) -> None:
        self.log, port, spec = peers.LOGS / "inferctl.log", peers.free_port(), folder / "inferctl.yaml"
        options = {"max_context_tokens": 2048, "kv_cache": "1GiB", "port": port, "vllm_options": ["--enforce-eager"]}
        spec.write_text(json.dumps({"name": "m", "model": {"source": str(Path(model).resolve())}, "serve": options}))
        command = [sys.executable, "-m", "inferctl.serve", "--spec", str(spec), "--log", "json"]
        command += ["--hang-seconds", str(HANG_SECONDS)]
        started = peers.start("inferctl", command, port, "", "/readyz", pausable=False)
        self.process, self.url = started.process, started.url

    def vllm(self) -> int:
        """Return the process of vLLM's API."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def fail(self, fault: str) -> None:
        """Kill or stop a process of vLLM."""
        if fault == "API process":
            os.kill(self.vllm(), signal.SIGKILL)
            return
        name, number = ("Relay", signal.SIGKILL) if fault == "relay" else ("EngineCore", signal.SIGKILL)
        command = ["pgrep", "-g", str(self.vllm()), "-f", f"^VLLM::{name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(found[0]), signal.SIGSTOP if fault == "hang" else number)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:  # the connection broke off with a killed process
            return False

    def events(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == "request" and line["endpoint"] == "chat"]


class Load:
    """Clients that send until `running` is false. `seen`: what they saw. `tokens`: of complete responses."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.running = True
        self.seen: Counter[str] = Counter()
        self.tokens = 0

    def options(self, number: int, tokens: int = TOKENS) -> dict[str, Any]:
        text = f"{number} {time.monotonic_ns()} Tell me a story."
        messages = [{"role": "user", "content": text}]
        return {"model": "m", "messages": messages, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}

    async def request(self, number: int) -> str:
        """Send one request and return what the client saw."""
        try:
            if number % 2:
                plain = await self.client.chat.completions.create(**self.options(number))
                self.tokens += plain.usage.completion_tokens
                return "200"
            stream = await self.client.chat.completions.create(
                **self.options(number), stream=True, stream_options={"include_usage": True}
            )
            finished, tokens = False, 0
            async for chunk in stream:
                finished |= bool(chunk.choices and chunk.choices[0].finish_reason)
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            self.tokens += tokens
            return "200" if finished else "SILENT EARLY END"
        except openai.APIStatusError as error:
            await asyncio.sleep(0.5)
            return f"{error.status_code} {error.code}"
        except (openai.APIConnectionError, httpx.HTTPError):  # in mid-stream, the client does not wrap it
            await asyncio.sleep(0.5)
            return "connection error"
        except openai.APIError:
            await asyncio.sleep(0.5)
            return "error event"

    async def user(self, number: int) -> None:
        while self.running:
            self.seen[await self.request(number)] += 1

    async def vanish(self, number: int) -> None:
        """Leave after a few events of a long stream."""
        stream = await self.client.chat.completions.create(**self.options(number, 1000), stream=True)
        for _ in range(3):
            await anext(stream)
        await stream.close()
        self.seen["left"] += 1


async def run(server: Server, clients: int) -> dict[str, Any]:
    load = Load(server.url)
    users = [asyncio.create_task(load.user(number)) for number in range(clients)]
    recovery = []
    for fault in FAULTS:
        await asyncio.sleep(8)
        begin = time.monotonic()
        server.fail(fault)
        while await asyncio.to_thread(server.ready):
            await asyncio.sleep(0.05)
        noticed = time.monotonic() - begin
        while not await asyncio.to_thread(server.ready):
            await asyncio.sleep(0.2)
        recovery.append({"fault": fault, "noticed_s": round(noticed, 1), "ready_s": round(time.monotonic() - begin, 1)})
        print(f"{fault}: noticed after {noticed:.1f} s, ready after {recovery[-1]['ready_s']} s", flush=True)
    await asyncio.sleep(5)
    load.running = False
    await asyncio.gather(*users)
    await asyncio.gather(*(load.vanish(number) for number in range(200)))
    load.running = True
    users = [asyncio.create_task(load.user(number)) for number in range(clients)]
    await asyncio.sleep(5)
    load.running = False  # each client ends its request
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*users)
    code = await asyncio.to_thread(server.process.wait, 60)
    events = server.events()
    counted = Counter(
        "left" if event["status"] == 499 else
        "error event" if event["status"] == 200 and event["code"] else
        f"{event['status']} {event['code']}".removesuffix(" None")
        for event in events
    )  # fmt: skip
    complete = sum(event["output_tokens"] for event in events if event["status"] == 200 and not event["code"])
    return {
        "recovery": recovery,
        "seen": dict(load.seen),
        "events": dict(counted),
        "tokens_of_complete_responses": {"clients": load.tokens, "events": complete},
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, Path(folder))
        try:
            result = asyncio.run(run(server, options.clients))
        finally:
            server.process.terminate()
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    seen, events = Counter(result["seen"]), Counter(result["events"])
    lost = seen.pop("connection error", 0)
    if seen["SILENT EARLY END"] or seen != events or lost > options.clients:
        sys.exit("the events differ from what the clients saw")
    tokens = result["tokens_of_complete_responses"]
    if tokens["clients"] != tokens["events"]:
        sys.exit("the tokens of the events differ from what the clients saw")


if __name__ == "__main__":
    main()
