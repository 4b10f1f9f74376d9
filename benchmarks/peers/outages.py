"""What a part that stops to respond costs the requests of a server: broker, outbox, PostgreSQL.

    python benchmarks/peers/outages.py [--broker-seconds 60] [--seconds 10] [--rounds 6] [--json FILE] [OUTAGE ...]

The outages, default all; each one has a server of its own, with the echo engine, keys and metering:

- `broker-stalled`: NATS, for limits and keys, is stopped (SIGSTOP) for `--broker-seconds`
- `broker-killed`: the same NATS is killed, and started again after that time
- `outbox-locked`: another process holds BEGIN EXCLUSIVE on the outbox for `--seconds`
- `postgresql-stalled`: PostgreSQL with ledger and keys is stopped

An open loop runs at 40% of the throughput of a closed loop. Calm windows and outages alternate on the same server (A B
B A). A ratio is p99 in an outage / p99 in the calm window of the same round, and a figure is the median over the
rounds. A window has all requests in flight in it. "After" begins at the end of the outage, when the server catches up,
and lasts as long, up to 20 s.

Exits with 1 if a p99 rises by more than 5%, if a request gets another response than 200, or if the server lost an
event, did not notice an outage, or did not recover from it.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import load
import peers
from outage_parts import OUTAGES, Outage
from recorder import OpenLoop, Record, latencies, quantile, statuses

CLIENTS, LOAD = 64, 0.4
MAX_RATIO = 1.05
AFTER_S, RECOVERY_S, PAUSE_S = 20.0, 120.0, 1.0


def in_flight(records: list[Record], begin: float, end: float) -> list[Record]:
    return [each for each in records if each.intended < end and (each.ended is None or each.ended >= begin)]


def wait_until_recovered(outage: Outage, rate: float) -> bool:
    try:
        peers.wait_until(lambda: outage.recovered(peers.metrics(outage.server), rate), RECOVERY_S)
    except AssertionError:
        return False
    return True


def run_round(outage: Outage, ready: list[bytes], rate: float, kinds: list[str], seed: int) -> dict[str, Any]:
    """Run a calm window and an outage in this order, and return p99 (ms) by window, statuses and problems."""
    windows: dict[str, tuple[float, float]] = {}
    problems = []

    def window(name: str, seconds: float, begin: float | None = None) -> list[Record]:
        begin = time.monotonic() if begin is None else begin
        time.sleep(seconds)
        windows[name] = begin, time.monotonic()
        return in_flight(list(running.records), *windows[name])

    # A collection in this process would delay the load generator by tens of ms.
    gc.disable()
    with OpenLoop(outage.server.url, [("text", each) for each in ready], rate, seed=seed) as running:
        time.sleep(2)
        for kind in kinds:
            if kind == "calm":
                window("calm", min(outage.seconds, AFTER_S))
                continue
            sent = window("outage", outage.seconds, outage.begin())
            if not outage.noticed(peers.metrics(outage.server), len(sent)):
                problems.append("the outage was not noticed")
            outage.end()
            window("after", min(outage.seconds, AFTER_S))
            if not wait_until_recovered(outage, rate):
                problems.append(f"not recovered after {RECOVERY_S:g} s")
            time.sleep(PAUSE_S)
    gc.enable()
    gc.collect()
    found = {name: latencies(in_flight(running.records, *window)) for name, window in windows.items()}
    return {
        "p99_ms": {name: quantile(values, 0.99) for name, values in found.items()},
        "statuses": statuses(running.records),
        "problems": problems,
        "max_lateness_s": running.max_lateness_s,
    }


def measure(outage: Outage, rounds: int) -> dict[str, Any]:
    """Return the figures of all rounds of one outage."""
    texts = peers.texts(500)
    bodies = [{"input": f"{number} {texts[number % len(texts)]}"} for number in range(len(texts))]
    ready = load.requests(outage.server.url, outage.server.path, bodies, outage.headers)
    peak = load.run_closed(outage.server.url, ready, CLIENTS, 3, warm=2)
    assert not peak.failures, f"rejected requests: {peak.statuses}"
    rate = LOAD * peak.rate
    if not wait_until_recovered(outage, rate):
        sys.exit(f"error: {outage.server.name}: events do not reach the ledger\nhint: end other work on the machine")
    order = [["calm", "outage"], ["outage", "calm"]]
    found = [run_round(outage, ready, rate, order[n % 2], n) for n in range(rounds)]
    problems = [problem for each in found for problem in each["problems"]]
    try:
        peers.wait_until(lambda: peers.metrics(outage.server)["inferctl_outbox_events"] == 0, RECOVERY_S)
    except AssertionError:
        problems.append("events do not reach the ledger")
    if dropped := peers.metrics(outage.server)["inferctl_outbox_dropped_events"]:
        problems.append(f"{dropped:g} events were dropped")
    counted: dict[str, int] = {}
    for each in found:
        for status, count in each["statuses"].items():
            counted[status] = counted.get(status, 0) + count
    figures: dict[str, Any] = {
        "rate": rate,
        "p99_ms": {name: [each["p99_ms"][name] for each in found] for name in ("calm", "outage", "after")},
        "statuses": counted,
        "max_lateness_s": max(each["max_lateness_s"] for each in found),
    }
    calm = figures["p99_ms"]["calm"]
    for name in ("outage", "after"):
        ratios = sorted(b / a for a, b in zip(calm, figures["p99_ms"][name], strict=True))
        figures[f"{name}_ratio"] = peers.median(ratios)
        figures[f"{name}_ratios"] = ratios
    figures["problems"] = problems + not_met(figures)
    return figures


def not_met(figures: dict[str, Any]) -> list[str]:
    """Return the bars that figures do not meet."""
    found = []
    if errors := {status: count for status, count in figures["statuses"].items() if status != "200"}:
        found.append(f"responses other than 200: {errors}")
    found += [
        f"p99 x{figures[f'{name}_ratio']:.2f} {when}"
        for name, when in (("outage", "in the outage"), ("after", "after the outage"))
        if figures[f"{name}_ratio"] > MAX_RATIO
    ]
    return found


def run(name: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Start the parts of one outage and a server, and measure it."""
    # A relay may still write when its server was killed.
    with tempfile.TemporaryDirectory(prefix="outages-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        outage = stack.enter_context(OUTAGES[name](Path(folder), seconds))
        stack.callback(outage.server.end)
        return measure(outage, rounds)


def main() -> int:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=10, rounds=6)
    parser.add_argument("outages", nargs="*", metavar="OUTAGE", help=f"{', '.join(OUTAGES)}; default: all")
    parser.add_argument("--broker-seconds", type=float, default=60, help="duration of an outage of the broker")
    options = parser.parse_args()
    if unknown := set(options.outages) - set(OUTAGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    figures = {}
    for name in options.outages or OUTAGES:
        seconds = options.broker_seconds if name.startswith("broker") else options.seconds
        figures[name] = run(name, seconds, options.rounds)
        print(f"{name}: {'; '.join(figures[name]['problems']) or 'all bars are met'}", file=sys.stderr)
    rows = [
        (
            name,
            each["rate"],
            *(peers.median(values) for values in each["p99_ms"].values()),
            each["outage_ratio"],
            f"{each['outage_ratios'][0]:.2f} to {each['outage_ratios'][-1]:.2f}",
            each["after_ratio"],
            str(each["statuses"]),
        )
        for name, each in figures.items()
    ]
    head = ("outage", "requests/s", "p99 calm (ms)", "outage", "after", "ratio, outage", "rounds", "after", "responses")
    peers.table(head, rows)
    failed = {name: each["problems"] for name, each in figures.items() if each["problems"]}
    for name, problems in failed.items():
        print(f"NOT MET: {name}: {'; '.join(problems)}")
    peers.write(options.json, {"outages": figures, "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
