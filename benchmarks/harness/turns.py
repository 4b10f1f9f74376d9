"""Functions of same.py and slower.py: measure two servers in alternating order and compare their receipts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from inferctl.bench.judge import comparable, compare

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "all-MiniLM-L6-v2"


@contextlib.contextmanager
def run_server(command: list[str], announce: Path) -> Iterator[str]:
    """Start a server, wait until it writes {"url": ...} to `announce`, yield the URL, and end the server."""
    announce.unlink(missing_ok=True)
    with announce.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not announce.is_file():
                if process.poll() is not None:
                    sys.exit(f"{' '.join(command)} ended: {announce.with_suffix('.log').read_text()}")
                time.sleep(0.1)
            yield str(json.loads(announce.read_text())["url"])
        finally:
            process.terminate()
            process.wait()


def server_command(announce: Path) -> list[str]:
    """Return the command that serves the real model in bf16."""
    options = ["--precision", "bf16", "--port", "0", "--announce", str(announce)]
    return [sys.executable, "-m", "inferctl", "serve", "--model", str(MODEL), *options]


def write_plan(folder: Path, users: int, seconds: float, repeats: int, share: str | None = None) -> Path:
    """Write a plan of short runs: a closed loop and, with a `share` as in the plan `gate`, an open loop after it."""
    file = folder / f"turns-{repeats}.yaml"
    load: dict[str, Any] = {"mode": "closed", "users": users, "duration_s": seconds, "warmup_s": 0}
    if share:
        load |= {"mode": "open", "rate": share, "capacity_s": seconds}
    bare = {"configurations": [{"name": "bf16", "precision": "bf16"}], "corpus": "short", "quality": None}
    file.write_text(yaml.safe_dump({"name": "turns", "load": load, "repeats": repeats, **bare}), encoding="utf-8")
    return file


def measure(work: Path, old: str, new: str, folder: Path) -> dict[str, Any]:
    """Measure both servers in alternating order (A B, B A, ...) with the plan file `work`, and compare the receipts."""
    command = [sys.executable, "-m", "inferctl", "bench", "--plan", str(work), "--output", str(folder)]
    done = subprocess.run(
        [*command, "--url", f"old={old}", "--url", f"new={new}", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 5):
        sys.exit(done.stderr[-2000:])
    receipts = Path(json.loads(done.stdout)["output"]) / "receipts"
    pairs, notes = comparable.pairs(receipts / "old.json", receipts / "new.json")
    return compare.compare(pairs, notes, compare.CompareOptions()).as_dict()


def summarize(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a verdict that the results file keeps."""
    (part,) = verdict["configurations"]
    keys = (
        "name",
        "outcome",
        "change",
        "interval",
        "worse_at_most",
        "spread",
        "repeats_needed",
        "old_runs",
        "new_runs",
    )
    metrics = [
        {key: metric.get(key) for key in keys} for metric in part["metrics"] if metric["outcome"] != "not compared"
    ]
    return {
        "outcome": verdict["outcome"],
        "exit_code": verdict["exit_code"],
        "repeats": part["old"]["repeats"],
        "repeats_needed": verdict["repeats_needed"],
        "interleaved": part["interleaved"],
        "reasons": part["reasons"],
        "metrics": metrics,
    }


def describe(number: int, kept: dict[str, Any]) -> str:
    """Return one line: the change of each figure, with `!` for a regression and `?` if inconclusive."""
    marks = {"regression": "!", "not enough evidence": "?"}
    changes = [
        f"{metric['name']} {100 * metric['change']:+.1f}%{marks.get(metric['outcome'], '')}"
        for metric in kept["metrics"]
        if metric["change"] is not None
    ]
    needed = f" ({kept['repeats_needed']} repeats needed)" if kept["repeats_needed"] else ""
    return f"{number:>3}  {kept['outcome']}{needed}: {', '.join(changes) or '; '.join(kept['reasons'])}"


def count_outcomes(all_kept: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of comparisons by outcome."""
    return dict(Counter(kept["outcome"] for kept in all_kept))


def write(file: Path | None, document: dict[str, Any]) -> None:
    """Write the figures as JSON if `file` is given."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
