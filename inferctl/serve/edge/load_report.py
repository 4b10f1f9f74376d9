"""How loaded a server is, as a response header that a gateway reads (ORCA, `endpoint-load-metrics`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from inferctl.serve.edge.request_context import UsageEvent

# Events of this time count most: the sums decay by 1/e. Envoy updates its weights every second.
_WINDOW_S = 2.0
_REFRESH_S = 0.1
# Envoy ignores a report without utilization. A server whose cache has all inputs has nearly none.
_MIN_UTILIZATION = 0.01


class LoadReport:
    """The utilization and the request rate of the last seconds. Their quotient is what the server could do.

    Utilization is the larger one of two shares, the time that engines compute and the CPU time of this process, plus
    `waiting`. `slots`: batches that engines run at the same time. `waiting`: the predicted wait of a new request, as a
    share of the longest one that is accepted. `processes`: API processes of the server, each with an equal part of the
    requests.
    """

    def __init__(
        self,
        slots: Callable[[], int] = lambda: 1,
        waiting: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
        processes: int = 1,
    ) -> None:
        self._slots, self._waiting, self._clock, self._processes = slots, waiting, clock, processes
        self._requests = self._engine_s = self._cpu_s = 0.0
        self._decayed = clock()
        self._cpu = time.process_time()
        self._made, self._line = -math.inf, b""

    def record(self, event: UsageEvent) -> None:
        """Count a finished request: a sink of usage events. Rejected ones would make a full server look fast."""
        if event.status == 200:
            self._decay()
            self._requests += 1
            self._engine_s += event.engine_seconds

    def line(self) -> bytes:
        """Return the header as a line, made at most ten times per second."""
        now = self._clock()
        if now - self._made >= _REFRESH_S:
            self._decay()
            busy = max(self._processes * self._engine_s / max(1, self._slots()), self._cpu_s) / _WINDOW_S
            utilization = max(_MIN_UTILIZATION, busy + self._waiting())
            self._line = b'endpoint-load-metrics: JSON {"application_utilization":%.4f,"rps_fractional":%.3f}\r\n' % (
                utilization,
                self._processes * self._requests / _WINDOW_S,
            )
            self._made = now
        return self._line

    def _decay(self) -> None:
        now, cpu = self._clock(), time.process_time()
        kept = math.exp(-(now - self._decayed) / _WINDOW_S)
        self._requests *= kept
        self._engine_s *= kept
        self._cpu_s = self._cpu_s * kept + cpu - self._cpu
        self._decayed, self._cpu = now, cpu
