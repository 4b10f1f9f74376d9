"""Compare uvicorn with granian, each with the same bare Starlette application.

    python benchmarks/peers/http_servers.py [--seconds 6] [--rounds 4] [--json FILE]

64 clients in a closed loop receive bodies of 8 KB, the size of an embedding of 384 numbers. Both servers run on uvloop
with one worker.
"""

from __future__ import annotations

import json
import tempfile

import peers
from load import requests, run_closed


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=4, seconds=6)
    options = parser.parse_args()
    bodies = [{"input": text} for text in peers.texts(500)]
    running: list[peers.Server] = []
    rates: dict[str, list[float]] = {}
    cpu: dict[str, float] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"data": [0.0123456789] * 640}, file)
        file.flush()
        try:
            for port, name in ((18531, "uvicorn"), (18532, "granian")):
                command = [peers.python("http-servers"), peers.HERE / "bare_app.py", str(port), file.name, name]
                running.append(peers.start(name, command, port, "/v1/embeddings", "/health"))
                rates[name], cpu[name] = [], 0.0
            for server in peers.order(running, options.rounds):
                before = server.cpu_seconds()
                outcome = run_closed(server.url, requests(server.url, server.path, bodies), 64, options.seconds, warm=1)
                assert not outcome.failures, f"{server.name} rejected requests: {outcome.statuses}"
                rates[server.name].append(outcome.rate)
                cpu[server.name] += server.cpu_seconds() - before
        finally:
            for server in running:
                server.end()
    rows = [(name, peers.median(r), 1e6 * cpu[name] / (sum(r) * (options.seconds + 1))) for name, r in rates.items()]
    peers.table(("server", "requests/s", "CPU (us per request)"), rows)
    peers.write(options.json, {"rates": rates, "cpu_seconds": cpu})


if __name__ == "__main__":
    main()
