"""Compare servers over HTTP: inferctl, and infinity with its torch and ONNX Runtime engines.

    python benchmarks/peers/servers.py [--seconds 15] [--rounds 3] [--clients 64] [--json FILE]

All serve the same model on the same machine in one run. Requests are single texts of log-normal length, mean 55 tokens.
A closed loop comes first, interleaved A B C C B A. Then inferctl bf16 and the infinity with the most requests/s receive
the same open-loop rate: 80% of that infinity's. Servers that are not measured are stopped. CPU time per request is
shown in addition, because other work on the machine affects it least. Before, each server embeds 500 texts, whose
vectors are compared with fp32: the cosine, and the recall of the 10 nearest texts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from load import Outcome, requests, run_closed, run_open


def embed(server: peers.Server, texts: Sequence[str]) -> Any:
    """Return the vectors of a server, requested 20 texts at a time."""
    vectors: list[list[float]] = []
    for start in range(0, len(texts), 20):
        body = json.dumps({"input": texts[start : start + 20]}).encode()
        request = urllib.request.Request(server.url + server.path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            vectors += [row["embedding"] for row in json.load(response)["data"]]
    return np.array(vectors)


def fp32(texts: Sequence[str]) -> Any:
    """Return the vectors of the reference implementation."""
    command = [sys.executable, "-m", "inferctl.serve.reference", str(peers.MODEL)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
    return np.array([peers.decode(row) for row in json.loads(done.stdout)["embeddings"]])


def quality(vectors: Any, reference: Any) -> dict[str, float]:
    """Return the lowest and the mean cosine to the reference, and the recall of the 10 nearest texts."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (vectors * reference).sum(1)

    def nearest(rows: Any) -> list[set[int]]:
        products = rows @ rows.T
        np.fill_diagonal(products, -1)
        return [set(row) for row in np.argsort(-products)[:, :10].tolist()]

    common = [len(a & b) / 10 for a, b in zip(nearest(vectors), nearest(reference), strict=True)]
    return {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "recall_at_10": float(np.mean(common)),
    }


def busy_seconds() -> float:
    """Return the CPU seconds of all processes of the machine so far."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--clients", type=int, default=64)
    parser.set_defaults(seconds=15, rounds=3)
    options = parser.parse_args()
    bodies = [{"input": text} for text in peers.texts(2000)]
    compared = peers.texts(500, seed=9)
    reference = fp32(compared)
    running: list[peers.Server] = []
    figures: dict[str, dict[str, Any]] = {}
    try:
        for start in (
            lambda: peers.inferctl(18501, "--precision", "bf16", name="inferctl bf16"),
            lambda: peers.inferctl(18502, "--precision", "int8", name="inferctl int8"),
            lambda: peers.infinity(18503, "torch", "bfloat16"),
            lambda: peers.infinity(18504, "optimum", "fp32"),
            lambda: peers.infinity(18505, "optimum", "int8"),
        ):
            running.append(start())
            figures[running[-1].name] = quality(embed(running[-1], compared), reference)
            running[-1].pause()
        used = dict.fromkeys((server.name for server in running), 0.0)
        results: dict[str, list[Outcome]] = {server.name: [] for server in running}
        others = []  # what other processes used, as a share of the cores
        print("all servers are ready", file=sys.stderr)
        for server in peers.order(running, options.rounds):
            server.resume()
            ready = requests(server.url, server.path, bodies)
            before = server.cpu_seconds(), time.process_time(), busy_seconds(), time.monotonic()
            results[server.name].append(run_closed(server.url, ready, options.clients, options.seconds, warm=2))
            after = server.cpu_seconds(), time.process_time(), busy_seconds(), time.monotonic()
            own, generator, busy, wall = (b - a for a, b in zip(before, after, strict=True))
            used[server.name] += own / results[server.name][-1].completed
            others.append(round((busy - own - generator) / wall / len(os.sched_getaffinity(0)), 3))
            server.pause()

        def rate(server: peers.Server) -> float:
            return peers.median([outcome.rate for outcome in results[server.name]])

        first, strongest = running[0], max(running[2:], key=rate)
        shared_rate = 0.8 * rate(strongest)
        at_rate: dict[str, list[Outcome]] = {first.name: [], strongest.name: []}
        for server in peers.order([first, strongest], 2):
            server.resume()
            ready = requests(server.url, server.path, bodies)
            at_rate[server.name].append(run_open(server.url, ready, shared_rate, options.seconds))
            server.pause()
    finally:
        for server in running:
            server.end()
    rows = []
    for server in running:
        outcomes, found = results[server.name], figures[server.name]
        ratios = [a.rate / b.rate for a, b in zip(results[first.name], outcomes, strict=True)]
        found |= {
            "rates": [outcome.rate for outcome in outcomes],
            "inferctl_is": peers.median(ratios),
            "inferctl_is_by_round": ratios,
            "cpu_ms_per_request": 1000 * used[server.name] / options.rounds,
            "inferctl_is_by_cpu": used[server.name] / used[first.name],
            "p50_ms": peers.median([outcome.quantile(0.5) for outcome in outcomes]),
            "p99_ms": peers.median([outcome.quantile(0.99) for outcome in outcomes]),
            "failures": sum(outcome.failures for outcome in outcomes),
        }
        shown = ("inferctl_is", "inferctl_is_by_cpu", "p50_ms", "p99_ms", "cosine_min", "recall_at_10", "failures")
        rows.append((server.name, rate(server), *(found[key] for key in shown)))
    print(f"closed loop, {options.clients} clients; other processes used {others} of the cores")
    head = ("server", "requests/s", "inferctl bf16 is x", "by CPU x", "p50 ms", "p99 ms", "cosine min", "recall@10")
    peers.table((*head, "failures"), rows)
    print(f"\nopen loop, {shared_rate:.1f} requests/s")
    tails = {
        name: {
            "p50_ms": peers.median([o.quantile(0.5) for o in found]),
            "p99_ms": peers.median([o.quantile(0.99) for o in found]),
        }
        for name, found in at_rate.items()
    }
    peers.table(
        ("server", "p50 ms", "p99 ms"), [(name, each["p50_ms"], each["p99_ms"]) for name, each in tails.items()]
    )
    opened = {"rate": shared_rate, **tails}
    peers.write(
        options.json, {"clients": options.clients, "other_processes": others, "closed": figures, "open": opened}
    )


if __name__ == "__main__":
    main()
