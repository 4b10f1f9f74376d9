"""The usage events of metering: one per request or per sum of requests, and one at the end of each server process.

To others, each is a CloudEvent. `source` names the server process (instance and boot), `id` is a number that counts
from 1, and together they never repeat. So a repeated event is recognized, and a lost one leaves a gap. An event never
contains texts or API keys.

The outbox has them as rows, without what they have in common: that takes a fifth of the time and of the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from inferctl.config.spec_types import Task

REQUEST = "inferctl.request.v1"
# The last event of a server process. `data.clean`: False if the process was killed, then written after its death.
END = "inferctl.end.v1"
BATCH_MEDIA_TYPE = "application/cloudevents-batch+json"
# `subject` of the events of requests without an API key.
ANONYMOUS = "anonymous"
# What a row of the outbox has of a request, after its number and time. A row of a sum also has how many it stands for;
# without it, an older version reads the others.
_ROW = [
    "key_id",
    "endpoint",
    "inputs",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "engine_ms",
    "duration_ms",
    "status",
    "code",
    "request_id",
]
_WIDTH = len(_ROW)
# `data` of the event of a request: its row and its `Origin`. The columns of the ledger have the same names.
_COMMON = ["model", "model_sha256", "task", "hardware"]
FIELDS = [*_ROW, "requests", "team", *_COMMON]
_TEXTS = {"key_id", "endpoint", "code", "request_id", "team", *_COMMON}
_SECONDS = {"engine_ms", "duration_ms"}
_MAX_TIME_MS = 253_402_300_800_000  # the year 10000


class RequestUsage(Protocol):
    """What metering reads of a finished request. `UsageEvent` of the server's edge has these attributes."""

    @property
    def request_id(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def status(self) -> int: ...
    @property
    def code(self) -> str | None: ...
    @property
    def key_id(self) -> str | None: ...
    @property
    def team(self) -> str | None: ...
    @property
    def inputs(self) -> int: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def engine_seconds(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class Item(NamedTuple):
    """What is recorded as one event. `at`: the end of the request, in seconds since 1970.

    `requests`: how many it stands for; `usage`: of the last one. `caller`: in place of the key id of `usage`.
    """

    number: int
    at: float
    usage: RequestUsage
    requests: int = 1
    caller: str | None = None


@dataclass(frozen=True)
class Origin:
    """What all requests of a server process have in common. `hardware` and `model_sha256`: None before it is ready."""

    model: str
    task: Task
    model_sha256: str | None = None
    hardware: str | None = None


class Event(NamedTuple):
    """One event. `time_ms`: since 1970. `data`: the `FIELDS` of a request, or `clean` of an end."""

    id: int
    time_ms: int
    type: str
    data: dict[str, Any]

    def as_cloud_event(self, source: str) -> dict[str, Any]:
        """Return the event in the JSON format of CloudEvents."""
        return {
            "specversion": "1.0",
            "type": self.type,
            "source": source,
            "id": str(self.id),
            "time": datetime.fromtimestamp(self.time_ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            **({"subject": self.data["key_id"] or ANONYMOUS} if self.type == REQUEST else {}),
            "datacontenttype": "application/json",
            "data": self.data,
        }


def is_free(usage: RequestUsage) -> bool:
    """Return whether nothing was computed for a request, and no cache had its tokens, as for most rejected ones."""
    return not (usage.input_tokens or usage.output_tokens or usage.engine_seconds)


def requests(origin: Origin, items: Sequence[Item]) -> dict[str, Any]:
    """Return the content of a batch in the outbox. Inputs count only if something was computed for their request."""
    rows = [
        (
            number,
            int(1000 * at),
            caller or usage.key_id,
            usage.endpoint,
            0 if is_free(usage) else usage.inputs,
            usage.input_tokens,
            usage.cached_tokens,
            usage.output_tokens,
            int(1e6 * usage.engine_seconds) / 1000,
            int(1e6 * usage.seconds) / 1000,
            usage.status,
            usage.code,
            usage.request_id,
            *((count,) if count > 1 else ()),
        )
        for number, at, usage, count, caller in items
    ]
    # By key, in a field that an older relay does not read.
    teams = {item.usage.key_id: item.usage.team for item in items if item.usage.team}
    return {"common": asdict(origin), "requests": rows} | ({"teams": teams} if teams else {})


def end(number: int, time_ms: int, *, clean: bool) -> bytes:
    """Return the content of the batch with the last event of a server process."""
    return json.dumps({"end": [number, time_ms, clean]}).encode()


def read(source: str, content: bytes, first: int = 1, last: int = 2**62) -> list[Event]:
    """Return the events of a batch: of the outbox, or a JSON array of CloudEvents.

    Raises `ValueError` for anything else: for what the ledger cannot store, and for numbers not from `first` to `last`.
    """
    try:
        events = _read(source, json.loads(content))
        for event in events:
            if not (first <= event.id <= last and 0 <= event.time_ms < _MAX_TIME_MS):
                raise ValueError(f"the number {event.id} at {event.time_ms}")
            for name, value in event.data.items():
                _check(name, value)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"no batch of usage events: {error}") from None
    return events


def _read(source: str, found: Any) -> list[Event]:
    if isinstance(found, list):
        return [_event(each) for each in found if each["source"] == source]
    if "end" in found:
        number, time_ms, clean = found["end"]
        return [Event(number, time_ms, END, {"clean": clean})]
    common, teams = {name: found["common"][name] for name in _COMMON}, dict(found.get("teams", {}))
    return [
        Event(number, time_ms, REQUEST, _row(values) | {"team": teams.get(values[0])} | common)
        for number, time_ms, *values in found["requests"]
    ]


def _check(name: str, value: Any) -> None:
    """Raise `ValueError` for a value that a database rejects, which would look as if the database were gone."""
    if name in _TEXTS:
        if value is not None and b"\0" in value.encode():
            raise ValueError(f"{name} has a NUL")
    elif name in _SECONDS:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    elif not (type(value) is int or name == "clean") or not 0 <= value < (2**31 if name == "status" else 2**62):
        raise ValueError(f"{name} is {value!r}")


def _event(found: dict[str, Any]) -> Event:
    time_ms = round(1000 * datetime.fromisoformat(found["time"]).timestamp())
    data = found["data"]
    if found["type"] == REQUEST:
        data = {"requests": 1, "team": None, **data}  # an older version does not have them
    names = FIELDS if found["type"] == REQUEST else ["clean"]
    return Event(int(found["id"]), time_ms, found["type"], {name: data[name] for name in names})


def _row(values: Sequence[Any]) -> dict[str, Any]:
    (count,) = values[_WIDTH:] or (1,)
    return dict(zip(_ROW, values[:_WIDTH], strict=True)) | {"requests": count}
