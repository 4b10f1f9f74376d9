"""Check that `inferctl compare` reports no regression when it compares the same code with itself.

    python benchmarks/harness/same.py [--comparisons 20] [--repeats 5] [--seconds 1.6] [--rate 50%] [--json FILE]

Two servers run the real model in bf16. They restart for every fifth comparison, because processes differ slightly from
start to start. They are measured in alternating order (A B, B A, ...) with short runs. As in the plan `gate`, each run
has a closed loop and an open loop at a share of the capacity (`--rate ''` removes the open one). It takes about half an
hour. The exit code is 1 if more than 1 in 20 comparisons reports a regression.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import turns

RESTART_EVERY = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.6)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--rate", default="50%")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = turns.write_plan(folder, options.users, options.seconds, options.repeats, options.rate)
        for first in range(0, options.comparisons, RESTART_EVERY):
            with contextlib.ExitStack() as stack:
                old, new = (
                    stack.enter_context(turns.run_server(turns.server_command(announce), announce))
                    for announce in (folder / "old.json", folder / "new.json")
                )
                turns.measure(
                    turns.write_plan(folder, options.users, options.seconds, 1, options.rate), old, new, folder
                )
                for number in range(first, min(first + RESTART_EVERY, options.comparisons)):
                    verdicts.append(turns.summarize(turns.measure(work, old, new, folder)))
                    print(turns.describe(number + 1, verdicts[-1]), flush=True)
    outcomes = turns.count_outcomes(verdicts)
    allowed = max(1, options.comparisons // 20)
    print(f"{len(verdicts)} comparisons of the same with itself: {outcomes}; false regressions allowed: {allowed}")
    settings = {
        "comparisons": options.comparisons,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "users": options.users,
        "rate": options.rate,
    }
    elapsed_s = round(time.monotonic() - start, 1)
    turns.write(options.json, {"asked": settings, "outcomes": outcomes, "took_s": elapsed_s, "comparisons": verdicts})
    return 1 if outcomes.get("regression", 0) > allowed else 0


if __name__ == "__main__":
    sys.exit(main())
