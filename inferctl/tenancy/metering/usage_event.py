"""The usage events of metering: one per request or per sum of requests, and one at the end of each server process.

`source` names the server process (instance and boot), `id` is a number that counts from 1, and together they never
repeat. So a repeated event is recognized, and a lost one leaves a gap. An event never contains texts or API keys.

The outbox has them as rows, without what they have in common: that takes a fifth of the time and of the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from inferctl.config.spec_types import Task
from inferctl.tenancy.access.budgets import BudgetUse

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
# What the requests of one model have in common: their `Origin`. The columns of the ledger have the same names.
_COMMON = ["model", "model_sha256", "task", "hardware"]
_TEXTS = {"key_id", "endpoint", "code", "request_id", "team", "currency", *_COMMON}
_OPTIONAL = {"cost", "admitted_ms"}
_SECONDS = {"engine_ms", "duration_ms"}
_MAX_TIME_MS = 253_402_300_800_000  # the year 10000


class UsageEvent(NamedTuple):
    """One finished request. Each one emits exactly one event, also if it was rejected or its client disconnected.

    Probes emit none. `endpoint`: its name, `other` for a path without a task, empty if the connection rejected the
    request. `status`: the HTTP status, or 499 if the client disconnected before its response. A 200 means that the
    response was given to the connection, which resets a client that does not read it. `code`: the code of the error,
    None for a success; a stream that ended with an error event has the status 200 and a code. `seconds`: from the last
    byte of the request to the last byte of the response; `phases`: the parts of them. `input_tokens` counts the tokens
    that the model processed or a cache had, `cached_tokens` the latter, `output_tokens` those that it generated.
    `trace`: the W3C trace context of the client. `key_id`, `team`: of the API key, never the key itself.
    `engine_seconds`: the share of its batches' times, by tokens; 0 for generation, because vLLM does not report it.
    `content_length`: of the body, as the client declared it; `body_bytes` were read. `budget`: what it cost.
    """

    request_id: str
    endpoint: str
    status: int
    code: str | None = None
    model: str | None = None
    priority: str = "interactive"
    inputs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    body_bytes: int = 0
    seconds: float = 0.0
    phases: Mapping[str, float] = {}
    trace: Mapping[str, str] = {}
    key_id: str | None = None
    cached_tokens: int = 0
    engine_seconds: float = 0.0
    content_length: int = 0
    team: str | None = None
    budget: BudgetUse | None = None


class Item(NamedTuple):
    """What is recorded as one event. `at`: the end of the request, in seconds since 1970.

    `requests`: how many it stands for; `usage`: of the last one. `caller`: in place of the key id of `usage`.
    """

    number: int
    at: float
    usage: UsageEvent
    requests: int = 1
    caller: str | None = None


@dataclass(frozen=True)
class Origin:
    """What all requests for one model have in common. `hardware` and `model_sha256`: None before it is ready.

    Of a server with several models, those that used none of them have its name, and no task.
    """

    model: str
    task: Task | None
    model_sha256: str | None = None
    hardware: str | None = None


class Event(NamedTuple):
    """One event: of a request, or the last one of a server process. `time_ms`: since 1970.

    `data`: of a request, what the ledger has of it. `ended`: None for a request, else clean or unclean: the process was
    killed, so the event was written after its end. `shares`: account, label, end and run of each window of a budget.
    """

    id: int
    time_ms: int
    data: dict[str, Any]
    ended: Literal["clean", "unclean"] | None = None
    shares: Sequence[tuple[str, str, int, str]] = ()


def is_free(usage: UsageEvent) -> bool:
    """Return whether nothing was computed for a request, and no cache had its tokens, as for most rejected ones."""
    return not (usage.input_tokens or usage.output_tokens or usage.engine_seconds)


def requests(origin: Origin, items: Sequence[Item], others: Mapping[str, Origin] = {}) -> dict[str, Any]:
    """Return the content of a batch in the outbox. Inputs count only if something was computed for their request.

    `others`: by the `model` of requests, in place of `origin`.
    """
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
    spent = {
        item.number: [use.cost, use.currency, use.admitted_ms, use.run, use.shares]
        for item in items
        if (use := item.usage.budget) and use.shares
    }
    found: dict[Origin, int] = {}
    if others:
        of = [found.setdefault(others.get(item.usage.model or "", origin), len(found)) for item in items]
    origins = [asdict(each) for each in found] or [asdict(origin)]
    several = {"origins": origins, "of": of} if len(origins) > 1 else {}
    budgets = {"budgets": list(spent.items())} if spent else {}
    return {"common": origins[0], "requests": rows} | ({"teams": teams} if teams else {}) | budgets | several


def end(number: int, time_ms: int, *, clean: bool) -> bytes:
    """Return the content of the batch with the last event of a server process."""
    return json.dumps({"end": [number, time_ms, clean]}).encode()


def read(content: bytes, first: int = 1, last: int = 2**62) -> list[Event]:
    """Return the events of a batch of the outbox.

    Raises `ValueError` for anything else: for what the ledger cannot store, and for numbers not from `first` to `last`.
    """
    try:
        events = _read(json.loads(content))
        for event in events:
            if not (first <= event.id <= last and 0 <= event.time_ms < _MAX_TIME_MS):
                raise ValueError(f"the number {event.id} at {event.time_ms}")
            for name, value in event.data.items():
                _check(name, value)
            for account, label, end_s, run in event.shares:
                _check("end", end_s)
                _check("key_id", account + label + run)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"no batch of usage events: {error}") from None
    return events


def _read(found: Any) -> list[Event]:
    if "end" in found:
        number, time_ms, clean = found["end"]
        return [Event(number, time_ms, {}, "clean" if clean else "unclean")]
    rows, teams = found["requests"], dict(found.get("teams", {}))
    origins = [{name: each[name] for name in _COMMON} for each in found.get("origins", [found["common"]])]
    spent = dict(found.get("budgets", ()))
    events = []
    for (number, time_ms, *values), index in zip(rows, found.get("of", [0] * len(rows)), strict=True):
        cost, currency, admitted_ms, run, shares = spent.get(number, (None, None, None, "", ()))
        data = _row(values) | {"team": teams.get(values[0])} | origins[index]
        data |= {"cost": cost, "currency": currency, "admitted_ms": admitted_ms}
        windows = [(str(account), str(label), int(end), str(run)) for account, label, end in shares]
        events.append(Event(number, time_ms, data, shares=windows))
    return events


def _check(name: str, value: Any) -> None:
    """Raise `ValueError` for a value that a database rejects, which would look as if the database were gone."""
    if name in _TEXTS:
        if value is not None and b"\0" in value.encode():
            raise ValueError(f"{name} has a NUL")
    elif name in _SECONDS:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    elif name in _OPTIONAL and value is None:
        return
    elif type(value) is not int or not 0 <= value < (2**31 if name == "status" else 2**62):
        raise ValueError(f"{name} is {value!r}")


def _row(values: Sequence[Any]) -> dict[str, Any]:
    (count,) = values[_WIDTH:] or (1,)
    return dict(zip(_ROW, values[:_WIDTH], strict=True)) | {"requests": count}
