"""Measure the cost of HTTP for single texts and for batches.

    python benchmarks/peers/frontend.py [--seconds 8] [--rounds 4] [--json FILE]

Front end: inferctl with its echo engine (everything is real except the model), and a Starlette application that sends
the same bytes without reading the request. 64 clients send single texts, and the same texts as token ids, which need
no tokenizer.

Batches: 8 clients send requests of 32 texts, next to `EncoderEngine.run` on the same texts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import engine
import peers
from load import requests, run_closed

TEXTS, CLIENTS = 32, 8


def front_end(seconds: float, rounds: int, inputs: Sequence[str | list[int]]) -> dict[str, float]:
    """Return requests/s of both servers."""
    bodies = [{"input": given} for given in inputs]
    echo = peers.inferctl(18511, "--engine", "echo", name="inferctl echo")
    running = [echo]
    try:
        request = urllib.request.Request(
            f"{echo.url}{echo.path}", json.dumps(bodies[0]).encode(), {"content-type": "application/json"}
        )
        with tempfile.NamedTemporaryFile() as file, urllib.request.urlopen(request) as response:
            file.write(response.read())
            file.flush()
            command = [sys.executable, peers.HERE / "bare_app.py", "18512", file.name]
            running.append(peers.start("bare Starlette", command, 18512, "/v1/embeddings", "/health"))
        rates: dict[str, list[float]] = {server.name: [] for server in running}
        for server in peers.order(running, rounds):
            outcome = run_closed(server.url, requests(server.url, server.path, bodies), 64, seconds, warm=1)
            assert not outcome.failures, f"{server.name} rejected requests: {outcome.statuses}"
            rates[server.name].append(outcome.rate)
    finally:
        for server in running:
            server.end()
    return {name: peers.median(values) for name, values in rates.items()}


def batches(seconds: float, rounds: int) -> dict[str, float]:
    """Return texts/s over HTTP and in-process."""
    given = peers.texts(1024)
    bodies = [{"input": given[at : at + TEXTS], "encoding_format": "base64"} for at in range(0, len(given), TEXTS)]
    server = peers.inferctl(18513, "--precision", "bf16", name="inferctl bf16")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"texts": given}, file)
        file.flush()
        direct = engine.start("inferctl bf16", Path(file.name))
        rates: dict[str, list[float]] = {"over HTTP": [], "in-process": []}
        try:
            for name in peers.order(list(rates), rounds):
                if name == "in-process":
                    direct.measure()
                    rates[name].append(len(given) / direct.wall[-1])
                    continue
                outcome = run_closed(server.url, requests(server.url, server.path, bodies), CLIENTS, seconds)
                assert not outcome.failures, f"rejected requests: {outcome.statuses}"
                rates[name].append(TEXTS * outcome.rate)
        finally:
            server.end()
            direct.process.kill()
    return {name: peers.median(values) for name, values in rates.items()}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=4)
    options = parser.parse_args()
    texts = peers.texts(500)
    inputs = {"single texts": texts, "token ids": [peers.token_ids(text) for text in texts]}
    fronts = {kind: front_end(options.seconds, options.rounds, given) for kind, given in inputs.items()}
    for kind, front in fronts.items():
        bare = front["bare Starlette"]
        print(f"front end alone, {kind}, requests/s")
        peers.table(("server", "requests/s", "share"), [(name, rate, rate / bare) for name, rate in front.items()])
        print()
    many = batches(options.seconds, options.rounds)
    http, direct = many.values()
    print(f"{TEXTS} texts per request, {CLIENTS} clients, texts/s")
    peers.table(("path", "texts/s", "share"), [(name, rate, rate / direct) for name, rate in many.items()])
    peers.write(options.json, {"front_end": fronts, "batches": many, "batch_share": http / direct})


if __name__ == "__main__":
    main()
