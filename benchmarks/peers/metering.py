"""What metering costs: `inferctl serve` with usage events beside the same server without; and a flood of rejections.

    python benchmarks/peers/metering.py [--seconds 8] [--rounds 6] [--json FILE] [cost]
    python benchmarks/peers/metering.py [--seconds 8] [--rounds 3] [--json FILE] [--earlier CHECKOUT] rejections

cost: both servers have the echo engine, so everything is real except the model. 64 clients send single texts as token
ids. Rounds are interleaved; the relay of the metered server runs all the time, on the same cores, and stores into SQLite.
CPU times are those of the API process and of the relay, per request.

rejections: a key above its limit sends as fast as it can, next to another key in a closed loop and to 20 requests/s for
/livez. Each run has a new server with `metering.mode: required` and an outbox of 4 MiB, with a ledger and without one,
of this checkout and of another one. The other key's figures are from the end of the run, when an outbox may be full.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import peers
from load import Outcome, requests, run_closed, run_open

sys.path.insert(0, str(peers.ROOT))

from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey, StoredDigest

CLIENTS, _WARM_S = 64, 1.0
_HEAD = ("server", "requests/s", "p50 (ms)", "p99 (ms)", "CPU of the server (us)", "CPU of the relay (us)")


def stored(folder: Path, where: str = "true") -> int:
    """Return how many events the ledger has."""
    with sqlite3.connect(f"file:{folder}/ledger.sqlite?mode=ro", uri=True, timeout=30) as ledger:
        return int(ledger.execute(f"select count(*) from usage_events where {where}").fetchone()[0])


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def relay_of(pid: int) -> int | None:
    """Return the process of the relay of a server, None without one."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"inferctl.tenancy.relay" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def key(file: Path, name: str, **fields: Any) -> dict[str, str]:
    """Add a key to a file, and return the header with it."""
    key_id = keys.new_id()
    secret = keys.generate(key_id)
    digests = [StoredDigest(sha256=keys.digest(secret.encode()).hex())]
    with key_file.edit(file, create=True) as found:
        found[key_id] = ApiKey(id=key_id, name=name, digests=digests, created=key_file.now(), **fields)
    return {"authorization": f"Bearer {secret}"}


def send(what: str, url: str, header: str, seconds: float) -> None:
    """Send a flood, or requests for /livez, and print how many responses of which status there were, and the p99."""
    if what == "livez":
        get = f"GET /livez HTTP/1.1\r\nhost: {url.removeprefix('http://')}\r\n\r\n".encode()
        outcome = run_open(url, [get], 20, seconds)
    else:
        ready = requests(url, "/v1/embeddings", [{"input": [101, 102]}], json.loads(header))
        outcome = run_closed(url, ready, 16, seconds, warm=0)
    print(json.dumps({"statuses": outcome.statuses, "p99_ms": outcome.quantile(0.99), "max_ms": outcome.quantile(1)}))


