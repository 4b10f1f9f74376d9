"""Compare servers over HTTP: inferctl, infinity, and sentence-transformers behind FastAPI.

    python benchmarks/peers/servers.py [--seconds 8] [--rounds 2] [--clients 64] [--json FILE]

All serve the same model on the same machine in one run. Requests are single texts of log-normal length, mean 55 tokens.
A closed loop comes first, interleaved A B C D D C B A. Then inferctl and infinity receive the same open-loop rate: 80%
of the rate of infinity bf16. Servers that are not measured are stopped. CPU time per request is shown in addition,
because other work on the machine affects it least.
"""

from __future__ import annotations

import peers
from load import Outcome, requests, run_closed, run_open


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    bodies = [{"input": text} for text in peers.texts(2000)]
    running: list[peers.Server] = []
    try:
        for start in (
            lambda: peers.inferctl(18501, "--precision", "bf16", name="inferctl bf16"),
            lambda: peers.infinity(18502, "bfloat16"),
            lambda: peers.infinity(18503, None),
            lambda: peers.fastapi(18504),
        ):
            running.append(start())
            running[-1].pause()
        used = dict.fromkeys((server.name for server in running), 0.0)
        results: dict[str, list[Outcome]] = {server.name: [] for server in running}
        for server in peers.order(running, options.rounds):
            server.resume()
            ready = requests(server.url, server.path, bodies)
            before = server.cpu_seconds()
            results[server.name].append(run_closed(server.url, ready, options.clients, options.seconds, warm=0))
            used[server.name] += server.cpu_seconds() - before
            server.pause()
        reference, peer = running[0], running[1]
        shared_rate = 0.8 * peers.median([o.rate for o in results[peer.name]])
        at_rate: dict[str, list[Outcome]] = {reference.name: [], peer.name: []}
        for server in peers.order([reference, peer], 2):
            server.resume()
            at_rate[server.name].append(
                run_open(server.url, requests(server.url, server.path, bodies), shared_rate, 2 * options.seconds)
            )
            server.pause()
    finally:
        for server in running:
            server.end()
    reference_rate = peers.median([o.rate for o in results[reference.name]])
    figures = {}
    rows = []
    for name, outcomes in results.items():
        rate, p50, p99 = (
            peers.median(values)
            for values in (
                [o.rate for o in outcomes],
                [o.quantile(0.5) for o in outcomes],
                [o.quantile(0.99) for o in outcomes],
            )
        )
        failures = sum(o.failures for o in outcomes)
        cost = 1000 * used[name] / sum(len(o.latencies) for o in outcomes)
        cheapest = 1000 * used[reference.name] / sum(len(o.latencies) for o in results[reference.name])
        rows.append((name, rate, reference_rate / rate, cost, cost / cheapest, p50, p99, failures))
        figures[name] = {
            "rates": [o.rate for o in outcomes],
            "cpu_ms_per_request": cost,
            "p50_ms": p50,
            "p99_ms": p99,
            "failures": failures,
            "inferctl_is": reference_rate / rate,
        }
    print(f"closed loop, {options.clients} clients")
    peers.table(
        ("server", "requests/s", "inferctl is x", "CPU (ms per request)", "by CPU x", "p50 ms", "p99 ms", "failures"),
        rows,
    )
    print(f"\nopen loop, {shared_rate:.1f} requests/s")
    tails = {name: peers.median([o.quantile(0.99) for o in outcomes]) for name, outcomes in at_rate.items()}
    peers.table(
        ("server", "p50 ms", "p99 ms", "p99 relative to inferctl", "failures"),
        [
            (
                name,
                peers.median([o.quantile(0.5) for o in outcomes]),
                tails[name],
                tails[name] / tails[reference.name],
                sum(o.failures for o in outcomes),
            )
            for name, outcomes in at_rate.items()
        ],
    )
    peers.write(
        options.json, {"clients": options.clients, "closed": figures, "open": {"rate": shared_rate, "p99_ms": tails}}
    )


if __name__ == "__main__":
    main()
