"""What an endpoint is. Each API lists its own next to their requests, responses and handlers; `app.py` collects them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from pydantic import BaseModel
from starlette.types import ASGIApp

from inferctl.config.spec import Task
from inferctl.reading.outputs import Output
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.schemas import CohereErrorResponse, ErrorResponse, TeiErrorResponse, VoyageErrorResponse
from inferctl.serve.edge.errors import ApiError, cohere_body, tei_body, voyage_body

Shape: TypeAlias = tuple[Callable[[ApiError], bytes], type[BaseModel]]
OPENAI: Shape = ApiError.body, ErrorResponse
TEI: Shape = tei_body, TeiErrorResponse
COHERE: Shape = cohere_body, CohereErrorResponse
VOYAGE: Shape = voyage_body, VoyageErrorResponse  # that of Jina too
TEXTS = ["first text", "second text"]  # of examples


@dataclass(frozen=True)
class Endpoint:
    """What one task answers at `path` and at its `aliases`.

    `name`: in usage events and the scopes of keys. `bodies`: the models of its requests and responses. `application`:
    makes it, once for a server. `errors`: what makes the body of an error, and its model. `output`: the one that a
    model must have been trained for.
    """

    name: str
    task: Task
    path: str
    summary: str
    bodies: tuple[type[BaseModel], type[BaseModel]]
    example: dict[str, Any]
    application: Callable[[Inference], ASGIApp]
    errors: Shape = OPENAI
    aliases: tuple[str, ...] = ()
    output: Output | None = None

    def serves(self, task: Task, trained: Sequence[Output]) -> bool:
        """Return whether a server has it. `trained`: the outputs that an embedding model was trained for."""
        return self.task == task and (self.output is None or self.output in trained)

    @property
    def needs(self) -> str:
        """For which task a model must be, and its output, for an error."""
        return f"{self.task} with the output {self.output}" if self.output else self.task

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return self.path, *self.aliases


def application(function: Callable[..., Awaitable[None]], **options: Any) -> Callable[[Inference], ASGIApp]:
    """Return what makes the application of a function of `Inference`, the three arguments of ASGI, and `options`."""
    return lambda inference: partial(function, inference, **options)
