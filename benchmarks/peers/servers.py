"""Compare servers over HTTP: inferctl, infinity with torch and ONNX Runtime, llama.cpp: speed, recall, memory, start.

    python benchmarks/peers/servers.py [--decoder] [--llama-cpp DIR] [--seconds 3] [--rounds 3] [--json FILE]

All serve all-MiniLM-L6-v2, or with `--decoder` SmolLM2-135M with the last token's vector, on the same machine in one
run. Each load is a closed loop: single texts of log-normal length with 20 or 120 tokens on average, and requests of 32
texts with 55. Servers are interleaved A B C C B A, and those that are not measured are stopped. CPU time per text is
shown in addition, because other work on the machine affects it least. Before, each server embeds 500 texts, 100 if the
model is the decoder, whose vectors are compared with fp32: the cosine, and the recall of the 10 nearest texts.

`--llama-cpp`: a checkout of llama.cpp with `build/bin/llama-server`, whose script converts the model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import engine
import numpy as np
import peers
from load import Outcome, requests, run_closed

# Of each load: tokens per text, texts per request, clients.
LOADS = {"20 tokens": (20, 1, 64), "120 tokens": (120, 1, 64), "32 texts": (55, 32, 4)}


def llama_cpp(port: int, checkout: Path, model: Path, kind: str, pooling: str) -> peers.Server:
    """Convert the model to `kind` with llama.cpp's script, and start its server with a batch that holds all slots."""
    file = model / f"{kind}.gguf"
    convert = [sys.executable, str(checkout / "convert_hf_to_gguf.py"), str(model), "--outfile", str(file)]
    subprocess.run([*convert, "--outtype", kind], check=True, capture_output=True)
    command: list[str | Path] = [checkout / "build" / "bin" / "llama-server", "-m", file, "--embedding"]
    command += ["--pooling", pooling, "--host", "127.0.0.1", "--port", str(port), "-np", "16"]
    command += ["-c", "8192", "-b", "4096", "-ub", "4096"]
    return peers.start(f"llama.cpp {kind}", command, port, "/v1/embeddings", "/health")


def embed(server: peers.Server, texts: Sequence[str]) -> Any:
    """Return the vectors of a server, requested 20 texts at a time."""
    vectors: list[list[float]] = []
    for start in range(0, len(texts), 20):
        body = json.dumps({"input": texts[start : start + 20]}).encode()
        request = urllib.request.Request(server.url + server.path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            vectors += [row["embedding"] for row in json.load(response)["data"]]
    return np.array(vectors)


def busy_seconds() -> float:
    """Return the CPU seconds of all processes of the machine so far."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def starts(options: Any, folder: Path) -> list[Callable[[], peers.Server]]:
    """Return functions that start the servers to compare, inferctl bf16 first."""
    copy = partial(shutil.copytree, peers.MODEL)
    model = Path((engine.write_decoder if options.decoder else copy)(folder / "model"))

    def ours(precision: str, port: int) -> peers.Server:
        return peers.inferctl(port, "--precision", precision, name=f"inferctl {precision}", model=model)

    found: list[Callable[[], peers.Server]] = [partial(ours, "bf16", 18501), partial(ours, "int8", 18502)]
    found.append(partial(peers.infinity, 18503, "torch", "bfloat16", model=model))
    if not options.decoder:
        found += [partial(peers.infinity, 18504 + n, "optimum", kind) for n, kind in enumerate(("fp32", "int8"))]
    if options.llama_cpp:
        pooling = "last" if options.decoder else "mean"
        kinds = ("bf16", "q8_0")
        found += [partial(llama_cpp, 18506 + n, options.llama_cpp, model, k, pooling) for n, k in enumerate(kinds)]
    return found


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--decoder", action="store_true", help="a decoder of 135M parameters instead of MiniLM")
    parser.add_argument("--llama-cpp", type=Path, help="checkout of llama.cpp with build/bin/llama-server")
    parser.set_defaults(seconds=3, rounds=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: Any, folder: Path) -> None:
    """Measure the servers in turns, and print and write the figures."""
    bodies: dict[str, list[dict[str, Any]]] = {}
    for load, (tokens, size, _) in LOADS.items():
        texts = peers.texts(2048, tokens)
        bodies[load] = [{"input": texts[i : i + size] if size > 1 else texts[i]} for i in range(0, 2048, size)]
    running: list[peers.Server] = []
    figures: dict[str, dict[str, Any]] = {}
    try:
        makers = starts(options, folder)
        compared = peers.texts(100 if options.decoder else 500, seed=9)
        reference = peers.fp32(compared, folder / "model")
        for make in makers:
            running.append(make())
            figures[running[-1].name] = peers.quality(embed(running[-1], compared), reference)
            figures[running[-1].name] |= {"start_seconds": running[-1].start_seconds}
            running[-1].pause()
        results: dict[tuple[str, str], list[Outcome]] = {}
        used: dict[tuple[str, str], float] = {}
        others = []  # what other processes used, as a share of the cores
        print("all servers are ready", file=sys.stderr)
        for server in peers.order(running, options.rounds):
            server.resume()
            for load, (_, _, clients) in LOADS.items():
                key, ready = (server.name, load), requests(server.url, server.path, bodies[load])
                before = server.cpu_seconds(), time.process_time(), busy_seconds(), time.monotonic()
                outcome = run_closed(server.url, ready, clients, options.seconds, warm=1.5)
                after = server.cpu_seconds(), time.process_time(), busy_seconds(), time.monotonic()
                own, generator, busy, wall = (b - a for a, b in zip(before, after, strict=True))
                results.setdefault(key, []).append(outcome)
                used[key] = used.get(key, 0) + own / max(1, outcome.completed)
                others.append(round((busy - own - generator) / wall / len(os.sched_getaffinity(0)), 3))
            figures[server.name]["pss_mb"] = peers.pss_mb(server.process.pid)
            server.pause()
    finally:
        for server in running:
            server.end()
    for load, (_, size, clients) in LOADS.items():
        rows = []
        for server in running:
            outcomes, key = results[server.name, load], (server.name, load)
            # A window without a response of the peer counts as half of one.
            ratios = [
                a.rate / max(b.rate, 0.5 / options.seconds)
                for a, b in zip(results[running[0].name, load], outcomes, strict=True)
            ]
            latencies = Outcome(latencies=[each for outcome in outcomes for each in outcome.latencies] or [0.0])
            found = {
                "texts_per_second": size * peers.median([outcome.rate for outcome in outcomes]),
                "inferctl_is": peers.median(ratios),
                "by_cpu": used[key] / used[running[0].name, load],
                "p50_ms": latencies.quantile(0.5),
                "p99_ms": latencies.quantile(0.99),
                "failures": sum(outcome.failures for outcome in outcomes),
            }
            rows.append((server.name, *found.values()))
            more = {"inferctl_is_by_round": ratios, "cpu_ms_per_text": 1000 * used[key] / options.rounds / size}
            figures[server.name][load] = found | more
        print(f"\n{load}, {clients} clients")
        head = ("server", "texts/s", "inferctl bf16 is x", "by CPU x", "p50 ms", "p99 ms", "failures")
        peers.table(head, rows)
    print(f"\nother processes used {others} of the cores")
    shown = ("cosine_min", "cosine_mean", "recall_at_10", "pss_mb", "start_seconds")
    rows = [(name, *(found[key] for key in shown)) for name, found in figures.items()]
    peers.table(("server", "cosine min", "mean", "recall@10", "PSS MB", "start s"), rows)
    peers.write(options.json, {"other_processes": others, "servers": figures})


if __name__ == "__main__":
    main()
