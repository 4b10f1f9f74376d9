"""The names that requests use for a generative model and the adapters on it, as far as their keys may."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from inferctl.serve.api.served_model import unknown_model
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext


class ModelNames:
    """`base`: the names of the model, its own first. `adapters`: of those on it. `context`: the largest, in tokens.

    A key that has one name of the model, or its `source`, has all of them, and none of the adapters.
    """

    def __init__(self, base: Sequence[str], source: str, adapters: Sequence[str], context: int) -> None:
        self._own, self._of_base, self.context = base[0], (*base, source), context
        # Name -> that of usage events.
        self._names = dict.fromkeys(base, self._own) | {name: name for name in adapters}
        self._created = int(time.time())
        self._users: dict[str, set[int]] = defaultdict(set)  # the numbers of requests by name of events
        self._idle: dict[str, asyncio.Event] = {}

    @property
    def adapters(self) -> list[str]:
        """The names of adapters that take requests."""
        return [name for name, root in self._names.items() if root != self._own]

    def has(self, name: str) -> bool:
        """Return whether requests may use a name, or keys may have it."""
        return name in self._names or name in self._of_base

    def add(self, adapter: str) -> None:
        """Take requests for an adapter from now on."""
        self._names[adapter] = adapter

    async def remove(self, adapter: str) -> None:
        """Take no more requests for an adapter, and return when its last one ended."""
        del self._names[adapter]
        if self._users[adapter]:
            self._idle[adapter] = asyncio.Event()
            await self._idle[adapter].wait()

    def release(self, context: RequestContext) -> None:
        """End what `resolve` began."""
        users = self._users[context.model or ""]
        users.discard(context.number)
        if not users and (idle := self._idle.pop(context.model or "", None)):
            idle.set()

    def resolve(self, context: RequestContext, wanted: Any) -> str:
        """Return the name for vLLM of the model that a request wants, and write that of its event to `context`.

        The request uses it until `release`.

        Raises `ApiError` 400 or 404, which is the same for a name that does not exist and one of other keys.
        """
        if not isinstance(wanted, str | None):
            raise ApiError(400, "model must be a text", code="invalid_value", param="model")
        if wanted is None or not self._is_visible(context, wanted):
            names = self._visible(context)
            if wanted or len({self._names[name] for name in names}) != 1:
                raise unknown_model(wanted or None, names)
            wanted = names[0]
        context.model = self._names[wanted]
        self._users[context.model].add(context.number)
        return str(wanted)

    def cards(self, context: RequestContext) -> list[dict[str, Any]]:
        """Return what `/v1/models` lists for the key of a request, in OpenAI's format."""
        known = {"object": "model", "created": self._created, "owned_by": "inferctl", "max_model_len": self.context}
        found = [(name, self._names[name]) for name in self._visible(context)]
        return [
            {"id": name, **known, "root": root, "parent": None if root == self._own else self._own}
            for name, root in found
        ]

    def _visible(self, context: RequestContext) -> list[str]:
        return [name for name in self._names if self._is_visible(context, name)]

    def _is_visible(self, context: RequestContext, name: str) -> bool:
        root = self._names.get(name)
        return root is not None and context.may_use(*(self._of_base if root == self._own else (name,)))
