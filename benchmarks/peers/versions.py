"""Compare the server of this checkout with that of another one, such as a worktree of an older commit.

    git worktree add ../older COMMIT
    python benchmarks/peers/versions.py ../older [--seconds 8] [--rounds 4] [--json FILE]

Both serve the same model in bf16, then the echo engine, which has no model. A closed loop measures requests/s, in the
order A B B A A B B A. An open loop at 60% of the older rate measures the p99, with equal arrival times for both.
"""

from __future__ import annotations

from pathlib import Path

import peers
from load import requests, run_closed, run_open

LOADS = {"single texts": ([{"input": text} for text in peers.texts(2000)], 64)}
LOADS["32 texts"] = ([{"input": peers.texts(32, seed=seed), "encoding_format": "base64"} for seed in range(40)], 8)
ENGINES = {"bf16": ("--precision", "bf16"), "echo": ("--engine", "echo")}


def compare(older: Path, engine: str, load: str, seconds: float, rounds: int) -> dict[str, float]:
    """Return the medians of requests/s and p99 (ms) of both servers."""
    bodies, clients = LOADS[load]
    checkouts = {"older": older.resolve(), "this": peers.ROOT}
    running: dict[str, peers.Server] = {}
    rates: dict[str, list[float]] = {name: [] for name in checkouts}
    p99: dict[str, list[float]] = {name: [] for name in checkouts}
    try:
        for index, (name, checkout) in enumerate(checkouts.items()):
            running[name] = peers.inferctl(18530 + index, *ENGINES[engine], name=f"inferctl {name}", checkout=checkout)
        ready = {name: requests(server.url, server.path, bodies) for name, server in running.items()}
        for name in peers.order(list(running), rounds):
            outcome = run_closed(running[name].url, ready[name], clients, seconds)
            assert not outcome.failures, f"{name} rejected requests: {outcome.statuses}"
            rates[name].append(outcome.rate)
        rate = 0.6 * peers.median(rates["older"])
        for turn, name in enumerate(peers.order(list(running), rounds)):
            p99[name].append(run_open(running[name].url, ready[name], rate, seconds, seed=turn // 2).quantile(0.99))
    finally:
        for server in running.values():
            server.end()
    figures = {f"{name}, requests/s": peers.median(values) for name, values in rates.items()}
    return figures | {f"{name}, p99 (ms)": peers.median(values) for name, values in p99.items()}


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("older", type=Path, help="folder of the other checkout")
    parser.set_defaults(rounds=4)
    options = parser.parse_args()
    rows, figures = [], {}
    for engine in ENGINES:
        for load in LOADS:
            found = compare(options.older, engine, load, options.seconds, options.rounds)
            ratios = [found[f"this, {unit}"] / found[f"older, {unit}"] for unit in ("requests/s", "p99 (ms)")]
            rows.append((f"{engine}, {load}", *found.values(), *ratios))
            figures[f"{engine}, {load}"] = found
    head = ("load", "older, req/s", "this, req/s", "older, p99 (ms)", "this, p99 (ms)", "req/s", "p99")
    peers.table(head, rows)
    peers.write(options.json, {"versions": figures})


if __name__ == "__main__":
    main()
