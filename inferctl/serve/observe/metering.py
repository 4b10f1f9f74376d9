"""Where the usage events of one server process go, and when requests are rejected for it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferctl.config.spec import Metering as Settings
from inferctl.config.spec import Task
from inferctl.core.sizes import parse_size
from inferctl.serve.observe.metrics import RequestMetrics
from inferctl.serve.work import RejectedError
from inferctl.tenancy.metering.outbox import Outbox
from inferctl.tenancy.metering.recorder import UNAVAILABLE, EventRecorder
from inferctl.tenancy.metering.usage_event import Origin, UsageEvent

log = logging.getLogger("inferctl.metering")


class ServerMetering:
    """The recorder of one process. With `metering.mode: off`, it does nothing.

    `model`, `task`: of the requests that are for none of `tasks`, which has those of several models.

    `known_callers`: whether the server asks who a client is. Then only requests of a known caller are recorded.
    """

    def __init__(
        self,
        settings: Settings,
        model: str,
        task: Task | None,
        *,
        known_callers: bool,
        tasks: Mapping[str, Task] = {},
    ) -> None:
        self._settings, self._origin, self._known_callers = settings, Origin(model, task), known_callers
        self._origins = {name: Origin(name, of_model) for name, of_model in tasks.items()}
        self._recorder: EventRecorder | None = None

    def open(self) -> None:
        """Make the outbox, and record from now on.

        Raises `NotReadyError` if that is not possible, `UsageError` for its size.
        """
        settings = self._settings
        if settings.mode != "off":
            outbox = Outbox.create(Path(settings.data), parse_size(settings.outbox_size))
            self._recorder = EventRecorder(outbox, self._origin, required=settings.mode == "required")
            self._recorder.origins = dict(self._origins)

    def record(self, event: UsageEvent) -> None:
        """Record a finished request: the sink of usage events.

        Requests without a valid key, and those that are no valid HTTP, are only counted in the metrics: anyone can send
        them, and they would fill the disk. The status does not tell: without a key, a request can also get 400 (its
        body is no HTTP), 503 (tokens cannot be checked now) or 200 (an open page).
        """
        known = event.key_id is not None or not self._known_callers
        if self._recorder is not None and event.endpoint and known:
            self._recorder.record(event)

    def add(self, name: str, task: Task) -> None:
        """Record the requests of one more name, before `ready` for it."""
        self._origins[name] = Origin(name, task)

    def ready(self, device: Mapping[str, Any], model_sha256: str, model: str = "") -> None:
        """Set what is known when the model, or one of several, is loaded. `device`: as in `GET /info`."""
        known = {"hardware": device.get("hardware") or device["name"], "model_sha256": model_sha256}
        if model in self._origins:
            self._origins[model] = replace(self._origins[model], **known)
        else:
            self._origin = replace(self._origin, **known)
        if self._recorder:
            self._recorder.origin, self._recorder.origins = self._origin, dict(self._origins)

    @property
    def source(self) -> str:
        """The source of the events, or another name that is unique."""
        return self._recorder.source if self._recorder else secrets.token_hex(8)

    def hardware(self, model: str) -> str:
        """Return the hardware in the events of a model, after `ready`."""
        return self._origins.get(model, self._origin).hardware or ""

    def watch(self, metrics: RequestMetrics) -> None:
        """Add the metrics of the outbox, after `open`."""
        if self._recorder:
            metrics.watch_outbox(self._recorder)

    def check(self) -> None:
        """Raise `RejectedError` if each request must be metered, and the event of another one could not be recorded."""
        recorder = self._recorder
        if recorder is not None and recorder.required and recorder.full:
            message = "usage events cannot be recorded; see the server log"
            raise RejectedError(UNAVAILABLE, message, 5)

    async def close(self, seconds: float) -> None:
        """Write the last events, for up to `seconds`."""
        recorder, self._recorder = self._recorder, None
        if recorder and not await asyncio.to_thread(recorder.close, seconds):
            log.error("the server ends, and some of the last usage events could not be written")


def warnings(settings: Settings) -> Iterator[str]:
    """Yield what the operator should know at the start."""
    if settings.mode == "off" and (settings.ledger or settings.broker):
        found = "metering.ledger" if settings.ledger else "metering.broker"
        yield f"no usage is recorded: {found} has no effect without `metering.mode: on`"
