"""What happens during build, verification and push, as a stream of small records; whoever reads it decides how to show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerStatus = Literal["waiting", "pushing", "pushed", "exists", "mounted"]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the work begins: `build`, `verify`, `tag`, `push` or `export`."""

    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StepStarted:
    """BuildKit began a step of the Dockerfile. `id` is the digest of the step, `name` as in `[torch 2/3] RUN ...`."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step ended. `bytes` is what it transferred or downloaded (0 when it did neither); `error` is None on success."""

    id: str
    name: str
    seconds: float
    cached: bool
    bytes: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepLog:
    """One line that a step's command wrote."""

    id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class StepBytes:
    """A transfer within a step moved on. `total` is 0 when it is not known."""

    id: str
    item: str
    current: int
    total: int


@dataclass(frozen=True, slots=True)
class PlainLine:
    """A line on the builder's stderr that is not progress: warnings, and the error at the end."""

    text: str


@dataclass(frozen=True, slots=True)
class LayerPush:
    """A layer's push moved on. `current` and `total` count uncompressed bytes, as the engine does."""

    id: str
    status: LayerStatus
    current: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Retry:
    """An attempt failed in a way that may pass; the next one comes after `delay` seconds."""

    attempt: int
    attempts: int
    delay: float
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know that is no failure."""

    text: str


BuildEvent = StepStarted | StepFinished | StepLog | StepBytes | PlainLine
PushEvent = LayerPush | Retry
Event = Phase | BuildEvent | PushEvent | Note
