"""The front end of one process: HTTP, keys, parsing, tokenization and responses, in front of a backend."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence

from inferctl.config.spec import MAX_CLIENT_BATCH, Spec, Task
from inferctl.reading.classify_config import ClassifyConfig
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.rerank_config import RerankConfig
from inferctl.reading.task_config import TaskConfig
from inferctl.serve.api import app
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.backend.backend import Backend
from inferctl.serve.edge import listener
from inferctl.serve.edge.access import EdgeAccess
from inferctl.serve.edge.connection import Connection
from inferctl.serve.edge.lifecycle import Lifecycle
from inferctl.serve.edge.middleware import Edge, EdgeLimits
from inferctl.serve.edge.pages import Page
from inferctl.serve.edge.request_context import UsageEvent
from inferctl.serve.text.tokenizer_pool import TokenizerPool

# Tokens of one request, if the queue is not larger. OpenAI's limit is 300,000.
_MAX_REQUEST_TOKENS = 262_144


class FrontEnd:
    """`model`: what the endpoints know of it; its sizes are set when an engine is ready.

    `emit` gets the usage events. `processes`: how many front ends the server has, which share
    what it can hold.
    """

    def __init__(
        self,
        spec: Spec,
        task: Task,
        config: TaskConfig,
        tokenizer: TokenizerPool,
        backend: Backend,
        lifecycle: Lifecycle,
        page: Callable[[str], Awaitable[Page]],
        emit: Callable[[UsageEvent], None],
        check_metering: Callable[[], None],
        access: EdgeAccess | None,
        *,
        truncate: bool,
        processes: int = 1,
        connection: type[Connection] = Connection,
    ) -> None:
        self.up, self.restarts = 1, 0  # as of `ApiProcesses`
        self.model = _served_model(spec, task, truncate, config)
        self.model.max_held_numbers //= processes
        self._tokenizer = tokenizer
        whole = EdgeLimits()
        limits = EdgeLimits(whole.max_body_bytes, whole.max_requests // processes, whole.max_bytes // processes)
        self._edge = Edge(
            app.create(Inference(self.model, tokenizer, backend)),
            lifecycle,
            emit=emit,
            page=page,
            endpoints=app.names(task),
            error_body=app.error_body(task),
            limits=limits,
            access=access,
            charge=backend.charge,
            check_metering=check_metering,
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
        self._tokenizer.warm()
        try:
            await self.http.serve(sockets=list(sockets))
        finally:
            self._tokenizer.close()

    def close(self) -> None:
        """Accept no more connections."""
        self.http.close()

    def set_sizes(self, sizes: Mapping[str, int]) -> None:
        """Set what is known when an engine is ready: numbers of vectors, and tokens of the vocabulary."""
        self.model.dimensions, self.model.token_dimensions = sizes["dimensions"], sizes["token_dimensions"]
        self.model.vocabulary_size = sizes["vocabulary_size"]


def _served_model(spec: Spec, task: Task, truncate: bool, config: TaskConfig) -> ServedModel:
    served = ServedModel(
        spec.name,
        spec.model.source,
        spec.serve.aliases,
        config.matryoshka if isinstance(config, EmbeddingConfig) else (),
        MAX_CLIENT_BATCH,
        max(_MAX_REQUEST_TOKENS, spec.serve.max_queue_tokens),
        truncate,
        task,
    )
    if isinstance(config, EmbeddingConfig):
        served.prompts, served.outputs, served.tokens = config.prompts, config.outputs, config.tokens
        served.trained, served.text_options = config.trained, config.text_options
        served.normalized = config.normalize and config.truncate_dim is None
    else:
        served.activation = config.scores
    if isinstance(config, RerankConfig) and config.template is not None:
        served.takes_instruction = config.template.takes_instruction
    if isinstance(config, ClassifyConfig):
        served.labels = config.labels
    return served
