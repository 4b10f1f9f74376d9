"""Does `inferctl compare` keep quiet when nothing changed? Comparisons of the same code with itself, as a CI job would measure them.

    python benchmarks/harness/same.py [--comparisons 20] [--repeats 5] [--seconds 1.6] [--rate 50%] [--json FILE]

Two servers with the real model in bf16, started anew for every fifth comparison (processes differ a little from start to start), measured
in turns (A B, B A, ...) with short runs. As in the plan gate, each is a closed loop and an open one at a share of the
capacity (`--rate ''` leaves the open one out). About half an hour. Ends with 1 when more than one in twenty is called a
regression.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import turns

AFRESH = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.6)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--rate", default="50%")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, kept = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = turns.plan(folder, options.users, options.seconds, options.repeats, options.rate)
        for first in range(0, options.comparisons, AFRESH):
            with contextlib.ExitStack() as stack:
                old, new = (
                    stack.enter_context(turns.started(turns.serving(announce), announce))
                    for announce in (folder / "old.json", folder / "new.json")
                )
                turns.measure(turns.plan(folder, options.users, options.seconds, 1, options.rate), old, new, folder)
                for number in range(first, min(first + AFRESH, options.comparisons)):
                    kept.append(turns.short(turns.measure(work, old, new, folder)))
                    print(turns.line(number + 1, kept[-1]), flush=True)
    found = turns.counts(kept)
    allowed = max(1, options.comparisons // 20)
    print(f"{len(kept)} comparisons of the same with itself: {found}; false regressions allowed: {allowed}")
    asked = {
        "comparisons": options.comparisons,
        "repeats": options.repeats,
        "seconds": options.seconds,
        "users": options.users,
        "rate": options.rate,
    }
    took = round(time.monotonic() - began, 1)
    turns.write(options.json, {"asked": asked, "outcomes": found, "took_s": took, "comparisons": kept})
    return 1 if found.get("regression", 0) > allowed else 0


if __name__ == "__main__":
    sys.exit(main())
