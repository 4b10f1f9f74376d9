"""The CloudEvents of metering: one per request, and one at the end of each server process.

They have identities that never repeat: `source` names the server process (instance and boot), `id` is a number that
counts from 1. So a repeated event is recognized, and a lost one leaves a gap. They never contain texts or API keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

REQUEST = "inferctl.request.v1"
# The last event of a server process. `data.clean`: False if the process was killed, then written after its death.
END = "inferctl.end.v1"
BATCH_MEDIA_TYPE = "application/cloudevents-batch+json"
# `subject` of the events of requests without an API key.
ANONYMOUS = "anonymous"


class Usage(Protocol):
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


@dataclass(frozen=True)
class Origin:
    """What all requests of a server process have in common. `hardware` and `model_sha256`: None before it is ready."""

    model: str
    task: Literal["embed", "rerank", "generate"]
    model_sha256: str | None = None
    hardware: str | None = None


def request(source: str, number: int, at: float, origin: Origin, usage: Usage) -> dict[str, Any]:
    """Return the event of a request that ended at `at` (seconds since 1970). orjson formats the time."""
    return {
        "specversion": "1.0",
        "type": REQUEST,
        "source": source,
        "id": str(number),
        "time": datetime.fromtimestamp(int(1000 * at) / 1000, UTC),
        "subject": usage.key_id or ANONYMOUS,
        "datacontenttype": "application/json",
        "data": {
            "key_id": usage.key_id,
            "model": origin.model,
            "model_sha256": origin.model_sha256,
            "task": origin.task,
            "endpoint": usage.endpoint,
            "inputs": usage.inputs,
            "input_tokens": usage.input_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "engine_ms": round(1000 * usage.engine_seconds, 3),
            "duration_ms": round(1000 * usage.seconds, 3),
            "status": usage.status,
            "code": usage.code,
            "hardware": origin.hardware,
            "request_id": usage.request_id,
        },
    }


def end(source: str, number: int, at: float, *, clean: bool) -> dict[str, Any]:
    """Return the last event of a server process."""
    return {
        "specversion": "1.0",
        "type": END,
        "source": source,
        "id": str(number),
        "time": formatted(int(1000 * at)),
        "datacontenttype": "application/json",
        "data": {"clean": clean},
    }


def formatted(time_ms: int) -> str:
    """Return a time in milliseconds since 1970 as in `2026-01-02T03:04:05.678Z`."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def milliseconds(event: Mapping[str, Any]) -> int:
    """Return the time of an event in milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(event["time"]).timestamp())
