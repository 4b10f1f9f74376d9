"""A load worker on this machine for a bench that runs on another: `python -m inferctl.bench.load.worker HOST [--port 5557] [--processes N]`.

It needs inferctl with the extra `bench` in the same version, a way to HOST at that port (TCP), and a way to the measured server. What is
sent comes from HOST and the records go back there; nothing is left here unless it is killed. It serves one run after another, cut short or not, and
ends when no run has wanted it for five minutes, or with Ctrl-C.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from inferctl.bench.load import locust

# How Locust ends when it found no master for five minutes.
NO_MASTER = 255
INTERRUPTED = 130
_LOOK_S = 1.0
_LEAVE_S = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", help="where the bench runs")
    parser.add_argument("--port", type=int, default=5557, help="its load.master_port")
    parser.add_argument("--processes", type=int, default=1, help="workers to start here: one a core")
    options = parser.parse_args()
    try:
        return serve(locust.worker_command(options.host, options.port), options.processes)
    except KeyboardInterrupt:
        return INTERRUPTED


def serve(command: Sequence[str], processes: int) -> int:
    """Run `command` so many times at once, each again after it ended well: a run of the bench has a master of its own, and takes its workers
    with it. Returns the exit code: 0 when there are no more runs, that of the first process that failed, and `NO_MASTER` without any run."""
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
                    # Started the next time round: the master that is just ending must not take it for one of its own.
                    served, started[number] = True, None
            time.sleep(_LOOK_S)
    finally:
        running = [process for process in started if process]
        for process in running:
            process.terminate()  # Locust then leaves in order, and what it had written here goes
        for process in running:
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main())
