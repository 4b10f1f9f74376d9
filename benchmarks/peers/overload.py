"""Measure goodput, accepted latency, rejections and memory at three times the load that the server can carry.

    python benchmarks/peers/overload.py [--seconds 60] [--times 3] [--slo 500] [--engine encoder] [--json FILE]

Requests are single texts of log-normal length, mean 55 tokens. A closed loop before and after measures the peak. In
between, an open loop sends a multiple of it, and latencies count from the intended send times. The load generator
shares the machine with the server.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from pathlib import Path

import peers
from load import requests, run_closed
from recorder import OpenLoop, latencies, memory, processes, quantile, statuses


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(seconds=60)
    parser.add_argument("--times", type=float, default=3, help="offered load as a multiple of the peak")
    parser.add_argument("--slo", type=float, default=500, help="p99 SLO of the server, in ms; 0: none")
    parser.add_argument("--engine", default="encoder", help="encoder, or echo (no model)")
    parser.add_argument("--clients", type=int, default=48, help="clients of the closed loop")
    parser.add_argument("--serve", type=shlex.split, default=[], help="more options of `inferctl serve`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "overload.yaml"
        slo = f"slo: {{p99_ms: {options.slo:g}}}\n" if options.slo else ""
        spec.write_text(f"name: minilm\nmodel: {{source: {peers.MODEL}}}\n{slo}")
        command = [sys.executable, "-m", "inferctl", "serve", "--spec", spec, "--engine", options.engine]
        command += ["--port", "18521", *options.serve]
        server = peers.start("inferctl-overload", command, 18521, "/v1/embeddings", "/readyz", pausable=False)
    try:
        ready = requests(server.url, server.path, [{"input": text} for text in peers.texts(2000)])
        peaks = [run_closed(server.url, ready, options.clients, 10, warm=20)]
        pids = processes(server.process.pid)
        samples: list[dict[str, float]] = []
        with OpenLoop(
            server.url, [("single", r) for r in ready], options.times * peaks[0].rate, options.seconds
        ) as load:
            end = load.start_s + options.seconds
            while time.monotonic() < end:
                samples.append({name: memory(pid) for name, pid in pids.items()})
                time.sleep(1)
        time.sleep(2)
        peaks.append(run_closed(server.url, ready, options.clients, 10))
    finally:
        server.end()
    records = load.records
    peak = sum(p.rate for p in peaks) / len(peaks)
    goodput = sum(r.status == 200 and (r.ended or end) < end for r in records) / options.seconds
    seen, accepted_ms = statuses(records), latencies(records)
    rejected = [r for r in records if r.status == 429]
    # In the first fifth of the run, pools and caches grow.
    steady = samples[len(samples) // 5 :]
    growth = {name: 100 * (steady[-1][name] / steady[0][name] - 1) for name in pids}
    p99 = quantile(accepted_ms, 0.99)
    rows = [
        ("peak, requests/s (before, after)", f"{peaks[0].rate:.1f}, {peaks[1].rate:.1f}", ""),
        ("offered, requests/s", len(records) / options.seconds, f"x {len(records) / options.seconds / peak:.2f}"),
        ("goodput, requests/s", goodput, f"{100 * goodput / peak:.1f}% of peak"),
        (
            "accepted: p50, p99 ms",
            f"{quantile(accepted_ms, 0.5):.0f}, {p99:.0f}",
            f"{p99 / options.slo:.2f} x SLO ({options.slo:g} ms)" if options.slo else "no SLO",
        ),
        ("rejected: p99 ms", quantile([1000 * (r.ended - r.intended) for r in rejected if r.ended], 0.99), ""),
        ("responses", str(seen), f"{sum(r.retry_after for r in rejected)} of {len(rejected)} 429s have Retry-After"),
        *((f"memory of the {name}, MiB", steady[-1][name], f"{growth[name]:+.1f}%") for name in pids),
        ("largest delay of a send, ms", 1000 * load.max_lateness_s, ""),
    ]
    peers.table(("", "", ""), rows)
    document = {
        "peaks": [p.rate for p in peaks],
        "offered": len(records) / options.seconds,
        "goodput": goodput,
        "goodput_of_peak": goodput / peak,
        "accepted_p50_ms": quantile(accepted_ms, 0.5),
        "accepted_p99_ms": p99,
        "slo_ms": options.slo or None,
        "p99_of_slo": p99 / options.slo if options.slo else None,
        "statuses": seen,
        "retry_after": sum(r.retry_after for r in rejected),
        "memory_mib": samples,
        "memory_growth_percent": growth,
        "generator_late_s": load.max_lateness_s,
    }
    peers.write(options.json, document)


if __name__ == "__main__":
    main()
