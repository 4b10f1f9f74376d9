"""The phases of the server: starting, ready, restarting, waiting for keys, draining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from inferctl.serve.edge.errors import ApiError

Phase = Literal["starting", "ready", "restarting", "waiting for keys", "draining"]
_MESSAGES = {"restarting": "restarting its engine", "draining": "shutting down"}
_MESSAGES |= {"waiting for keys": "waiting until its relay copies the keys"}


class Lifecycle:
    """The phase of the server, which decides what the probes report and whether requests are accepted.

    `ready()`: whether the task behind the edge can compute. `live()`: False if the process should be restarted.
    `keys_known()`: whether clients can be recognized.
    `started`: it was ready once. `draining`: a signal to stop arrived. `closed`: no more requests are accepted.
    """

    def __init__(
        self, ready: Callable[[], bool], live: Callable[[], bool], keys_known: Callable[[], bool] = lambda: True
    ) -> None:
        self.live = live
        self._ready, self._keys_known = ready, keys_known
        self.started = self.draining = self.closed = False

    @property
    def phase(self) -> Phase:
        """The phase, as `GET /readyz` reports it."""
        if self.draining:
            return "draining"
        if self._ready():
            return "ready" if self._keys_known() else "waiting for keys"
        return "restarting" if self.started else "starting"

    @property
    def accepts_requests(self) -> bool:
        """Whether requests are accepted, also while draining until the grace period ends."""
        return not self.closed and self._ready() and self._keys_known()

    def unavailable(self) -> ApiError:
        """Return the 503 of this phase."""
        message = f"the server is {_MESSAGES.get(self.phase, self.phase)}"
        return ApiError(503, message, code="not_ready", headers={"retry-after": "5"})
