"""What the edge of inferctl costs: `inferctl serve` beside a bare `vllm serve`, and other engines beside both.

    VENV/bin/python benchmarks/peers/generation.py MODEL [--users 1,8,32] [--rounds 4] [--seconds 20] [--json FILE]

Run it with a Python that has vLLM and inferctl; MODEL is a folder such as that of `make generator`. Both servers have
the same options of vLLM. Each user streams chat completions of 64 tokens after a prompt of about 128 tokens with a
prefix of its own, in a closed loop. Rounds are interleaved A B B A; the server that is not measured is stopped. A rate
is output tokens that arrived in the window / window. Load generator and server share the cores.

`--gguf FILE` adds OpenVINO GenAI, if it is installed, and transformers' `generate` is always added: both run in a
process of their own, without HTTP, with a batch of as many sequences as users.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers

OUTPUT_TOKENS = 64
WORDS = "the river carries small boats past old houses while people talk about weather and bread "
SHARED = ["--max-model-len", "2048", "--max-num-queued-tokens", "262144", "--enable-prompt-tokens-details"]
SHARED += ["--disable-uvicorn-access-log", "--dtype", "bfloat16"]


@dataclass
class Window:
    """What a round measured: seconds to the first token of each request, and the tokens that arrived."""

    seconds: float = 0.0
    tokens: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Server:
    """A server process in its own group."""

    def __init__(self, name: str, port: int, command: list[str], variables: dict[str, str]) -> None:
        self.name, self.port = name, port
        self._log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log")  # noqa: SIM115  # until the end
        environment = os.environ | variables
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def wait(self) -> None:
        """Wait until the server responds."""
        for _ in range(600):
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.port}/health"
                    if self.name == "vllm"
                    else f"http://127.0.0.1:{self.port}/readyz"
                ):
                    return
            except OSError:
                time.sleep(1)
            if self._process.poll() is not None:
                break
        sys.exit(f"{self.name} did not start: {Path(self._log.name).read_text()[-2000:]}")

    def _processes(self) -> list[int]:
        """Return the process and everything below it; vLLM starts its children in groups of their own."""
        found, todo = [], [self._process.pid]
        while todo:
            found.append(todo.pop())
            done = subprocess.run(["pgrep", "-P", str(found[-1])], capture_output=True, text=True, check=False)
            todo += map(int, done.stdout.split())
        return found

    def signal(self, number: int) -> None:
        for pid in self._processes():
            os.kill(pid, number)

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)


async def user(port: int, number: int, window: Window, begin: float, end: float) -> None:
    """Stream one completion after the other until `end`, and count what arrives from `begin` on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    count = 0
    while time.monotonic() < end:
        text = f"{number} {count} {time.monotonic_ns()} {WORDS * 6}"
        count += 1
        body = json.dumps(
            {
                "model": "m",
                "messages": [{"role": "user", "content": text}],
                "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}"
        sent = time.monotonic()
        writer.write(head.encode() + b"\r\n\r\n" + body)
        arrived: list[float] = []
        while True:
            line = await reader.readline()
            if not line:
                sys.exit("the server closed the connection")
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            arrived.append(time.monotonic())
        if begin <= sent:
            window.first.append(arrived[0] - sent)
        # The first event has the role. Another has several tokens if the server is behind.
        each = OUTPUT_TOKENS / (len(arrived) - 1)
        window.tokens += sum(each for now in arrived[1:] if begin <= now < end)
        while (await reader.readline()) != b"0\r\n":
            pass
        await reader.readline()
    writer.close()


async def measure(port: int, users: int, seconds: float) -> Window:
    window = Window(seconds)
    begin = time.monotonic() + 3
    await asyncio.gather(*(user(port, number, window, begin, begin + seconds) for number in range(users)))
    return window


def in_process(engine: str, python: str, model: str, users: list[int]) -> dict[str, float]:
    """Return output tokens/s of an engine by the number of sequences; empty if it is not installed."""
    script = Path(__file__).with_name("generation_engine.py")
    command = [python, str(script), engine, model, *map(str, users), str(OUTPUT_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{engine} was not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--users", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--gguf")
    parser.add_argument("--openvino", default=sys.executable, help="Python that has openvino_genai")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the servers too
    users = [int(each) for each in options.users.split(",")]
    kv = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    spec = {
        "name": "m",
        "model": {"source": options.model},
        "serve": {"max_context_tokens": 2048, "kv_cache": "1GiB", "port": 18601, "precision": "bf16"},
    }
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.model, "--served-model-name", "m"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inferctl.yaml"
        file.write_text(json.dumps(spec))
        servers = [Server("vllm", 18600, [*vllm, "--port", "18600", *SHARED], kv)]
        servers[0].wait()
        servers.append(Server("inferctl", 18601, [sys.executable, "-m", "inferctl.serve", "--spec", str(file)], {}))
        try:
            servers[1].wait()
            results: dict[tuple[str, int], list[Window]] = {}
            for count in users:
                for round_number in range(options.rounds):
                    for server in servers if round_number % 2 == 0 else servers[::-1]:
                        other = servers[1 - servers.index(server)]
                        other.signal(signal.SIGSTOP)
                        window = asyncio.run(measure(server.port, count, options.seconds))
                        other.signal(signal.SIGCONT)
                        results.setdefault((server.name, count), []).append(window)
        finally:
            for server in servers:
                server.end()
    figures: dict[str, Any] = {}
    rows = []
    for count in users:
        bare, edge = (results[name, count] for name in ("vllm", "inferctl"))
        rates = [[window.rate for window in windows] for windows in (bare, edge)]
        first = [[1000 * statistics.median(window.first) for window in windows] for windows in (bare, edge)]
        ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
        delay = statistics.median(b - a for a, b in zip(*first, strict=True))
        figures[str(count)] = {"tokens_per_s": rates, "ttft_p50_ms": first, "ratio": ratio, "ttft_difference_ms": delay}
        medians = [statistics.median(each) for each in (*rates, *first)]
        rows.append((count, *medians[:2], ratio, *medians[2:], delay))
    header = ("users", "vllm tokens/s", "inferctl tokens/s", "ratio", "vllm TTFT ms", "inferctl TTFT ms", "difference")
    peers.table(header, rows)
    others = {"transformers generate": in_process("transformers", sys.executable, options.model, users)}
    if options.gguf:
        others["OpenVINO GenAI (4-bit weights)"] = in_process("openvino", options.openvino, options.gguf, users)
    for name, rates_of in others.items():
        if rates_of:
            print(f"{name}, tokens/s: " + ", ".join(f"{count} {rates_of[str(count)]:.0f}" for count in users))
    if options.json:
        options.json.write_text(json.dumps({"edge": figures, "others": others}, indent=1) + "\n")


if __name__ == "__main__":
    main()
