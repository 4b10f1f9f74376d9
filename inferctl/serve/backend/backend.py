"""The interface of the backend: what decides about requests and computes them, in this process or in another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inferctl.reading.rows import Tokens
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.scheduling.dispatcher import RequestResult
from inferctl.tenancy.access.key_file import ApiKey


class Backend(Protocol):
    """Limits of keys, queue, cache and engines. Everything that must be exact for the whole server is decided here."""

    def charge(self, key: ApiKey, context: RequestContext) -> None:
        """Set `charge` and `usage` of the context of a request. Raises `LimitError`.

        The request is charged when its charge gets the size of the body, at the latest.
        """

    async def admit(self, context: RequestContext, size: int) -> None:
        """Raise `ApiError` if a body of `size` bytes need not be read, because the queue is full."""

    async def compute(
        self, context: RequestContext, sequences: Sequence[Tokens], marks: Sequence[int] | None
    ) -> RequestResult:
        """Charge the tokens of a request and return its vectors, which are finite.

        Sets the counts of the context, and `use` while it computes. `marks`: as in `Batch`. Raises
        `ApiError`, and `LimitError` if the tokens exceed a limit of the key. Cancelling it cancels the request.
        """
