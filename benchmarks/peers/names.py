"""Compare one server of three models with three servers of one, and flood each model at three times its peak.

    python benchmarks/peers/names.py [--rounds 6] [--seconds 8] [--slo 1000] [--json FILE]

The models are all-MiniLM-L6-v2, a cross-encoder and a classifier of its size with random weights. Texts have a
log-normal length (mean 55 tokens); a request of the cross-encoder has 8 documents. "Work" is the sum of the rates of the
models in closed loops at the same time, each divided by its rate alone. One server and three servers take turns
(A B B A), and a ratio is the median over pairs of rounds. "By CPU" divides the work by the CPU seconds of the servers:
beside other load, three servers get more of the machine than one. Memory (PSS) is that after such a load. The three
start after it was read of the one, so only they divide pages with others.

Then, on one server with an SLO, open loops send to one model three times its peak, and to the others a quarter of
theirs. "Late" is the share of accepted requests that exceeded the SLO. In the end, an engine is killed, while all get a
quarter. The load generator shares the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
import rerank
from load import Outcome, requests, run_closed
from recorder import OpenLoop, latencies, processes, quantile, statuses

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

    def __init__(
        self, sources: Mapping[str, Path], folder: Path, slo: float | None = None, *, together: bool = True
    ) -> None:
        models = [{"name": name, "model": {"source": str(source)}} for name, source in sources.items()]
        self.servers: list[peers.Server] = []
        self.ready: dict[str, tuple[str, list[bytes]]] = {}
        for part in [models] if together else [[model] for model in models]:
            file = folder / f"{'-'.join(str(model['name']) for model in part)}.yaml"
            file.write_text(json.dumps({"name": "mix", "models": part, "slo": {"p99_ms": slo}}))
            port = str(peers.free_port())
            command: list[str | Path] = [sys.executable, "-m", "inferctl", "serve", "--spec", file, "--port", port]
            server = peers.start(file.stem, command, int(port), "", "/readyz", folder=peers.ROOT)
            self.servers.append(server)
            for name in (str(model["name"]) for model in part):
                self.ready[name] = server.url, requests(server.url, PATHS[name], BODIES[name])

    def end(self) -> None:
        while self.servers:
            self.servers.pop().end()

    def closed(self, seconds: float) -> dict[str, Outcome]:
        """Return what comes of closed loops on all models at the same time."""
        with ThreadPoolExecutor(len(self.ready)) as pool:
            sent = {n: pool.submit(run_closed, *given, CLIENTS[n], seconds) for n, given in self.ready.items()}
            return {name: outcome.result() for name, outcome in sent.items()}

    def opened(self, rates: Mapping[str, float], seconds: float, *, kill: bool = False) -> dict[str, OpenLoop]:
        """Return what comes of open loops. `kill`: an engine, after a quarter of the time."""
        loops = {n: OpenLoop(url, [(n, each) for each in sent], rates[n]) for n, (url, sent) in self.ready.items()}
        with contextlib.ExitStack() as stack:
            for loop in loops.values():
                stack.enter_context(loop)
            time.sleep(seconds / 4)
            if kill:
                os.kill(processes(self.servers[0].process.pid)["engine"], signal.SIGKILL)
            time.sleep(seconds * 3 / 4)
        return loops


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6)
    parser.add_argument("--slo", type=float, default=1000, help="ms")
    options = parser.parse_args()
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder, memory = Path(place), {}
        sources = {"embed": peers.MODEL, "rerank": folder / "rerank", "classify": folder / "classify"}
        for name, labels in (("rerank", 1), ("classify", 3)):
            sources[name].mkdir()
            rerank.make_model(sources[name], labels)
        for name, together in (("one server", True), ("three servers", False)):
            sides[name] = Side(sources, folder, together=together)
            stack.callback(sides[name].end)
            sides[name].closed(3)
            memory[name] = sum(peers.pss_mb(server.process.pid) for server in sides[name].servers)
        one = sides["one server"]
        alone = {n: run_closed(*given, CLIENTS[n], options.seconds).rate for n, given in one.ready.items()}
        work: dict[str, list[float]] = {name: [] for name in sides}
        by_cpu: dict[str, list[float]] = {name: [] for name in sides}
        for name in peers.order(list(sides), options.rounds):
            before = sum(server.cpu_seconds() for server in sides[name].servers)
            outcomes = sides[name].closed(options.seconds)
            cpu_s = sum(server.cpu_seconds() for server in sides[name].servers) - before
            work[name].append(sum(outcome.rate / alone[model] for model, outcome in outcomes.items()))
            by_cpu[name].append(sum(each.completed / alone[model] for model, each in outcomes.items()) / cpu_s)
            shown = {model: f"{each.rate:.0f}/s, {each.failures} failed" for model, each in outcomes.items()}
            print(f"{name}: {shown}, {cpu_s:.1f} CPU seconds", file=sys.stderr)
        ratios = [peers.median([a / b for a, b in zip(*each.values(), strict=True)]) for each in (work, by_cpu)]
        peers.table(("", "work", "MB"), [(name, peers.median(work[name]), memory[name]) for name in work])
        print("one server / three servers: {:.3f} of the work, {:.3f} by CPU".format(*ratios))
        for side in sides.values():
            side.end()
        one = Side(sources, folder, options.slo)
        stack.callback(one.end)
        rows = []
        for case in (*alone, "an engine is killed"):
            rates = {model: rate * (3 if model == case else 0.25) for model, rate in alone.items()}
            for model, loop in one.opened(rates, 2 * options.seconds, kill=case not in alone).items():
                accepted = latencies(loop.records)
                late = sum(ms > options.slo for ms in accepted) / max(1, len(accepted))
                rows.append((case, model, rates[model], quantile(accepted, 0.99), late, str(statuses(loop.records))))
        with urllib.request.urlopen(f"{one.servers[0].url}/info") as response:
            restarts = {model["name"]: model["restarts"] for model in json.load(response)["models"]}
    peers.table(("flooded", "model", "offered/s", "p99 ms", "late", "statuses"), rows)
    print(f"restarts: {restarts}")
    found = {
        "alone": alone,
        "work": work,
        "by_cpu": by_cpu,
        "ratios": ratios,
        "memory_mb": memory,
        "floods": rows,
        "restarts": restarts,
    }
    peers.write(options.json, found)


if __name__ == "__main__":
    main()
