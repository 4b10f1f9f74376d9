"""The pages of a server that no task answers: probes, `GET /info` and `GET /metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import orjson

import inferctl
from inferctl.serve.edge.lifecycle import Lifecycle

# Status, body and media type.
Page: TypeAlias = tuple[int, bytes, str]
# `/health` is of TEI and vLLM, whose probes users bring along.
PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/info", "/metrics"})


class Pages:
    """What a server answers at `PATHS`.

    `info()` returns the document of `GET /info`, None before it is known. `metrics()` returns the body and the media
    type of `GET /metrics`. `served`: the paths that the task of this server has.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        info: Callable[[], dict[str, Any] | None],
        metrics: Callable[[], tuple[bytes, str]],
        served: Sequence[str],
    ) -> None:
        self._lifecycle, self._info, self._metrics, self._served = lifecycle, info, metrics, list(served)

    async def answer(self, path: str) -> Page:
        """Return the page of a path."""
        if path == "/metrics":
            return 200, *self._metrics()
        if path == "/livez":
            status, line = (200, b"ok\n") if self._lifecycle.live() else (503, b"the engine fails to start\n")
            return status, line, "text/plain"
        if path == "/info":
            return self._info_page()
        return self._root() if path == "/" else self._readyz()

    def _readyz(self) -> Page:
        phase = self._lifecycle.phase
        return (200, b"ok\n", "text/plain") if phase == "ready" else (503, f"{phase}\n".encode(), "text/plain")

    def _root(self) -> Page:
        known = self._info() or {}
        document = {name: known.get(name) for name in ("name", "task")}
        document |= {"inferctl": inferctl.__version__, "phase": self._lifecycle.phase, "endpoints": self._served}
        document |= {"documentation": "/docs", "openapi": "/openapi.json", "info": "/info", "health": "/health"}
        return 200, orjson.dumps(document), "application/json"

    def _info_page(self) -> Page:
        document = self._info()
        if document is None:
            error = self._lifecycle.unavailable()
            return error.status, error.body(), "application/json"
        return 200, orjson.dumps({**document, "phase": self._lifecycle.phase}), "application/json"
