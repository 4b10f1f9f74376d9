"""What the edge of inferctl costs: `inferctl serve` beside a bare `vllm serve`.

    VENV/bin/python benchmarks/peers/generation.py MODEL [--users 1,8,32] [--rounds 4] [--seconds 20] [--json FILE]

Run it with a Python that has vLLM and inferctl; MODEL is a folder such as that of `make generator`. Both servers have
the same options of vLLM. Each user streams chat completions of 64 tokens after a prompt of about 128 tokens with a
prefix of its own, in a closed loop. Rounds are interleaved A B B A; the server that is not measured is stopped. A rate
is output tokens that arrived in the window / window. Load generator and server share the cores.

`--stand-in` measures the edge alone: the stand-in of the tests takes the place of vLLM on both sides. It emits 350
tokens/s in all, at most 50 to one user and the first after 20 ms, nearly without CPU time, so that the noise of a
model's computation does not hide the edge. MODEL then needs no weights that run.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers

OUTPUT_TOKENS = 64
STAND_IN = peers.ROOT / "tests" / "serve" / "fake_vllm"
WORDS = "the river carries small boats past old houses while people talk about weather and bread "
SHARED = ["--max-model-len", "2048", "--max-num-queued-tokens", "262144", "--enable-prompt-tokens-details"]
SHARED += ["--disable-uvicorn-access-log", "--dtype", "bfloat16"]


@dataclass
class Window:
    """What a round measured: seconds to the first token of each request, and the tokens that arrived."""

    seconds: float = 0.0
    tokens: float = 0.0
    first: list[float] = field(default_factory=list)
    cpu_s: float = 0.0  # of the server, from the first request to the last
    all_tokens: int = 0  # in that time

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU microseconds of the server per token."""
        return 1e6 * self.cpu_s / self.all_tokens


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
        window.all_tokens += OUTPUT_TOKENS
        # The first event has the role. Another has several tokens if the server is behind.
        each = OUTPUT_TOKENS / (len(arrived) - 1)
        window.tokens += sum(each for now in arrived[1:] if begin <= now < end)
        while (await reader.readline()) != b"0\r\n":
            pass
        await reader.readline()
    writer.close()


async def measure(server: peers.Server, users: int, seconds: float) -> Window:
    window = Window(seconds)
    begin, cpu_s = time.monotonic() + 3, server.cpu_seconds()
    await asyncio.gather(*(user(server.port, number, window, begin, begin + seconds) for number in range(users)))
    window.cpu_s = server.cpu_seconds() - cpu_s
    return window


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=4, seconds=20)
    parser.add_argument("model", type=Path)
    parser.add_argument("--users", default="1,8,32")
    parser.add_argument("--stand-in", action="store_true", help="without vLLM: the stand-in of the tests")
    options = parser.parse_args()
    model = str(options.model.resolve())
    users = [int(each) for each in options.users.split(",")]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if options.stand_in:
        variables = {"FAKE_VLLM_TOKENS_PER_S": "350"}
        variables["PYTHONPATH"] = f"{STAND_IN}:{os.environ.get('PYTHONPATH', '')}"
    spec = {
        "name": "m",
        "model": {"source": model},
        "serve": {"max_context_tokens": 2048, "kv_cache": "1GiB", "port": 18601, "precision": "bf16"},
    }
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", "m"]
    with tempfile.TemporaryDirectory() as folder:
        if not options.stand_in:
            variables |= peers.vllm_environment(Path(folder))
        file = Path(folder) / "inferctl.yaml"
        file.write_text(json.dumps(spec))
        servers: list[peers.Server] = []
        command = [sys.executable, "-m", "inferctl.serve", "--spec", str(file)]
        own = variables if options.stand_in else {}
        try:
            servers.append(peers.start("vllm", [*vllm, "--port", "18600", *SHARED], 18600, "", "/health", **variables))
            servers.append(peers.start("inferctl", command, 18601, "", "/readyz", **own))
            results: dict[tuple[str, int], list[Window]] = {}
            for count in users:
                for round_number in range(options.rounds):
                    for server in servers if round_number % 2 == 0 else servers[::-1]:
                        other = servers[1 - servers.index(server)]
                        other.pause()
                        window = asyncio.run(measure(server, count, options.seconds))
                        other.resume()
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
        cpu = [[window.cpu_us for window in windows] for windows in (bare, edge)]
        figures[str(count)] = {"tokens_per_s": rates, "ttft_p50_ms": first, "ratio": ratio, "ttft_difference_ms": delay}
        figures[str(count)]["cpu_us_per_token"] = cpu
        medians = [statistics.median(each) for each in (*rates, *first, *cpu)]
        rows.append((count, *medians[:2], ratio, *medians[2:4], delay, *medians[4:]))
    print("tokens/s, TTFT p50 in ms, and CPU us of the server per token; first bare, then with the edge")
    peers.table(("users", "bare/s", "edge/s", "ratio", "bare ms", "edge ms", "difference", "bare us", "edge us"), rows)
    peers.write(options.json, {"stand_in": options.stand_in, "edge": figures})


if __name__ == "__main__":
    main()
