"""The 4x, told again: from the first server that people build to inferctl, step by step, under the same traffic.

    python benchmarks/four_x/four_x.py [--rounds 2] [--seconds 6] [--slo 500] [--repeats 0.3] [--report FILE]

The first server does keys, limits, log and billing in the request path, in PostgreSQL. Each step adds one thing; the
last steps are `inferctl serve` with keys, limits and metering. Requests are single texts with a mean of 55 tokens. A
share of them (`--repeats`) repeats 1,000 popular texts by Zipf(1.0), all others are new. For each server:

- **Throughput at the SLO**: the highest of the probed rates (open loop, Poisson) at which all requests are answered and
  p99 stays within `--slo` ms. Probes go down from the rate of a closed loop in steps of 10%.
- **Mean latency at the first server's peak**: at its own throughput at the SLO, for all.
- **Burst**: p99 at three times that rate for some seconds.

Servers run one at a time, in the order A B C C B A. The load generator shares the cores. It needs PostgreSQL, Envoy
(extra `gateway`), FastAPI and psycopg_pool (extra `dev`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peers"))
sys.path.insert(0, str(HERE.parent.parent))

import peers  # noqa: E402
from load import Outcome, requests, run_closed, run_open  # noqa: E402

POPULAR, CLIENTS = 1000, 64
FACTORS = [0.95 * 0.9**step for step in range(9)]
BURST = 3
TABLES = """
create table keys (id text primary key, digest text unique, revoked boolean default false);
create table counters (key_id text, minute bigint, n bigint, primary key (key_id, minute));
create table log (id bigserial primary key, at timestamptz default now(), key_id text, tokens int, seconds float);
create table balances (key_id text primary key, tokens bigint);
"""


@dataclass
class Place:
    """Where the servers of this run get their keys. `database`: the URL of PostgreSQL."""

    folder: Path
    database: str
    key: str
    key_file: Path


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Start PostgreSQL with its default settings, and yield the URL of its database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        sys.exit("error: PostgreSQL is not installed\n\nhint: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    folder.parent.chmod(0o755)  # PostgreSQL does not run as root
    folder.mkdir()
    folder.chmod(0o777)
    initdb = [f"{programs[-1]}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres"]
    subprocess.run(initdb, user=user, check=True, capture_output=True)
    command = [f"{programs[-1]}/postgres", "-D", f"{folder}/data", "-c", "listen_addresses=", "-k", str(folder)]
    process = subprocess.Popen(command, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        psql = [f"{programs[-1]}/psql", "-h", str(folder), "-U", "postgres", "-q"]
        for _ in range(100):
            if subprocess.run([*psql, "-c", "select 1"], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        process.terminate()
        process.wait()


def prepare(folder: Path, database: str) -> Place:
    """Create 1,000 keys for both: rows in PostgreSQL, and a key file."""
    import psycopg

    from inferctl.tenancy.access import key_file, keys
    from inferctl.tenancy.access.key_file import ApiKey, StoredDigest

    file = folder / "keys" / "keys.json"
    file.parent.mkdir()
    with psycopg.connect(database) as connection, key_file.edit(file, create=True) as found:
        connection.execute(TABLES)
        for number in range(1000):
            key_id = keys.new_id()
            secret = keys.generate(key_id)
            digest = hashlib.sha256(secret.encode()).hexdigest()
            connection.execute("insert into keys (id, digest) values (%s, %s)", (key_id, digest))
            connection.execute("insert into balances values (%s, 0)", (key_id,))
            stored = StoredDigest(sha256=keys.digest(secret.encode()).hex())
            found[key_id] = ApiKey(id=key_id, name=f"key {number}", digests=[stored], created=key_file.now())
    return Place(folder, database, secret, file)


def first(port: int, *options: str) -> Callable[[Place, ExitStack], str]:
    def start(place: Place, stack: ExitStack) -> str:
        command = [sys.executable, HERE / "first_server.py", peers.MODEL, str(port), place.database, *options]
        server = peers.start(f"first-{port}", command, port, "/v1/embeddings", "/readyz")
        stack.callback(server.end)
        return server.url

    return start


def behind_envoy(place: Place, stack: ExitStack) -> str:
    """Two processes of the first server, behind Envoy."""
    servers = [first(18621)(place, stack), first(18622)(place, stack)]
    names = [part for url in servers for part in ("--server", url)]
    announce = place.folder / "gateway.json"
    announce.unlink(missing_ok=True)
    gateway = subprocess.Popen(
        [sys.executable, "-m", "inferctl", "gateway", *names, "--port", "0", "--threads", "1", "--announce", announce],
        env={**os.environ, "PYTHONPATH": str(peers.ROOT)},
        stderr=subprocess.DEVNULL,
    )
    stack.callback(lambda: (gateway.terminate(), gateway.wait()))
    while not announce.exists():
        time.sleep(0.1)
    time.sleep(12)  # health checks, and the slow start of new servers
    return str(json.loads(announce.read_text())["url"])


def inferctl(port: int, **sections: Any) -> Callable[[Place, ExitStack], str]:
    def start(place: Place, stack: ExitStack) -> str:
        data = place.folder / f"metering-{port}-{time.monotonic_ns()}"
        limits = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000}
        spec = {
            "name": "minilm",
            "model": {"source": str(peers.MODEL)},
            "serve": {"precision": "bf16", "port": port},
            "access": {"keys": str(place.key_file), **limits},
            "metering": {"mode": "on", "data": str(data), "ledger": place.database},
            **sections,
        }
        file = place.folder / f"inferctl-{port}.yaml"
        file.write_text(json.dumps(spec))
        command = ["env", f"PYTHONPATH={peers.ROOT}", sys.executable, "-m", "inferctl", "serve", "--spec", file]
        server = peers.start(f"inferctl-{port}", command, port, "/v1/embeddings", "/readyz")
        stack.callback(server.end)
        return server.url

    return start


BACKGROUND = ("--work", "background")
# Name -> how it starts. Each server adds one thing to the one before; Envoy stands apart.
STEPS: dict[str, Callable[[Place, ExitStack], str]] = {
    "first server": first(18611),
    "the same, twice behind Envoy": behind_envoy,
    "+ asynchronous work": first(18613, *BACKGROUND),
    "+ batching": first(18614, *BACKGROUND, "--batch", "32"),
    "+ bf16": first(18615, *BACKGROUND, "--batch", "32", "--dtype", "bfloat16"),
    "inferctl: + packing": inferctl(18616),
    "inferctl: + cache": inferctl(18617, cache={"size": "64MiB"}),
}


class Traffic:
    """Requests with a share of repeats. `take(n)` never returns a new text twice."""

    def __init__(self, share: float, seed: int = 7) -> None:
        self._random, self._share, self._used = random.Random(seed), share, 0
        self._popular = peers.texts(POPULAR, seed=1)
        self._weights = [1 / rank for rank in range(1, POPULAR + 1)]
        self._new = peers.texts(60_000, seed=2)

    def take(self, count: int) -> list[dict[str, str]]:
        popular = self._random.choices(self._popular, self._weights, k=count)
        found = []
        for text in popular:
            if self._random.random() >= self._share:
                text = self._new[self._used % len(self._new)]
                self._used += 1
            found.append({"input": text})
        return found


def measure(url: str, place: Place, traffic: Traffic, options: Any, peak: float | None) -> dict[str, float]:
    """Measure one server. `peak`: requests/s of the first server at the SLO; None measures it."""

    def ready(count: float) -> list[bytes]:
        headers = {"authorization": f"Bearer {place.key}"}
        return requests(url, "/v1/embeddings", traffic.take(max(64, int(1.5 * count))), headers)

    def probe(rate: float, seconds: float) -> Outcome:
        return run_open(url, ready(rate * seconds), rate, seconds)

    closed = run_closed(url, ready(4000), CLIENTS, options.seconds, warm=2)
    if not closed.rate:
        sys.exit(f"error: the server answered nothing within {options.seconds:g} s\n\nhint: see {peers.LOGS}")
    reached = 0.0
    for factor in FACTORS:
        outcome = probe(factor * closed.rate, options.seconds)
        if not outcome.failures and outcome.quantile(0.99) <= options.slo:
            reached = factor * closed.rate
            break
    peak = peak or reached or FACTORS[-1] * closed.rate
    at_peak, burst = probe(peak, options.seconds), probe(BURST * peak, options.seconds / 2)
    return {
        "closed_rate": closed.rate,
        "rate": reached,
        "mean_ms": 1000 * sum(at_peak.latencies) / len(at_peak.latencies),
        "p99_ms": at_peak.quantile(0.99),
        "burst_p99_ms": burst.quantile(0.99),
        "failures": float(closed.failures + at_peak.failures),
    }


def page(rows: list[dict[str, Any]], words: str) -> str:
    """Return an HTML page with one chart and the table, in the style of the report."""
    library = gzip.decompress((peers.ROOT / "templates" / "plotly-basic.min.js.gz").read_bytes())
    names = [row["server"] for row in rows][::-1]
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "y": names,
            "x": [round(row[key], 1) for row in rows][::-1],
            "text": [f"{row[key]:.0f}" for row in rows][::-1],
            "name": label,
            "marker": {"color": color},
            "xaxis": axis,
        }
        for key, label, color, axis in (
            ("rate", "requests/s at the SLO", "#009e73", "x"),
            ("mean_ms", "mean latency at the first server's peak (ms)", "#0072b2", "x2"),
        )
    ]
    layout = {
        "grid": {"rows": 1, "columns": 2},
        "xaxis": {"domain": [0, 0.45], "title": {"text": "requests/s at the SLO"}},
        "xaxis2": {"domain": [0.55, 1], "title": {"text": "mean latency (ms)"}},
        "yaxis": {"automargin": True},
        "showlegend": False,
        "height": 60 + 44 * len(rows),
        "margin": {"t": 20, "r": 20},
    }
    columns = ("server", "requests/s at the SLO", "times the first", "mean ms", "p99 ms", "p99 ms in the burst")
    keys = ("server", "rate", "times", "mean_ms", "p99_ms", "burst_p99_ms")
    cells = "".join(
        "<tr>"
        + "".join(f"<td>{row[key] if key == 'server' else format(row[key], '.4g')}</td>" for key in keys)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{column}</th>" for column in columns)
    style = "body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}td,th{padding:.3rem .8rem;"
    style += "text-align:right}td:first-child,th:first-child{text-align:left}table{border-collapse:collapse}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>The 4x, told again</title><style>{style}</style><h1>The 4x, told again</h1><p>{words}</p>"
        f"<div id=chart></div><table><tr>{head}</tr>{cells}</table>"
        f"<script src='data:text/javascript;base64,{base64.b64encode(library).decode()}'></script>"
        f"<script>Plotly.newPlot('chart',{json.dumps(bars)},{json.dumps(layout)},{{displayModeBar:false}})</script>"
    )


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=6)
    parser.add_argument("--slo", type=float, default=500, help="the largest p99, in ms")
    parser.add_argument("--repeats", type=float, default=0.3, help="share of requests that repeat popular texts")
    parser.add_argument("--report", type=Path, help="write a page with the chart to this file")
    parser.add_argument("--only", help="names of servers, separated by commas")
    options = parser.parse_args()
    chosen = [name for name in STEPS if not options.only or name in options.only.split(",")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    peak: float | None = None
    with tempfile.TemporaryDirectory() as folder, postgres(Path(folder) / "postgres") as database:
        place = prepare(Path(folder), database)
        for name in peers.order(chosen, options.rounds):
            traffic = Traffic(options.repeats)
            with ExitStack() as stack:
                figures = measure(STEPS[name](place, stack), place, traffic, options, peak)
            peak = peak or figures["rate"]
            found[name].append(figures)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for name, rounds in found.items():
        medians = {key: peers.median([each[key] for each in rounds]) for key in rounds[0]}
        rows.append({"server": name, **medians})
    base = rows[0]
    for index, row in enumerate(rows):
        row["times"] = row["rate"] / base["rate"]
        # Envoy stands apart: the step after it is compared with the first server.
        row["step"] = row["rate"] / rows[max(0, index - 1 - (index == 2))]["rate"]
    words = (
        f"Single texts, {options.repeats:.0%} repeats, SLO p99 {options.slo:g} ms. Latency at {peak:.0f} requests/s, "
    )
    words += f"the burst at {BURST * (peak or 0):.0f}. Medians of {options.rounds} rounds."
    print(words)
    head = ("server", "requests/s", "x first", "x step", "mean ms", "p99 ms", "burst p99 ms", "failures")
    keys = ("server", "rate", "times", "step", "mean_ms", "p99_ms", "burst_p99_ms", "failures")
    peers.table(head, [[row[key] for key in keys] for row in rows])
    last = rows[-1]
    print(f"throughput at the SLO {last['times']:.1f}x, mean latency {base['mean_ms'] / last['mean_ms']:.1f}x lower")
    if options.report:
        options.report.write_text(page(rows, words))
    peers.write(options.json, {"slo_ms": options.slo, "repeats": options.repeats, "peak": peak, "rounds": found})


if __name__ == "__main__":
    main()
