"""What metering costs: `inferctl serve` with usage events beside the same server without.

    python benchmarks/peers/metering.py [--seconds 8] [--rounds 6] [--json FILE]

Both servers have the echo engine, so everything is real except the model. 64 clients send single texts as token ids.
Rounds are interleaved; the worker of the metered server runs all the time, on the same cores, and stores into SQLite.
CPU times are those of the API process and of the worker, per request.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import peers
from load import Outcome, requests, run_closed

CLIENTS, _WARM_S = 64, 1.0
_HEAD = ("server", "requests/s", "p50 (ms)", "p99 (ms)", "CPU of the server (us)", "CPU of the worker (us)")


def stored(folder: Path) -> int:
    """Return how many events the ledger has."""
    with sqlite3.connect(f"file:{folder}/ledger.sqlite?mode=ro", uri=True, timeout=30) as ledger:
        return int(ledger.execute("select count(*) from usage_events").fetchone()[0])


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_of(pid: int) -> int | None:
    """Return the process of the worker of a server, None without one."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"inferctl.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    bodies = [{"input": peers.token_ids(text)} for text in peers.texts(500)]
    folder = Path(tempfile.mkdtemp(prefix="metering-"))
    names, running = ("without", "with metering"), []
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    cpu: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        for port, name in zip((18521, 18522), names, strict=True):
            if name != "without":
                os.environ |= {"INFERCTL_METERING_MODE": "on", "INFERCTL_METERING_DATA": str(folder)}
            running.append(peers.inferctl(port, "--engine", "echo", name=name))
        for server in peers.order(running, options.rounds):
            ready = requests(server.url, server.path, bodies)
            processes = (server.process.pid, worker_of(server.process.pid))
            before = [cpu_seconds(pid) if pid else 0.0 for pid in processes]
            outcome = run_closed(server.url, ready, CLIENTS, options.seconds, warm=_WARM_S)
            assert not outcome.failures, f"{server.name} rejected requests: {outcome.statuses}"
            outcomes[server.name].append(outcome)
            time.sleep(1)  # the worker stores what is left, so that it does not run beside the other server
            after = [cpu_seconds(pid) if pid else 0.0 for pid in processes]
            # The warm-up is in both, and has the same rate.
            count = outcome.rate * (options.seconds + _WARM_S)
            cpu[server.name].append(tuple(1e6 * (b - a) / count for a, b in zip(before, after, strict=True)))
        time.sleep(2)
        events = stored(folder)
    finally:
        for server in running:
            server.end()
        shutil.rmtree(folder, ignore_errors=True)
    figures = {
        name: {
            "rate": peers.median([outcome.rate for outcome in found]),
            "p50_ms": peers.median([outcome.quantile(0.5) for outcome in found]),
            "p99_ms": peers.median([outcome.quantile(0.99) for outcome in found]),
            "server_cpu_us": peers.median([server for server, _ in cpu[name]]),
            "worker_cpu_us": peers.median([worker for _, worker in cpu[name]]),
        }
        for name, found in outcomes.items()
    }
    plain, metered = (figures[name] for name in names)
    shares = {key: metered[key] / plain[key] for key in plain if key != "worker_cpu_us"}
    rows = [(name, *values.values()) for name, values in figures.items()]
    peers.table(_HEAD, [*rows, ("share", *shares.values(), "-")])
    print(f"\nevents in the ledger: {events}")
    peers.write(options.json, {"figures": figures, "shares": shares, "events": events})


if __name__ == "__main__":
    main()
