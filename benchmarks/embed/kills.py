"""Kill `inferctl embed` at random moments, and compare its bytes with those of an undisturbed run.

    python benchmarks/embed/kills.py MODEL [--kills 20] [--rows 40000] [--ranges 80] [--seed 7]

A kill is SIGKILL of the command, of its engine process or of both, in turn, at a random moment after the next range.
Ranges that were finished must not be computed again, so a kill costs at most those that were under way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

VICTIMS = ("the command", "the engine", "both")


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("part-*") if file.suffix != ".json"}


def finished(folder: Path) -> dict[str, int]:
    """Return the time of change of each file that says that a range is finished."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("part-?????.json")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for option, default in (("--kills", 20), ("--rows", 40_000), ("--ranges", 80), ("--seed", 7)):
        parser.add_argument(option, type=int, default=default)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = [f"word{number}" for number in range(2000)]
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(3, 40)))}) for _ in range(given.rows)]
        (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "inferctl", "embed", str(root / "texts.jsonl"), "--model", str(given.model)]
        command += ["--range-rows", str(-(-given.rows // given.ranges)), "--output"]
        started = time.monotonic()
        subprocess.run([*command, str(root / "whole")], check=True, capture_output=True)
        took = time.monotonic() - started
        print(f"undisturbed: {len(finished(root / 'whole'))} ranges, {took:.0f} s", flush=True)

        out, kept, starts, engine_only = root / "killed", dict[str, int](), 0, 0
        process: subprocess.Popen[bytes] | None = None
        for number in range(given.kills):
            if process is None or process.poll() is not None:
                assert process is None or process.returncode != 0, f"it ended before kill {number + 1}"
                process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                starts += 1
            before = len(finished(out))
            while len(finished(out)) == before and process.poll() is None:
                time.sleep(0.01)  # so that each start computes something
            time.sleep(draw.random() * took * (1 - before / given.ranges) / given.kills)
            victim = VICTIMS[number % 3]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            targets = {"the command": [process.pid], "the engine": children, "both": [process.pid, *children]}[victim]
            for pid in map(int, targets):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if victim == "the engine":
                engine_only += 1
            else:
                process.wait()
            now = finished(out)
            assert all(now[name] == changed for name, changed in kept.items()), "a finished range was computed again"
            kept = now
            print(f"kill {number + 1} of {victim}: {len(kept)} of {given.ranges} ranges are finished", flush=True)
        if process is not None:
            process.wait()
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        assert all(finished(out)[name] == changed for name, changed in kept.items()), "computed again"
        same = shards(out) == shards(root / "whole")
        print(f"{given.kills} kills ({engine_only} of the engine alone), {starts} starts: same bytes: {same}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
