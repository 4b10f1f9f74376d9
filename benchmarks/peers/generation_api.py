"""Measure what vLLM's API process costs per token and per stream: when it, and not the GPU, would limit a server.

    VENV/bin/python benchmarks/peers/generation_api.py [--clients 64,256] [--rounds 3] [--seconds 10] [--json FILE]

Run it with a Python that has vLLM and inferctl. The model has one layer and random weights, so the engine takes little
time, as a GPU does from the API process's point of view. Its tokenizer is the start of that of SmolLM2 (`make
generator`). Clients stream chat completions in a closed loop, of 16 and of 128 tokens: from both, the CPU time of the
API process per token and per stream. The servers are `vllm serve` with one and with two API processes, `inferctl serve`
without and with keys and metering, and the same with more tokens in each event (`--stream-interval`). One runs at a
time, because each of them needs memory and cores. CPU times are those of all threads of a process (schedstat), so they
bear other work on the machine better than rates do. "per core" is what one API process could send if it had a core for
itself. vLLM merges the tokens of an event if its API process falls behind, so a process that is full sends more.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edge_cost
import generation
import peers
import psutil

OUTPUTS = 16, 128
VOCABULARY = 4096
MODEL = peers.ROOT / "models" / "SmolLM2-135M-Instruct"
# Name -> whether the edge of inferctl is there, its sections of the spec, and options of vLLM.
SERVERS: dict[str, tuple[bool, tuple[str, ...], list[str]]] = {
    "vllm": (False, (), []),
    "vllm, usage in each event": (False, (), ["--enable-force-include-usage"]),
    "vllm, 2 API processes": (False, (), ["--api-server-count", "2"]),
    "edge": (True, (), []),
    "edge, keys, metering": (True, ("keys", "metering"), []),
    "edge, 4 tokens an event": (True, (), ["--stream-interval", "4"]),
    "edge, 16 tokens an event": (True, (), ["--stream-interval", "16"]),
}


def write_model(folder: Path) -> None:
    """Write a decoder of one layer with random weights, and the first entries of a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < VOCABULARY}
    merges = [each if isinstance(each, list) else each.split(" ") for each in model["merges"]]
    model["merges"] = [each for each in merges if "".join(each) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((MODEL / name).read_text())
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes, **heads)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def processes(root: int) -> dict[str, list[int]]:
    """Return the API processes and the engine of a server by their place below its first process."""
    below = psutil.Process(root).children(recursive=True)
    titles = {each: (" ".join(each.cmdline()) + each.name()).lower() for each in below}
    (engine,) = (each for each, title in titles.items() if "enginecore" in title)
    several = [each.pid for each, title in titles.items() if "apiserver" in title and each.pid != engine.ppid()]
    return {"api": several or [engine.ppid()], "engine": [engine.pid]}


class Client(asyncio.Protocol):
    """One connection that streams one completion after the other. `count`: of complete streams and of events."""

    def __init__(self, request: bytes, count: dict[str, int]) -> None:
        self._request, self._count = request, count
        self._tail = b""
        self.stopping = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._count["events"] += data.count(b"data: ")
        self._tail = (self._tail + data)[-32:]
        if self._tail.endswith(b"\r\n0\r\n\r\n"):
            assert b"[DONE]" in self._tail, self._tail
            self._tail = b""
            self._count["streams"] += 1
            if self.stopping:
                self._transport.close()
            else:
                self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


@dataclass
class Found:
    """What a window measured: CPU seconds by process, streams, events and seconds."""

    cpu: dict[str, float]
    streams: int
    events: int
    seconds: float


