"""A load worker on this machine for a bench that runs on another: `python -m inferctl.bench.worker HOST [--port 5557] [--processes N]`.

It needs inferctl with the extra `bench` in the same version, a way to HOST at that port (TCP), and a way to the measured server. What is
sent comes from HOST and the records go back there; nothing is left here. It ends with the bench.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from inferctl.bench import locust


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", help="where the bench runs")
    parser.add_argument("--port", type=int, default=5557, help="its load.master_port")
    parser.add_argument("--processes", type=int, default=1, help="workers to start here: one a core")
    options = parser.parse_args()
    environment = locust.clean_environment()
    started = [
        subprocess.Popen(locust.worker_command(options.host, options.port), env=environment)
        for _ in range(options.processes)
    ]
    try:
        return max(process.wait() for process in started)
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
