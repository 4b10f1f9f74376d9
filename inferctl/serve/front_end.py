"""The front end of one process: HTTP, keys, parsing, tokenization and responses, in front of a backend."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from inferctl.config.spec import Spec
from inferctl.reading.space import Space
from inferctl.serve.api import app
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge import listener
from inferctl.serve.edge.connection import Connection
from inferctl.serve.edge.edge import EdgeLimits
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge_setup import EdgeSetup
from inferctl.serve.observe.server_metrics import ServerMetrics
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from inferctl.serve.work import Backend


class FrontEnd:
    """`models`: what the endpoints know of them, and their tokenizers; their sizes are set when engines are ready.

    `page`: as of `Edge`. `processes`: how many front ends the server has, which share what it can hold.
    """

    def __init__(
        self,
        spec: Spec,
        models: Sequence[tuple[ServedModel, TokenizerPool]],
        setup: EdgeSetup,
        metrics: ServerMetrics,
        backend: Backend,
        page: Callable[[str], Awaitable[Page]],
        *,
        processes: int = 1,
        connection: type[Connection] = Connection,
    ) -> None:
        self.up, self.restarts = 1, 0  # as of `ApiProcesses`
        self.models, self._tokenizers = zip(*models, strict=True)
        for model in self.models:
            model.max_held_numbers //= processes * len(models)
        whole = EdgeLimits()
        limits = EdgeLimits(whole.max_body_bytes, whole.max_requests // processes, whole.max_bytes // processes)
        self._edge = setup.edge(
            app.create(spec.name, [Inference(*each, backend) for each in models], limits.max_requests),
            metrics,
            page,
            endpoints=app.names(self.models),
            error_body=app.error_body,
            limits=limits,
            backend=backend,
            models=app.owners(self.models),
        )
        self.http = listener.HttpServer(self._edge, spec.serve.drain_seconds, self._edge.rejected, connection)

    @property
    def in_flight(self) -> int:
        """How many requests have no response yet."""
        return self._edge.in_flight

    @property
    def unfinished_responses(self) -> int:
        """How many complete requests were still running when the drain ended."""
        return self._edge.unfinished_responses

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Serve until `close` is called, then until the responses are complete, or the drain takes too long."""
        for tokenizer in self._tokenizers:
            tokenizer.warm()
        try:
            await self.http.serve(sockets=list(sockets))
        finally:
            for tokenizer in self._tokenizers:
                tokenizer.close()

    def close(self) -> None:
        """Accept no more connections."""
        self.http.close()

    def set_sizes(self, number: int, sizes: Mapping[str, Any]) -> None:
        """Set what is known when an engine is ready: numbers of vectors, tokens of the vocabulary, and spaces."""
        model = self.models[number]
        model.dimensions, model.token_dimensions = sizes["dimensions"], sizes["token_dimensions"]
        model.vocabulary_size = sizes["vocabulary_size"]
        model.spaces = {name: Space(name, definition) for name, definition in sizes["spaces"].items()}