async def load(port: int, headers: str, clients: int, tokens: int, seconds: float, pids: dict[str, list[int]]) -> Found:
    """Let clients stream. The window begins after the first streams."""
    requests = []
    for number in range(clients):
        text = f"{number} {generation.WORDS}"
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}
        raw = json.dumps(body | {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{headers}content-type: application/json\r\n"
        requests.append(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    loop, count = asyncio.get_running_loop(), {"streams": 0, "events": 0}
    connected = [await loop.create_connection(lambda r=r: Client(r, count), "127.0.0.1", port) for r in requests]
    # Clients begin together, so a window has whole streams of all of them only if it begins and ends with such a wave.
    while count["streams"] < clients:
        await asyncio.sleep(0.01)
    before, first, begin = {name: peers.cpu_s(of) for name, of in pids.items()}, dict(count), time.monotonic()
    await asyncio.sleep(seconds)
    waves = (count["streams"] - first["streams"]) // clients + 1
    while count["streams"] - first["streams"] < waves * clients:
        await asyncio.sleep(0.01)
    used = {name: peers.cpu_s(of) - before[name] for name, of in pids.items()}
    found = Found(
        used, count["streams"] - first["streams"], count["events"] - first["events"], time.monotonic() - begin
    )
    for _, client in connected:
        client.stopping = True
    await asyncio.gather(*(client.ended for _, client in connected))
    return found


def start(name: str, model: Path, folder: Path) -> tuple[peers.Server, str]:
    """Start a server. Return it, and the headers of its requests."""
    edge, sections, more = SERVERS[name]
    shared = ["--max-num-seqs", "256"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    port, headers = peers.free_port(), ""
    if not edge:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "m"]
        command += ["--port", str(port), *generation.SHARED, *shared, *more]
        variables |= peers.vllm_environment(folder)
        return peers.start("vllm", command, port, "", "/health", **variables), headers
    serve = {"port": port, "precision": "bf16", "max_sequences": 256, "kv_cache": "1GiB", "vllm_options": more}
    spec: dict[str, Any] = {"name": "m", "model": {"source": str(model)}, "serve": serve}
    for section in sections:
        more_sections, found = edge_cost.FEATURES[section](folder)
        spec |= more_sections
        headers += "".join(f"{name}: {value}\r\n" for name, value in found.items())
    file = folder / "inferctl.yaml"
    file.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "inferctl.serve", "--spec", str(file)]
    return peers.start("inferctl", command, port, "", "/readyz", **variables), headers


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=2, seconds=6)
    parser.add_argument("--clients", default="64,256", help="numbers of clients, with commas")
    parser.add_argument("--starts", type=int, default=2, help="how often each server starts, in reverse order")
    parser.add_argument("--servers", default=";".join(SERVERS), help="servers to measure, with semicolons")
    options = parser.parse_args()
    counts = [int(count) for count in options.clients.split(",")]
    names = options.servers.split(";")
    found: dict[tuple[str, int], dict[int, list[Found]]] = {
        (name, clients): {tokens: [] for tokens in OUTPUTS} for name in names for clients in counts
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        model = Path(root) / "model"
        model.mkdir()
        write_model(model)
        for turn, name in enumerate(peers.order(names, options.starts)):
            folder = Path(root) / str(turn)
            folder.mkdir()
            server, headers = start(name, model, folder)
            try:
                pids = processes(server.process.pid)
                for clients in counts:
                    for tokens in peers.order(OUTPUTS, options.rounds):
                        window = asyncio.run(load(server.port, headers, clients, tokens, options.seconds, pids))
                        found[name, clients][tokens].append(window)
            finally:
                server.end()
    figures = {f"{name}, {clients} clients": summary(windows) for (name, clients), windows in found.items()}
    rows = [(name, clients, *summary(windows).values()) for (name, clients), windows in found.items()]
    columns = ("server", "clients", "API us/token", "API us/stream", "engine us/token", "engine us/stream")
    peers.table((*columns, "tokens/event", "tokens/s", "tokens/s per core", "API cores"), rows)
    edge = [found[name, clients] for name in names for clients in counts if SERVERS[name][0] and not SERVERS[name][1]]
    cost = costs([window for windows in edge for window in windows.items()])
    print("CPU time of the API process with the edge (us): " + ", ".join(f"{k} {v:.1f}" for k, v in cost.items()))
    peers.write(options.json, {"output_tokens": OUTPUTS, "servers": figures, "cost_us": cost})


def costs(found: list[tuple[int, list[Found]]]) -> dict[str, float]:
    """Return the CPU time of the API process (us) per stream, token and event: least squares of relative errors."""
    import numpy as np

    rows, ones = [], []
    for tokens, windows in found:
        for each in windows:
            us = 1e6 * each.cpu["api"] / each.streams
            rows.append([1 / us, tokens / us, each.events / each.streams / us])
            ones.append(1.0)
    solution = np.linalg.lstsq(np.array(rows), np.array(ones), rcond=None)[0] if rows else [0.0] * 3
    return dict(zip(("stream", "token", "event"), map(float, solution), strict=True))


def summary(found: dict[int, list[Found]]) -> dict[str, float]:
    """Return the CPU time per token and per stream in us, from streams of two lengths (medians)."""
    short, long = OUTPUTS
    per_stream = {
        (tokens, name): peers.median([1e6 * each.cpu[name] / each.streams for each in windows])
        for tokens, windows in found.items()
        for name in ("api", "engine")
    }
    row = {}
    for name in ("api", "engine"):
        token = (per_stream[long, name] - per_stream[short, name]) / (long - short)
        row |= {f"{name}_us_per_token": token, f"{name}_us_per_stream": per_stream[short, name] - short * token}
    windows = found[long]
    row["tokens_per_event"] = peers.median([each.streams * long / each.events for each in windows])
    row["tokens_per_s"] = peers.median([each.streams * long / each.seconds for each in windows])
    row["tokens_per_s_per_core"] = 1e6 * long / per_stream[long, "api"]
    row["api_cores"] = peers.median([each.cpu["api"] / each.seconds for each in windows])
    return row


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    main()
