"""What the cache of vectors saves and costs: hits, misses, the front end alone, and hit ratios next to those of LRU.

    python benchmarks/peers/cache.py [--seconds 4] [--rounds 6] [--inputs 100000] [--json FILE]

Single texts of log-normal length (mean 55 tokens) with base64 vectors, as the `openai` client sends them. Measured in
alternating order:

- hit: inferctl with the model, texts that the cache has
- miss: the same server, texts that it does not have
- front end: inferctl with an engine that computes nothing, without a cache
- bare: a Starlette application that sends the same bytes without reading the request

Latency: one client in a closed loop. CPU time: 16 clients; of all processes of the server, so that a miss has the
benefit of batching. Then Zipf(1.0) traffic of `--inputs` short texts, half as many requests, and a cache of 1% of the
inputs, next to LRU of the same size. At last, the cost of a look-up next to the model on the shortest inputs.

Exits with 1 unless a hit takes at most 1/20 of the CPU time of a miss and 1.5 times the p50 of the front end, and the
hit ratio is at least that of LRU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from cache_policies import lru, traffic
from load import requests, run_closed

sys.path.insert(0, str(peers.ROOT))
CLIENTS, HOT, PER_REQUEST, VECTOR_BYTES = 16, 200, 32, 4 * 384
SHORT_INPUTS, SHORT_TOKENS = 512, 3
MAX_CPU_SHARE, MAX_P50_RATIO = 1 / 20, 1.5


def counters(server: peers.Server) -> tuple[float, float]:
    """Return the hits and the misses of a server so far. Equal inputs of one request count as hits, but the first."""
    found = peers.metrics(server)
    hits = sum(found.get(f"inferctl_cache_{name}", 0.0) for name in ('hits_total{level="local"}', "coalesced_total"))
    return hits, found["inferctl_cache_misses_total"]


def bodies(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"input": text, "encoding_format": "base64"} for text in texts]


def embed(server: peers.Server, texts: Sequence[str]) -> bytes:
    """Send one request, and return the body of its response."""
    body = json.dumps({"input": texts, "encoding_format": "base64"}).encode()
    request = urllib.request.Request(f"{server.url}{server.path}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return bytes(response.read())


def cached(port: int, size: int, name: str) -> peers.Server:
    """Start inferctl with the model and a cache of `size` bytes."""
    os.environ["INFERCTL_CACHE_SIZE"] = str(size)
    try:
        return peers.inferctl(port, name=name)
    finally:
        del os.environ["INFERCTL_CACHE_SIZE"]


def bare(port: int, like: peers.Server, folder: Path) -> peers.Server:
    """Start a Starlette application that sends the same bytes as a response of `like`."""
    (folder / "body.json").write_bytes(embed(like, peers.texts(1)))
    command = [sys.executable, peers.HERE / "bare_app.py", str(port), folder / "body.json"]
    return peers.start("bare Starlette", command, port, "/v1/embeddings", "/health", pausable=False)


def measure(server: peers.Server, texts: Sequence[str], seconds: float) -> dict[str, float]:
    """Return p50 and p99 of one client, and the CPU time and the rate of several. No text is sent twice if it lasts."""
    ready = requests(server.url, server.path, bodies(texts))
    half = len(ready) // 2
    alone = run_closed(server.url, ready[:half], 1, seconds, warm=0)
    before = server.cpu_seconds()
    many = run_closed(server.url, ready[half:], CLIENTS, seconds, warm=0)
    cpu_s = server.cpu_seconds() - before
    assert not alone.failures + many.failures, f"{server.name} rejected requests: {alone.statuses}, {many.statuses}"
    return {
        "p50_ms": alone.quantile(0.5),
        "p99_ms": alone.quantile(0.99),
        "cpu_us": 1e6 * cpu_s / len(many.latencies),
        "rate": many.rate,
    }


def single_texts(seconds: float, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the medians of each measure for hit, miss, front end and bare, and the hit ratios of hit and miss."""
    hot = peers.texts(HOT)
    running: list[peers.Server] = []
    figures: dict[str, list[dict[str, float]]] = {"hit": [], "miss": [], "front end": [], "bare": []}
    ratios: dict[str, list[float]] = {"hit": [], "miss": []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            running.append(cached(18541, 1 << 30, "cached"))
            running.append(peers.inferctl(18542, "--engine", "echo", name="front end"))
            running.append(bare(18543, running[0], Path(folder)))
            servers = dict(zip(figures, (running[0], *running), strict=True))
            embed(running[0], hot)
            for number, name in enumerate(peers.order(list(figures), rounds)):
                # A client needs at least half a millisecond for a miss.
                new = peers.texts(int(4000 * seconds) + 1000, seed=1000 + number) if name == "miss" else hot
                if name == "miss":
                    new = [f"{number} {at} {text}" for at, text in enumerate(new)]
                before = counters(running[0])
                figures[name].append(measure(servers[name], new, seconds))
                hits, misses = (b - a for a, b in zip(before, counters(running[0]), strict=True))
                if name in ratios:
                    ratios[name].append(hits / (hits + misses))
        finally:
            for server in running:
                server.end()
    medians = {
        name: {measure: peers.median([each[measure] for each in rounds_]) for measure in rounds_[0]}
        for name, rounds_ in figures.items()
    }
    return medians, {name: peers.median(values) for name, values in ratios.items()}


def zipf(inputs: int) -> dict[str, float]:
    """Return the hit ratios of a server and of LRU under Zipf(1.0) traffic, with a cache of 1% of the inputs."""
    from inferctl.serve.vector_cache.store import ENTRY_BYTES

    numbers = traffic(1.0, inputs=inputs, requests=inputs // 2)
    entries = inputs // 100
    server = cached(18544, entries * (VECTOR_BYTES + ENTRY_BYTES), "zipf")
    try:
        for at in range(0, len(numbers), PER_REQUEST):
            embed(server, [f"question {number}" for number in numbers[at : at + PER_REQUEST]])
        hits, misses = counters(server)
    finally:
        server.end()
    assert hits + misses == len(numbers)
    get, put = lru(entries)
    found = 0
    for number in numbers:
        key = b"%d" % number
        if get(key) is None:
            put(key, key)
        else:
            found += 1
    return {"inferctl": hits / len(numbers), "LRU": found / len(numbers)}


def shortest_inputs(rounds: int) -> dict[str, float]:
    """Return the CPU time per input (us) of a look-up that misses, of storing, and of the model in large batches."""
    from contender import run_batches

    from inferctl.serve.vector_cache.keys import KeySpace
    from inferctl.serve.vector_cache.store import VectorStore

    random = np.random.default_rng(1)
    run = run_batches("auto", str(peers.MODEL), "embed")
    space, store = KeySpace(), VectorStore(1 << 22)
    found: dict[str, list[float]] = {"look-up": [], "store": [], "model": []}
    for number in range(rounds + 1):
        ids = random.integers(1000, 20_000, (SHORT_INPUTS, SHORT_TOKENS), dtype=np.int32)
        sequences = list(ids)
        started = time.process_time()
        keys = space.keys("key", sequences)
        assert not any(store.get(key) for key in keys)
        looked_up = time.process_time()
        for key in keys:
            store.put(key, bytes(VECTOR_BYTES))
        stored = time.process_time()
        run(sequences, None)
        ended = time.process_time()
        if number:  # the first round warms up
            for name, seconds in zip(found, (looked_up - started, stored - looked_up, ended - stored), strict=True):
                found[name].append(1e6 * seconds / SHORT_INPUTS)
    return {name: peers.median(values) for name, values in found.items()}


def main() -> int:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=4, rounds=6)
    parser.add_argument("--inputs", type=int, default=100_000, help="distinct texts of the Zipf traffic")
    options = parser.parse_args()
    figures, ratios = single_texts(options.seconds, options.rounds)
    peers.table(
        ("request", "p50 (ms)", "p99 (ms)", "CPU (us)", "requests/s"),
        [(name, *values.values()) for name, values in figures.items()],
    )
    cpu_share = figures["hit"]["cpu_us"] / figures["miss"]["cpu_us"]
    p50_ratio = figures["hit"]["p50_ms"] / figures["front end"]["p50_ms"]
    print(f"hit ratio while hits were measured: {ratios['hit']:.1%}; misses: {ratios['miss']:.1%}")
    print(f"CPU time of a hit / of a miss: 1/{1 / cpu_share:.1f}; p50 of a hit / of the front end: {p50_ratio:.2f}")
    under_zipf = zipf(options.inputs)
    print(
        f"Zipf(1.0), {options.inputs:,} inputs, a cache of 1% of them: "
        + ", ".join(f"{name} {ratio:.1%}" for name, ratio in under_zipf.items())
    )
    short = shortest_inputs(options.rounds)
    print(
        f"CPU time per input of {SHORT_TOKENS} tokens, {SHORT_INPUTS} inputs per batch (us): "
        + ", ".join(f"{name} {value:.1f}" for name, value in short.items())
    )
    passed = {
        "cpu": cpu_share <= MAX_CPU_SHARE,
        "p50": p50_ratio <= MAX_P50_RATIO,
        "hit_ratio": under_zipf["inferctl"] >= under_zipf["LRU"],
        "only_hits_and_misses": ratios["hit"] > 0.999 and ratios["miss"] < 0.01,
    }
    peers.write(
        options.json,
        {
            "single_texts": figures,
            "cpu_share": cpu_share,
            "p50_ratio": p50_ratio,
            "zipf_hit_ratio": under_zipf,
            "shortest_inputs_us": short,
            "passed": passed,
        },
    )
    print("passed" if all(passed.values()) else f"not met: {', '.join(n for n, ok in passed.items() if not ok)}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
