"""Run load workers on this machine for a benchmark on another machine.

    python -m inferctl.bench.load.worker HOST [--port 5557] [--processes N]

It needs inferctl with the extra `bench` in the same version, and must reach HOST at that port (TCP) and the measured
server. It receives the requests from HOST and sends the records back. It leaves no files here unless it is killed.

It serves one run after another, also after an interrupted run. It ends with Ctrl-C, or after 5 minutes without a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from inferctl.bench.load import locust

# Locust's exit code if it found no master for five minutes.
NO_MASTER = 255
INTERRUPTED = 130
_POLL_S = 1.0
_STOP_S = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", help="set the machine that runs the benchmark")
    parser.add_argument(
        "--port",
        type=int,
        default=5557,
        help="set the port of the master, load.master_port of the plan (default: 5557)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="set the number of workers on this machine, at most one per core (default: 1)",
    )
    options = parser.parse_args()
    try:
        return serve(locust.worker_command(options.host, options.port), options.processes)
    except KeyboardInterrupt:
        return INTERRUPTED


def serve(command: Sequence[str], processes: int) -> int:
    """Run `command` in `processes` processes at a time, and start each one again after it ends without an error.

    Each run of a benchmark has its own master, which stops its workers at the end. Returns the exit code: 0 if there
    are no more runs, that of the first failed process, or `NO_MASTER` if there was no run.
    """
    environment = locust.clean_environment()
    started: list[subprocess.Popen[bytes] | None] = [None] * processes
    served = False
    try:
        while True:
            for number, process in enumerate(started):
                if process is None:
                    started[number] = subprocess.Popen(command, env=environment)
                elif (code := process.poll()) is not None:
                    if code:
                        return 0 if served and code == NO_MASTER else code
                    # It starts in the next iteration: a master that is about to end must not accept it as a worker.
                    served, started[number] = True, None
            time.sleep(_POLL_S)
    finally:
        running = [process for process in started if process]
        for process in running:
            process.terminate()  # Locust then quits and removes its files on this machine
        for process in running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main())
