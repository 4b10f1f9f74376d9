"""What `inferctl gateway` does with a server that is killed, and while all are restarted.

    python benchmarks/peers/balancing.py [--rounds 2] [--kills 5] [--json FILE] [PART ...]

The parts are `killed` and `restart`; default: both. Latency counts from the intended time of a request.

killed, restart: three servers of inferctl with the echo engine, an open loop of `--rate` requests/s. One in a hundred
takes half a second, so that nearly all servers have requests in flight. `killed`: SIGKILL of one server after the
other, which then starts again. Ejected: from the signal until Envoy does not count it as healthy, which must be within
2 s; also until the last attempt to connect to it. `restart`: SIGTERM of one server after the other, which drains,
ends, and starts again. In both, no client may get another response than 200.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import load
import peers
import recorder

sys.path.insert(0, str(peers.ROOT))

from inferctl.gateway import admin
from inferctl.serve.engines.echo import SLOW_TOKEN

PORT, SERVERS = 18571, 3
MAX_EJECTED_S = 2.0
_WATCHED_S = 8.0  # after a kill: Envoy could try an ejected server again after 5 s
PARTS = ("killed", "restart")


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{url} does not respond")


class Gateway:
    """A running gateway. Its files are in a folder of its own."""

    def __init__(self, urls: list[str], *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="balancing-", ignore_cleanup_errors=True)
        folder = Path(self._folder.name)
        file = folder / "ready.json"
        command = [sys.executable, "-m", "inferctl", "gateway", "--port", "0"]
        command += [part for url in urls for part in ("--server", url)]
        environment = {**peers.environment(), "PYTHONPATH": str(peers.ROOT), "TMPDIR": str(folder)}
        self._process = subprocess.Popen([*command, "--announce", str(file), *options], env=environment)
        peers.wait_until(lambda: file.exists() or self._process.poll() is not None)
        self.url: str = json.loads(file.read_text())["url"]
        (self._admin,) = folder.glob("inferctl-gateway-*/admin")

    def stat(self, name: str) -> int:
        """Return one of Envoy's statistics of the servers."""
        return admin.stat(self._admin, f"cluster.servers.{name}")

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._folder.cleanup()


def start_server(number: int) -> peers.Server:
    return peers.inferctl(PORT + number, "--engine", "echo", "--name", "echo", name=f"balanced {number}")


def measure_ends(how: str, rate: float, count: int) -> dict[str, Any]:
    """End `count` servers, one after the other, by SIGKILL (`killed`) or SIGTERM (`restart`), and start them again."""
    ended: list[dict[str, float]] = []
    servers: list[peers.Server] = []
    with ExitStack() as stack:
        stack.callback(lambda: [server.end() for server in servers if server.process.poll() is None])
        servers.extend(start_server(number) for number in range(SERVERS))
        gateway = Gateway([server.url for server in servers])
        stack.callback(gateway.end)
        peers.wait_until(lambda: gateway.stat("membership_healthy") == SERVERS)
        bodies = [{"input": [SLOW_TOKEN if number == 0 else 1000 + number, 102]} for number in range(100)]
        ready = [("", each) for each in load.requests(gateway.url, servers[0].path, bodies)]
        with recorder.OpenLoop(gateway.url, ready, rate) as running:
            time.sleep(12)  # slow start
            for turn in range(count):
                number = turn % SERVERS
                ended.append(kill(gateway, servers[number]) if how == "killed" else drain(servers[number]))
                servers[number] = start_server(number)
                peers.wait_until(lambda: gateway.stat("membership_healthy") == SERVERS)
                time.sleep(2)
    return {
        "ended": ended,
        "statuses": recorder.statuses(running.records),
        "p99_ms": recorder.quantile(recorder.latencies(running.records), 0.99),
    }


def kill(gateway: Gateway, server: peers.Server) -> dict[str, float]:
    """Kill a server, and return the seconds until Envoy ejected it, and until its last attempt to connect to it."""
    attempts = gateway.stat("upstream_cx_connect_fail")
    begin = now = time.monotonic()
    server.end()
    found = {"ejected_s": float("inf"), "last_attempt_s": 0.0}
    while now < begin + _WATCHED_S:
        healthy, failed = gateway.stat("membership_healthy"), gateway.stat("upstream_cx_connect_fail")
        now = time.monotonic()
        if healthy < SERVERS:
            found["ejected_s"] = min(found["ejected_s"], now - begin)
        if failed > attempts:
            attempts, found["last_attempt_s"] = failed, now - begin
        time.sleep(0.02)
    return found


def drain(server: peers.Server) -> dict[str, float]:
    """Let a server drain and end, and return how long it took, and its exit code."""
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(60)
    return {"seconds": time.monotonic() - begin, "exit_code": code}


def main() -> int:
    parser = peers.options(__doc__ or "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: both")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rate", type=float, default=150, help="requests/s while servers end")
    options = parser.parse_args()
    parts = options.parts or PARTS
    figures: dict[str, Any] = {}
    failed = []
    for name, count in (("killed", options.kills), ("restart", options.rounds * SERVERS)):
        if name not in parts:
            continue
        figures[name] = found = measure_ends(name, options.rate, count)
        print(f"{name}, {options.rate:g} requests/s: p99 {found['p99_ms']:.0f} ms, responses {found['statuses']}")
        peers.table(("", *found["ended"][0]), [(n + 1, *each.values()) for n, each in enumerate(found["ended"])])
        print()
        if set(found["statuses"]) != {"200"}:
            failed.append(f"{name}: responses other than 200")
        if any(each.get("ejected_s", 0) > MAX_EJECTED_S for each in found["ended"]):
            failed.append(f"{name}: a server was ejected after more than {MAX_EJECTED_S:g} s")
        if any(each.get("exit_code", 0) for each in found["ended"]):
            failed.append(f"{name}: a server did not end by itself")
    print(f"NOT MET: {'; '.join(failed)}" if failed else "all bars are met")
    peers.write(options.json, {**figures, "not_met": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
