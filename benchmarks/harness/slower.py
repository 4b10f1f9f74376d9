"""Check that `inferctl compare` finds a slow-down of 10%, and what it reports if it does not have enough repeats.

    python benchmarks/harness/slower.py [--share 0.1] [--trials 5] [--repeats 5] [--seconds 2.2] [--most 40]
                                        [--json FILE]

One server with the real model in bf16 is behind two proxies (holding.py). The old one only forwards. The new one delays
each response by 10% of the server's time for it. There is one user in a closed loop, so no request queues and each
takes 1.10 times as long. The proxies count their delays, and the actual share is printed. `--trials` comparisons with
few repeats come first. If they ask for more repeats, one comparison with that number follows. It takes about 6 minutes.
The exit code is 1 if a trial reports "no regression", or if the last comparison does not find the regression.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import turns


def read_delays(announce: Path) -> dict[str, float]:
    """Return the counts of a proxy that has ended, and the share by which it slowed the server."""
    delays = json.loads(announce.with_suffix(".held").read_text())
    return {**delays, "share": round(delays["held_s"] / delays["server_s"], 5)}


def proxy_command(url: str, share: float, announce: Path) -> list[str]:
    script = Path(__file__).with_name("holding.py")
    return [sys.executable, str(script), "--to", url, "--share", str(share), "--announce", str(announce)]


def run_trials(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the verdicts: first with few repeats, then with as many as those ask for (at most `--most`)."""
    announces = [folder / f"{name}.json" for name in ("server", "old", "new")]
    verdicts = []
    with (
        turns.run_server(turns.server_command(announces[0]), announces[0]) as url,
        turns.run_server(proxy_command(url, 0.0, announces[1]), announces[1]) as old,
        turns.run_server(proxy_command(url, options.share, announces[2]), announces[2]) as new,
    ):
        turns.measure(turns.write_plan(folder, 1, options.seconds, 1), old, new, folder)
        few = turns.write_plan(folder, 1, options.seconds, options.repeats)
        for number in range(options.trials):
            verdicts.append(turns.summarize(turns.measure(few, old, new, folder)))
            print(turns.describe(number + 1, verdicts[-1]), flush=True)
        needed = [
            each["repeats_needed"] or options.most for each in verdicts if each["outcome"] == "not enough evidence"
        ]
        if needed:
            repeats = min(round(statistics.median(needed)), options.most)
            print(f"with {repeats} repeats:", flush=True)
            verdicts.append(
                turns.summarize(turns.measure(turns.write_plan(folder, 1, options.seconds, repeats), old, new, folder))
            )
            print(turns.describe(len(verdicts), verdicts[-1]), flush=True)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.2)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        verdicts = run_trials(options, folder)
        slowed, passed = read_delays(folder / "new.json"), read_delays(folder / "old.json")
    print(f"delay: {100 * slowed['share']:.2f}% of the server's time (old: {100 * passed['share']:.2f}%)")
    outcomes = turns.count_outcomes(verdicts)
    print(f"{len(verdicts)} comparisons with a server {100 * options.share:g}% slower: {outcomes}")
    settings = {"share": options.share, "repeats": options.repeats, "seconds": options.seconds, "users": 1}
    elapsed_s = round(time.monotonic() - start, 1)
    proxies = {"old": passed, "new": slowed}
    turns.write(
        options.json,
        {"asked": settings, "outcomes": outcomes, "took_s": elapsed_s, "proxies": proxies, "comparisons": verdicts},
    )
    missed = {"no regression", "improvement", "invalid"} & set(outcomes)
    return 1 if missed or verdicts[-1]["outcome"] != "regression" else 0


if __name__ == "__main__":
    sys.exit(main())