class Children:
    """What sends next to the measured client."""

    def __init__(self, url: str, header: dict[str, str], seconds: float) -> None:
        self._started = {
            what: subprocess.Popen(
                [sys.executable, __file__, "send", what, url, json.dumps(header), str(seconds)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for what in ("livez", "flood")
        }

    def results(self) -> dict[str, Any]:
        return {what: json.loads(process.communicate()[0]) for what, process in self._started.items()}


def measure_rejections(port: int, checkout: Path, seconds: float, *, ledger: bool) -> dict[str, Any]:
    """Return the figures of one run."""
    folder = Path(tempfile.mkdtemp(prefix="rejections-"))
    flooding, other = key(folder / "k.json", "flood", requests_per_minute=1), key(folder / "k.json", "other")
    data = folder / "metering"
    settings = {"mode": "required", "data": str(data), "outbox_size": "4MiB"}
    if not ledger:
        settings["ledger"] = "sqlite:////proc/none/ledger.sqlite"
    os.environ |= {"INFERCTL_ACCESS_KEYS": str(folder / "k.json")}
    os.environ |= {f"INFERCTL_METERING_{name.upper()}": value for name, value in settings.items()}
    os.environ.pop("INFERCTL_METERING_LEDGER" if ledger else "", None)
    server = peers.inferctl(port, "--engine", "echo", name="rejections", checkout=checkout)
    bytes_: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            bytes_.append(sum(file.stat().st_size for file in data.glob("*/events.sqlite")))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        ready = requests(server.url, server.path, [{"input": [101, 102]}], other)
        children = Children(server.url, flooding, seconds + 1)
        outcome = run_closed(server.url, ready, 2, seconds / 3, warm=2 * seconds / 3)
        found = children.results()
        time.sleep(3)
        rows = stored(data, "status = 429") if ledger else 0
    finally:
        ended.set()
        watching.join()
        server.end()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "rejected": found["flood"]["statuses"].get("429", 0),
        "rows": rows,
        "outbox_bytes": max(bytes_),
        "other_requests_per_s": outcome.rate,
        "other_p99_ms": outcome.quantile(0.99),
        "other_503": outcome.statuses.get(503, 0),
        "livez_p99_ms": found["livez"]["p99_ms"],
    }


def rejections(options: Any) -> None:
    checkouts = {"earlier": options.earlier, "now": peers.ROOT} if options.earlier else {"now": peers.ROOT}
    cases = [(name, ledger) for ledger in (True, False) for name in checkouts]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, (name, ledger) in enumerate(peers.order(cases, options.rounds)):
        figures = measure_rejections(18523 + number, checkouts[name], options.seconds, ledger=ledger)
        found.setdefault(f"{name}, {'with' if ledger else 'without'} a ledger", []).append(figures)
        print(name, ledger, figures, file=sys.stderr)
    medians = {
        case: {each: peers.median([run[each] for run in runs]) for each in runs[0]} for case, runs in found.items()
    }
    peers.table(("server", *next(iter(medians.values()))), [(case, *each.values()) for case, each in medians.items()])
    peers.write(options.json, {"seconds": options.seconds, "medians": medians, "runs": found})


def main() -> None:
    if sys.argv[1:2] == ["send"]:
        send(*sys.argv[2:5], float(sys.argv[5]))
        return
    parser = peers.options(__doc__ or "")
    parser.add_argument("part", nargs="?", default="cost", choices=("cost", "rejections"))
    parser.add_argument("--earlier", type=Path, metavar="CHECKOUT", help="also measure `rejections` of this checkout")
    parser.set_defaults(rounds=None)
    options = parser.parse_args()
    options.rounds = options.rounds or {"cost": 6, "rejections": 3}[options.part]
    if options.part == "rejections":
        rejections(options)
        return
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
            processes = (server.process.pid, relay_of(server.process.pid))
            before = [cpu_seconds(pid) if pid else 0.0 for pid in processes]
            outcome = run_closed(server.url, ready, CLIENTS, options.seconds, warm=_WARM_S)
            assert not outcome.failures, f"{server.name} rejected requests: {outcome.statuses}"
            outcomes[server.name].append(outcome)
            time.sleep(1)  # the relay stores what is left, so that it does not run beside the other server
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
            "relay_cpu_us": peers.median([relay for _, relay in cpu[name]]),
        }
        for name, found in outcomes.items()
    }
    plain, metered = (figures[name] for name in names)
    shares = {key: metered[key] / plain[key] for key in plain if key != "relay_cpu_us"}
    rows = [(name, *values.values()) for name, values in figures.items()]
    peers.table(_HEAD, [*rows, ("share", *shares.values(), "-")])
    print(f"\nevents in the ledger: {events}")
    peers.write(options.json, {"figures": figures, "shares": shares, "events": events})


if __name__ == "__main__":
    main()
