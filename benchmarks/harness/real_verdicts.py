"""Check the verdicts of `inferctl compare` on real servers: of the same with itself, and of one that is slower.

    python benchmarks/harness/real_verdicts.py [--comparisons 20] [--rate 50%]                       about half an hour
    python benchmarks/harness/real_verdicts.py --share 0.1 --comparisons 5 --users 1 --seconds 2.2   about 6 minutes

Two servers run the real model in bf16. They restart for every fifth comparison, because processes differ slightly from
start to start. They are measured in alternating order (A B, B A, ...) with short runs. As in the plan `gate`, each run
has a closed loop and, with `--rate`, an open loop at a share of the capacity. Without a share, the exit code is 1 if
more than 1 in 20 comparisons reports a regression.

With `--share`, both are one server behind two proxies (holding.py). The old one only forwards. The new one delays each
response by that share of the server's time for it, and counts its delays. With one user no request queues, so each
takes 1.10 times as long. If comparisons ask for more repeats, one more with that number follows. The exit code is 1 if
one of them reports "no regression", or if the last one does not find the regression.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inferctl.bench.judge import comparable, compare

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"
RESTART_EVERY = 5
MOST_REPEATS = 40
KEPT = "name", "outcome", "change", "interval", "worse_at_most", "spread", "repeats_needed", "old_runs", "new_runs"
MARKS = {"regression": "!", "not enough evidence": "?"}


@contextlib.contextmanager
def running(announce: Path, *command: str) -> Iterator[str]:
    """Start a server, wait until it writes {"url": ...} to `announce`, yield the URL, and end the server."""
    announce.unlink(missing_ok=True)
    with announce.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command, "--announce", str(announce)], stdout=log, stderr=log)
        try:
            while not announce.is_file():
                if process.poll() is not None:
                    sys.exit(f"{' '.join(command)} ended: {announce.with_suffix('.log').read_text()}")
                time.sleep(0.1)
            yield str(json.loads(announce.read_text())["url"])
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def two_servers(folder: Path, share: float) -> Iterator[tuple[str, str]]:
    """Yield the URLs of the old and the new one."""
    serve = "-m", "inferctl", "serve", "--model", str(MODEL), "--precision", "bf16", "--port", "0"
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(running(folder / "server.json", *serve))
        if share:
            proxy, server = str(Path(__file__).with_name("holding.py")), old
            old, new = (
                stack.enter_context(running(folder / f"{name}.json", proxy, "--to", server, "--share", str(each)))
                for name, each in (("old", 0.0), ("new", share))
            )
        else:
            new = stack.enter_context(running(folder / "other.json", *serve))
        yield old, new


def measure(options: argparse.Namespace, folder: Path, urls: tuple[str, str], repeats: int) -> dict[str, Any]:
    """Measure both servers in alternating order, compare their receipts, print and return the verdict."""
    load = {"mode": "closed", "users": options.users, "duration_s": options.seconds, "warmup_s": 0}
    if options.rate:
        load |= {"mode": "open", "rate": options.rate, "capacity_s": options.seconds}
    bare = {"configurations": [{"name": "bf16", "precision": "bf16"}], "corpus": "short", "quality": None}
    plan = folder / "plan.yaml"
    plan.write_text(yaml.safe_dump({"name": "turns", "load": load, "repeats": repeats, **bare}), encoding="utf-8")
    command = [sys.executable, "-m", "inferctl", "bench", "--plan", str(plan), "--output", str(folder), "--json"]
    named = (f"--url={name}={url}" for name, url in zip(("old", "new"), urls, strict=True))
    done = subprocess.run([*command, *named], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):
        sys.exit(done.stderr[-2000:])
    receipts = Path(json.loads(done.stdout)["output"]) / "receipts"
    pairs, notes = comparable.pairs(receipts / "old.json", receipts / "new.json")
    verdict = compare.compare(pairs, notes, compare.CompareOptions()).as_dict()
    (part,) = verdict["configurations"]
    compared = [metric for metric in part["metrics"] if metric["outcome"] != "not compared"]
    changes = [
        f"{metric['name']} {100 * metric['change']:+.1f}%{MARKS.get(metric['outcome'], '')}"
        for metric in compared
        if metric["change"] is not None
    ]
    needed = f" ({verdict['repeats_needed']} repeats needed)" if verdict["repeats_needed"] else ""
    if repeats > 1:  # else it is a warm-up
        print(f"{verdict['outcome']}{needed}: {', '.join(changes) or '; '.join(part['reasons'])}", flush=True)
    return {
        **{key: verdict[key] for key in ("outcome", "exit_code", "repeats_needed")},
        "repeats": part["old"]["repeats"],
        "interleaved": part["interleaved"],
        "reasons": part["reasons"],
        "metrics": [{key: metric.get(key) for key in KEPT} for metric in compared],
    }


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return the verdicts: with few repeats, then of slower servers with as many as those ask for."""
    verdicts: list[dict[str, Any]] = []
    while len(verdicts) < options.comparisons:
        with two_servers(folder, options.share) as urls:
            measure(options, folder, urls, 1)
            rest = range(min(RESTART_EVERY, options.comparisons - len(verdicts)))
            verdicts += [measure(options, folder, urls, options.repeats) for _ in rest]
            unsure = [each["repeats_needed"] for each in verdicts if each["outcome"] == "not enough evidence"]
            if options.share and unsure and len(verdicts) == options.comparisons:
                repeats = round(statistics.median(each or MOST_REPEATS for each in unsure))
                print(f"with {min(repeats, MOST_REPEATS)} repeats:", flush=True)
                verdicts.append(measure(options, folder, urls, min(repeats, MOST_REPEATS)))
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--comparisons", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.6)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--rate")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        verdicts = run(options, Path(name))
        proxies = {file.stem: json.loads(file.read_text()) for file in Path(name).glob("*.held")}
    outcomes = dict(Counter(each["outcome"] for each in verdicts))
    for which, held in proxies.items():
        print(f"delay of {which}: {100 * held['held_s'] / held['server_s']:.2f}% of the server's time")
    print(f"{len(verdicts)} comparisons with a server {100 * options.share:g}% slower: {outcomes}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        took = round(time.monotonic() - start, 1)
        document = {"asked": settings, "outcomes": outcomes, "took_s": took, "proxies": proxies}
        options.json.write_text(json.dumps(document | {"comparisons": verdicts}, indent=1) + "\n", encoding="utf-8")
    if not options.share:
        return int(outcomes.get("regression", 0) > max(1, options.comparisons // 20))
    missed = {"no regression", "improvement", "invalid"} & set(outcomes)
    return int(bool(missed) or verdicts[-1]["outcome"] != "regression")


if __name__ == "__main__":
    sys.exit(main())
