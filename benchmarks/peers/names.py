"""Compare one server of three models with three servers of one, and flood each model at three times its peak.

    python benchmarks/peers/names.py [--rounds 6] [--seconds 8] [--slo 1000] [--json FILE]

The models are all-MiniLM-L6-v2, a cross-encoder and a classifier of the same size with random weights. Texts have a
log-normal length (mean 55 tokens); a request of the cross-encoder has 8 documents. "Work" is the sum of the rates of the
three models, each divided by its rate alone, in closed loops at the same time: 1 if the device is as busy as with one
model. One server and three servers take turns (A B B A), and the ratio is the median over pairs of rounds. Memory (PSS)
is that after such a load. The three start after it was read of the one, so only they divide pages with others.

Then, on one server, open loops send to one model three times its peak, and to the others a quarter of theirs. "Late" is
the share of their responses that exceeded the SLO. In the end, an engine is killed under load. The load generator shares
the machine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
import recorder
import rerank
from load import Outcome, requests, run_closed, run_open

TEXTS = peers.texts(1000)
PATHS = {"embed": "/v1/embeddings", "rerank": "/v1/rerank", "classify": "/classify"}
BODIES: dict[str, list[dict[str, Any]]] = {
    "embed": [{"model": "embed", "input": text} for text in TEXTS],
    "rerank": [
        {"model": "rerank", "query": TEXTS[at][:60], "documents": TEXTS[at : at + 8]} for at in range(0, 990, 8)
    ],
    "classify": [{"model": "classify", "input": text} for text in TEXTS],
}
CLIENTS = {"embed": 16, "rerank": 4, "classify": 16}


class Side:
    """The servers of all models: one for all of them, or one for each."""

    def __init__(self, sources: Mapping[str, Path], folder: Path, slo: float, *, together: bool) -> None:
        models = [{"name": name, "model": {"source": str(source)}} for name, source in sources.items()]
        self.servers = []
        self.urls: dict[str, str] = {}
        for part in [models] if together else [[model] for model in models]:
            file = folder / f"{'-'.join(str(model['name']) for model in part)}.yaml"
            file.write_text(json.dumps({"name": "mix", "models": part, "slo": {"p99_ms": slo}}))
            port = peers.free_port()
            command = [sys.executable, "-m", "inferctl", "serve", "--spec", file, "--port", str(port)]
            server = peers.start(file.stem, command, port, "", "/readyz", folder=peers.ROOT)
            self.servers.append(server)
            self.urls |= {str(model["name"]): server.url for model in part}

    def end(self) -> None:
        for server in self.servers:
            server.end()

    def each(self, send: Callable[[str, str, list[bytes]], Outcome]) -> dict[str, Outcome]:
        """Return what comes of a load on each model, all at the same time."""
        with ThreadPoolExecutor(len(self.urls)) as pool:
            given = {name: requests(url, PATHS[name], BODIES[name]) for name, url in self.urls.items()}
            sent = {name: pool.submit(send, name, url, given[name]) for name, url in self.urls.items()}
            return {name: outcome.result() for name, outcome in sent.items()}

    def closed(self, seconds: float) -> dict[str, Outcome]:
        return self.each(lambda name, url, ready: run_closed(url, ready, CLIENTS[name], seconds))

    def memory_mb(self) -> float:
        self.closed(3)
        return sum(peers.pss_mb(server.process.pid) for server in self.servers)


def killed(side: Side, rates: Mapping[str, float]) -> tuple[list[dict[str, Any]], dict[str, Outcome]]:
    """Kill one engine under load. Return what `/info` then says of each model, and what came of the load."""
    (server,) = side.servers
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(side.each, lambda name, url, ready: run_open(url, ready, rates[name] / 4, 12))
        time.sleep(3)
        os.kill(recorder.processes(server.process.pid)["engine"], signal.SIGKILL)
        outcomes = load.result()
    with urllib.request.urlopen(f"{server.url}/info") as response:
        return json.load(response)["models"], outcomes


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6)
    parser.add_argument("--slo", type=float, default=1000, help="ms")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = {"embed": peers.MODEL, "rerank": folder / "rerank", "classify": folder / "classify"}
        for name, labels in (("rerank", 1), ("classify", 3)):
            sources[name].mkdir()
            rerank.make_model(sources[name], labels)
        sides: dict[str, Side] = {}
        memory: dict[str, float] = {}
        try:
            for name, together in (("one server", True), ("three servers", False)):
                sides[name] = Side(sources, folder, options.slo, together=together)
                memory[name] = sides[name].memory_mb()
            one = sides["one server"]
            alone = {}
            for model, url in one.urls.items():
                ready = requests(url, PATHS[model], BODIES[model])
                alone[model] = run_closed(url, ready, CLIENTS[model], options.seconds).rate
            work: dict[str, list[float]] = {name: [] for name in sides}
            for name in peers.order(list(sides), options.rounds):
                outcomes = sides[name].closed(options.seconds)
                assert not any(outcome.failures for outcome in outcomes.values())
                work[name].append(sum(outcome.rate / alone[model] for model, outcome in outcomes.items()))
                print(name, {model: round(outcome.rate) for model, outcome in outcomes.items()}, flush=True)
            sides.pop("three servers").end()
            ratio = peers.median([a / b for a, b in zip(*work.values(), strict=True)])
            rows = [(name, peers.median(work[name]), memory[name]) for name in work]
            peers.table(("", "work", "MB"), rows)
            print(f"one server / three servers: {ratio:.3f} of the work, {memory['one server']:.0f} MB")
            floods = []
            for flooded in alone:
                rates = {model: rate * (3 if model == flooded else 0.25) for model, rate in alone.items()}
                found = one.each(
                    lambda name, url, ready, rates=rates: run_open(url, ready, rates[name], options.seconds)  # type: ignore[misc]
                )
                for model, outcome in found.items():
                    late = sum(1000 * seconds > options.slo for seconds in outcome.latencies) / len(outcome.latencies)
                    rejected = outcome.statuses.get(429, 0) / len(outcome.latencies)
                    floods.append((flooded, model, rates[model], outcome.quantile(0.99), late, rejected))
            peers.table(("flooded", "model", "offered/s", "p99 ms", "late", "rejected"), floods)
            info, outcomes = killed(one, alone)
            kills = [(each["name"], each["restarts"], str(outcomes[each["name"]].statuses)) for each in info]
            peers.table(("an engine is killed", "restarts", "statuses"), kills)
        finally:
            for side in sides.values():
                side.end()
    peers.write(
        options.json,
        {"alone": alone, "work": work, "ratio": ratio, "memory_mb": memory, "floods": floods, "kills": kills},
    )


if __name__ == "__main__":
    main()
