"""Measure infinity, as installed, with `inferctl bench --url` and with this folder's own load generator.

    python benchmarks/peers/foreign.py [--seconds 8] [--rounds 4] [--users 16] [--json FILE]

infinity serves in bf16 and requires an API key. Both load generators send the same texts, in base64, in a closed loop,
interleaved A B B A. `inferctl bench` reads the key from the environment and sends one more header.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import peers
from load import requests, run_closed

KEY = "a-key-of-this-run"
PLAN = """\
name: foreign
configurations: [{{name: any, precision: auto}}]
load: {{mode: closed, users: {users}, duration_s: {seconds}, warmup_s: 4, inputs: as-is}}
corpus: mixed
repeats: 1
"""


def bench(server: peers.Server, users: int, seconds: float) -> tuple[float, float, float]:
    """Return requests/s, p50 and p99 (ms) as `inferctl bench --url` measures them. Exits if it fails."""
    with tempfile.TemporaryDirectory() as name:
        plan = Path(name) / "plan.yaml"
        plan.write_text(PLAN.format(users=users, seconds=seconds))
        command = [sys.executable, "-m", "inferctl", "bench", "--url", f"infinity={server.url}", "--plan", str(plan)]
        command += ["--api-key-env", "PEER_KEY", "--header", "X-Team: search", "--output", name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PEER_KEY": KEY}, check=False)
    if done.returncode:
        sys.exit(f"error: inferctl bench ended with {done.returncode}\n{done.stderr}")
    row = json.loads(done.stdout)["rows"][0]
    return row["requests_per_s"], row["p50_ms"], row["p99_ms"]


def own(server: peers.Server, users: int, seconds: float) -> tuple[float, float, float]:
    """Return requests/s, p50 and p99 (ms) as `load.py` measures them. Exits if a request fails."""
    lines = (peers.ROOT / "benchmarks" / "corpora" / "mixed.jsonl").read_text().splitlines()
    bodies = [
        {"model": peers.MODEL.name, "input": json.loads(line)["text"], "encoding_format": "base64"} for line in lines
    ]
    ready = requests(server.url, server.path, bodies, {"authorization": f"Bearer {KEY}", "x-team": "search"})
    outcome = run_closed(server.url, ready, users, seconds, warm=4)
    if outcome.failures:
        sys.exit(f"error: {outcome.failures} requests failed: {outcome.statuses}")
    return outcome.rate, outcome.quantile(0.5), outcome.quantile(0.99)


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--users", type=int, default=16)
    parser.set_defaults(rounds=4)
    options = parser.parse_args()
    server = peers.infinity(18505, "bfloat16", api_key=KEY)
    measured: dict[str, list[tuple[float, float, float]]] = {"inferctl bench --url": [], "load.py": []}
    try:
        for name in peers.order(list(measured), options.rounds):
            measure = own if name == "load.py" else bench
            measured[name].append(measure(server, options.users, options.seconds))
    finally:
        server.end()
    rows = [(name, *(peers.median(values) for values in zip(*runs, strict=True))) for name, runs in measured.items()]
    print(f"infinity bf16, closed loop, {options.users} users, {options.rounds} runs of {options.seconds:g} s, medians")
    peers.table(("load generator", "requests/s", "p50 ms", "p99 ms"), rows)
    peers.write(options.json, {"users": options.users, "seconds": options.seconds, "runs": measured})


if __name__ == "__main__":
    main()
