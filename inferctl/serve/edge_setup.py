"""What a process has around its edge: who may use it, its phase, and where its events go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

import inferctl
from inferctl.config import spec
from inferctl.core import outputs
from inferctl.serve.edge import access
from inferctl.serve.edge.access import EdgeAccess
from inferctl.serve.edge.edge import Edge
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.pages import Page
from inferctl.serve.observe import logs
from inferctl.serve.observe.metering import ServerMetering
from inferctl.serve.observe.metrics import RequestMetrics
from inferctl.serve.observe.server_metrics import ServerMetrics
from inferctl.tenancy.metering.usage_event import UsageEvent


class EdgeSetup:
    """For one process that responds to clients.

    `name`: of the server. `models`: the names that keys may have. `task`, `tasks`: as of `ServerMetering`. `ready()`,
    `live()`: as of `Lifecycle`. `log`, `traces`: as in `ServerOptions`. `batch_secret`: as of `EdgeAccess`. Raises
    `UsageError` if a key file is missing or not valid.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        task: spec.Task | None,
        keys: spec.Access,
        recording: spec.Metering,
        ready: Callable[[], bool],
        live: Callable[[], bool] = lambda: True,
        *,
        log: str,
        traces: bool,
        tasks: Mapping[str, spec.Task] = {},
        batches: spec.Batches,
        batch_secret: str,
    ) -> None:
        self._name, self._log, self._traces, self._batches = name, log, traces, batches
        self.metering = ServerMetering(recording, name, task, known_callers=keys.required, tasks=tasks)
        secret = batch_secret if batches.folder else None
        self.access = EdgeAccess(keys, models, secret) if keys.required else None
        self.lifecycle = Lifecycle(ready, live, lambda: access.known(self.access))

    def edge(
        self,
        app: ASGIApp,
        metrics: RequestMetrics | ServerMetrics,
        page: Callable[[str], Awaitable[Page]],
        **options: Any,
    ) -> Edge:
        """Return the edge in front of `app`, whose events are counted in `metrics`. `options`: others of `Edge`."""
        if self._batches.folder:
            from inferctl.serve.api import batches

            outputs.check_folder(Path(self._batches.folder), "serve.batches.folder")
            paths = options.get("models") or options["endpoints"]  # of several tasks, those that the server has
            app = batches.BatchApi(app, self._batches, paths)
            options |= {"endpoints": {**options["endpoints"], **batches.NAMES}, "uploads": batches.UPLOADS}
        sinks: list[Callable[[UsageEvent], None]] = [metrics.count_event, self.metering.record]
        if self._log == "json":
            sinks.append(logs.log_request)
        if self._traces:
            from inferctl.serve.observe import tracing

            sinks.append(tracing.tracer(self._name, inferctl.__version__))
        return Edge(
            app,
            self.lifecycle,
            sinks=sinks,
            page=page,
            access=self.access,
            check_metering=self.metering.check,
            **options,
        )
