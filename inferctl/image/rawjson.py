"""Parses the output of `docker buildx build --progress=rawjson` into events.

The output is BuildKit's `SolveStatus` (moby/buildkit client/graph.go) as JSON objects, mixed with plain lines. buildx
0.13 indents an object over many lines; later versions write one object per line. Both forms are supported.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from inferctl.image.events import BuildEvent, StepBytes, StepFinished, StepLog, StepStarted

# BuildKit first reports the cache lookup of a step, which takes microseconds, and then the step itself.
_LOOKUP_SECONDS = 0.001
_TAIL_LINES = 60
_LOG_LINES = 25
_STATUS_KEYS = frozenset({"vertexes", "statuses", "logs", "warnings"})


@dataclass
class _Step:
    name: str = ""
    started: bool = False
    finished: bool = False
    lookup: StepFinished | None = None
    transfers: dict[str, int] = field(default_factory=dict)
    partial: str = ""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))


class Reader:
    """Converts the lines of stderr to events and keeps the last lines for error messages.

    `tail`: the last plain lines.
    """

    def __init__(self) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._steps: dict[str, _Step] = {}
        self._object: list[str] = []
        self._failed: str | None = None

    def feed(self, line: str) -> Iterator[BuildEvent]:
        """Yield the events that `line` completes. Lines must be passed in order."""
        line = line.rstrip("\r\n")
        if self._object:
            if line.startswith((" ", "\t")) or line in ("}", ""):
                self._object.append(line)
                if line == "}":
                    yield from self._close()
                return
            self._keep_as_plain_lines()
        if line.startswith("{"):
            self._object = [line]
            if line.endswith("}"):
                yield from self._close()
            return
        if line.strip():
            self.tail.append(line)

    def finish(self) -> Iterator[BuildEvent]:
        """Yield the remaining events at the end of the stream."""
        self._keep_as_plain_lines()
        for digest, step in self._steps.items():
            if step.partial:
                yield from self._log_line(digest, step, step.partial)
                step.partial = ""
            if step.lookup and not step.finished:
                step.finished = True
                yield step.lookup

    def failed_step(self) -> tuple[str, list[str]] | None:
        """Return the name and last log lines of the first failed step, None without a failure."""
        if self._failed is None:
            return None
        step = self._steps[self._failed]
        return step.name, list(step.log)

    def _close(self) -> Iterator[BuildEvent]:
        text = "\n".join(self._object)
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not value.keys() <= _STATUS_KEYS:
            self._keep_as_plain_lines()
            return
        self._object = []
        yield from self._status(value)

    def _keep_as_plain_lines(self) -> None:
        self.tail.extend(line for line in self._object if line.strip())
        self._object = []

    def _status(self, value: dict[str, Any]) -> Iterator[BuildEvent]:
        vertexes = value.get("vertexes") or []
        for vertex in vertexes:
            self._steps.setdefault(str(vertex.get("digest", "")), _Step()).name = str(vertex.get("name") or "")
        # One object may contain the last transfer and the end of a step. The end must be last.
        for log in value.get("logs") or []:
            yield from self._log(log)
        for status in value.get("statuses") or []:
            yield from self._transfer(status)
        for vertex in vertexes:
            yield from self._vertex(vertex)

    def _vertex(self, vertex: dict[str, Any]) -> Iterator[BuildEvent]:
        digest = str(vertex.get("digest", ""))
        step = self._steps[digest]
        if not vertex.get("started"):
            return
        if not step.started:
            step.started = True
            yield StepStarted(digest, step.name)
        if not vertex.get("completed") or step.finished:
            return
        seconds = max(0.0, (_time(vertex["completed"]) - _time(vertex["started"])).total_seconds())
        cached, error = bool(vertex.get("cached")), vertex.get("error") or None
        done = StepFinished(digest, step.name, seconds, cached, sum(step.transfers.values()), error)
        if seconds < _LOOKUP_SECONDS and not cached and not error:
            step.lookup = done
            return
        step.finished = True
        # If a step fails, BuildKit cancels the others. The first failure is the cause.
        if error and self._failed is None and "context canceled" not in error:
            self._failed = digest
        yield done

    def _transfer(self, status: dict[str, Any]) -> Iterator[BuildEvent]:
        digest, item = str(status.get("vertex", "")), str(status.get("id", ""))
        current, total = int(status.get("current") or 0), int(status.get("total") or 0)
        if not current or item.startswith("extracting"):
            return
        step = self._steps.setdefault(digest, _Step())
        if step.transfers.get(item, 0) < current:
            step.transfers[item] = current
            yield StepBytes(digest, item, current, total)

    def _log(self, log: dict[str, Any]) -> Iterator[BuildEvent]:
        digest = str(log.get("vertex", ""))
        step = self._steps.setdefault(digest, _Step())
        try:
            text = base64.b64decode(log.get("data") or "").decode("utf-8", "replace")
        except (binascii.Error, ValueError):
            return
        *lines, step.partial = (step.partial + text).split("\n")
        for line in lines:
            yield from self._log_line(digest, step, line)

    @staticmethod
    def _log_line(digest: str, step: _Step, line: str) -> Iterator[BuildEvent]:
        # A progress bar overwrites its line with carriage returns. Only the last state is logged.
        text = line.rstrip("\r").rsplit("\r", 1)[-1].rstrip()
        if text:
            step.log.append(text)
            yield StepLog(digest, step.name, text)


def _time(text: str) -> datetime:
    # Go writes nanoseconds, but Python parses at most microseconds.
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text).replace("Z", "+00:00"))
