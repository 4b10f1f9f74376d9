"""Run `inferctl embed` without an engine over many rows: seconds and memory of plan, run and restart.

    python benchmarks/embed/many_rows.py FOLDER [ROWS]

The computer of this script returns zeros, so the rest of the work is what remains. `FOLDER` needs 160 bytes per row.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.embed.computer import Input, Report
from inferctl.embed.job import Job
from inferctl.embed.manifest import RunOptions


class Zeros:
    """A `Computer` that computes nothing."""

    async def start(self) -> dict[str, Any]:
        return {"task": "embed", "outputs": ["dense"], "dimensions": 8, "token_dimensions": 0}

    async def compute(self, inputs: Sequence[Input], report: Report) -> None:
        report(((number, (row, 1)) for number, row in enumerate(np.zeros((len(inputs), 8), np.float32))), 0.0)

    async def close(self) -> None:
        pass


async def run(job: Job, numbers: list[int]) -> None:
    await job.start()
    await job.run(numbers)


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(float(sys.argv[2])) if len(sys.argv) > 2 else 10**7
    file = folder / "rows.jsonl"
    if not file.exists():
        with file.open("w") as stream:
            for number in range(rows):
                stream.write(
                    f'{{"id": {number}, "text": "the text of row {number} has some words and then its end"}}\n'
                )
    options = RunOptions([str(file)], folder / "out", model={"task": "embed", "outputs": ["dense"]})
    for step in ("plan", "half", "rest", "none"):
        started = time.monotonic()
        job = Job(options, Zeros())
        job.plan()
        missing = job.missing()
        planned = time.monotonic()
        if step in ("half", "rest"):
            asyncio.run(run(job, missing[: len(missing) // 2] if step == "half" else missing))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = f"{planned - started:.2f} s to start, {time.monotonic() - planned:.2f} s to run"
        print(f"{step}: {len(missing)} ranges missing, {seconds}, at most {peak:.0f} MB", flush=True)
    receipt = job.finish()
    assert receipt is not None
    size = (folder / "out" / "manifest.json").stat().st_size
    print(json.dumps({"rows": receipt["rows"], "manifest_bytes": size, "rows_per_s": receipt["rows_per_s"]}))


if __name__ == "__main__":
    main()
