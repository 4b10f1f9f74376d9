"""What a bench is about and what came of it: subjects, the measurement of each run, the outcome of each subject."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.bench.judge import summary
from inferctl.bench.measure import quality
from inferctl.bench.plan.plan import Run


@dataclass(frozen=True)
class Subject:
    """What is measured under one name: a precision (and a batch budget) to start our own server in, or the `url` of one that runs already.

    `corpus` and the keys of `load` take the place of the plan's.
    """

    name: str
    precision: str | None = None
    url: str | None = None
    max_batch_tokens: int | None = None
    corpus: str | None = None
    load: dict[str, Any] | None = None


@dataclass
class Measurement:
    """One run that gave records.

    `info` is what the server said of itself then, `serial` the number that its inputs began with, `load` and `workload` what was sent
    (the plan's load as it was for this subject; digest, corpus and seed), `pace` what the server had learnt of its speed by the end,
    `search` what a search for the highest rate found, whose best probe this then is, `beside` the same run with busy
    neighbours, `closed_loop` the closed loop before it, where the rate is a share of the capacity, `concurrency` how
    the number of users was found.
    """

    run: Run
    started: float
    part: summary.Part
    state: dict[str, Any]
    resources: dict[str, float]
    folder: Path
    info: dict[str, Any]
    serial: int
    telemetry: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    beside: dict[str, Any] | None = None
    closed_loop: dict[str, Any] | None = None
    concurrency: dict[str, Any] | None = None


@dataclass
class Outcome:
    """Everything about one subject. `failure` says why it has fewer runs than `planned`, in one line; None when it was interrupted.

    `check_done`: whether the quality check needs no other try, whatever it found; one that was cut short or had no reference does.
    """

    subject: Subject
    measurements: list[Measurement] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=lambda: quality.unchecked("no run got that far"))
    failure: str | None = None
    planned: int = 1
    check_done: bool = False

    @property
    def info(self) -> dict[str, Any]:
        """What the server said of itself at the first run; `judge` holds the others against it."""
        return self.measurements[0].info if self.measurements else {}

    @property
    def interrupted(self) -> str | None:
        """How far it got when the bench ended before its last run; None when it got there or failed."""
        done = len(self.measurements)
        return None if self.failure or done >= self.planned else f"interrupted after {done} of {self.planned} runs"

    def has(self, run: Run) -> bool:
        """Whether this run was measured already."""
        return any(one.run == run for one in self.measurements)
