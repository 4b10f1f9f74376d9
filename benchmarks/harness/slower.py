"""Does `inferctl compare` find a slow-down of 10 %? And what does it say when it cannot?

    python benchmarks/harness/slower.py [--share 0.1] [--trials 5] [--repeats 5] [--seconds 2.2] [--most 40] [--json FILE]

One server with the real model in bf16 behind two proxies (holding.py): the old one passes on, the new one holds every answer back for 10 % of
the time the server took for it. One user in a closed loop, so that nothing queues and a request takes 1.10 times as long; the proxies count
what they held, and the share that it really was is printed. First `--trials` comparisons with few repeats, then, where they ask for more, one
with as many as they ask for. About six minutes. Ends with 1 when a trial says "no regression", or when the last one does not find it.
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


def held(announce: Path) -> dict[str, float]:
    """What a proxy that has ended counted, and the share by which it made the server slower."""
    said = json.loads(announce.with_suffix(".held").read_text())
    return {**said, "share": round(said["held_s"] / said["server_s"], 5)}


def holding(url: str, share: float, announce: Path) -> list[str]:
    script = Path(__file__).with_name("holding.py")
    return [sys.executable, str(script), "--to", url, "--share", str(share), "--announce", str(announce)]


def trials(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The comparisons: few repeats first, then as many as these ask for (up to --most)."""
    announces = [folder / f"{name}.json" for name in ("server", "old", "new")]
    kept = []
    with (
        turns.started(turns.serving(announces[0]), announces[0]) as url,
        turns.started(holding(url, 0.0, announces[1]), announces[1]) as old,
        turns.started(holding(url, options.share, announces[2]), announces[2]) as new,
    ):
        turns.measure(turns.plan(folder, 1, options.seconds, 1), old, new, folder)
        few = turns.plan(folder, 1, options.seconds, options.repeats)
        for number in range(options.trials):
            kept.append(turns.short(turns.measure(few, old, new, folder)))
            print(turns.line(number + 1, kept[-1]), flush=True)
        asked = [one["repeats_needed"] or options.most for one in kept if one["outcome"] == "not enough evidence"]
        if asked:
            repeats = min(round(statistics.median(asked)), options.most)
            print(f"again, with {repeats} repeats:", flush=True)
            kept.append(turns.short(turns.measure(turns.plan(folder, 1, options.seconds, repeats), old, new, folder)))
            print(turns.line(len(kept), kept[-1]), flush=True)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.2)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = trials(options, folder)
        slowed, passed = held(folder / "new.json"), held(folder / "old.json")
    print(f"held back: {100 * slowed['share']:.2f} % of the server's time (the old one: {100 * passed['share']:.2f} %)")
    found = turns.counts(kept)
    print(f"{len(kept)} comparisons with a server {100 * options.share:g} % slower: {found}")
    asked = {"share": options.share, "repeats": options.repeats, "seconds": options.seconds, "users": 1}
    took = round(time.monotonic() - began, 1)
    proxies = {"old": passed, "new": slowed}
    turns.write(
        options.json, {"asked": asked, "outcomes": found, "took_s": took, "proxies": proxies, "comparisons": kept}
    )
    missed = {"no regression", "improvement", "invalid"} & set(found)
    return 1 if missed or kept[-1]["outcome"] != "regression" else 0


if __name__ == "__main__":
    sys.exit(main())
