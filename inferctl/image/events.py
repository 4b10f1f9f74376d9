"""Events of a build, a verification and a push, as small records. `cli/build_view.py` displays them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase starts: `build`, `verify`, `tag`, `push` or `pull`."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A step of the Dockerfile starts. `id` is the digest of the step, `name` such as `[torch 2/3] RUN ...`."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step ended. `bytes`: transferred or downloaded, 0 for neither. `error` is None on success."""

    id: str
    name: str
    seconds: float
    cached: bool
    bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepLog:
    """A line of output of a step."""

    id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Progress of a transfer in a step. `total` is 0 if unknown."""

    id: str
    item: str
    current: int
    total: int


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt failed with a transient error. The next one starts after `delay` seconds."""

    attempt: int
    attempts: int
    delay: float
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Information for the user that is not a failure."""

    text: str


BuildEvent = StepStarted | StepFinished | StepLog | StepBytes
Event = Phase | BuildEvent | Retry | Note
