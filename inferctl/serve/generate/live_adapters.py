"""`/adapters`: adds and removes adapters of a vLLM that serves, for admin keys.

The supervisor reads an adapter, and computes in fp32 what it changes. This process tells vLLM, compares, and takes
requests for the name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.types import Receive, Scope

from inferctl.config.spec_types import ModelAlias
from inferctl.core.errors import InferctlError
from inferctl.serve.edge.edge import read_body
from inferctl.serve.edge.errors import ApiError, wrong_method
from inferctl.serve.edge.request_context import context_of
from inferctl.serve.edge_setup import EdgeSetup
from inferctl.serve.generate import adapter_probe
from inferctl.serve.generate.control import EdgeSettings
from inferctl.serve.generate.model_names import ModelNames

_REMOVE = "/adapters/remove"
PATHS = frozenset({"/adapters", _REMOVE})
ANSWERS = frozenset({"load", "refused"})  # of the supervisor


class _Asked(BaseModel, extra="forbid"):
    name: ModelAlias
    source: str = Field("", max_length=4096)


class LiveAdapters:
    """`app`: vLLM's application. `send`: to the supervisor, whose answers go to `receive`. `setup`: of the edge."""

    def __init__(
        self,
        app: Starlette,
        settings: EdgeSettings,
        folder: Path,
        names: ModelNames,
        setup: EdgeSetup,
        send: Callable[..., None],
    ) -> None:
        self._app, self._settings, self._folder = app, settings, folder
        self._names, self._setup, self._send = names, setup, send
        self._loaded: list[dict[str, Any]] = settings.info["adapters"]  # also those whose last requests run
        self._one = asyncio.Lock()
        self._answer: asyncio.Future[dict[str, Any]]
        self._changes: set[asyncio.Task[Any]] = set()

    def receive(self, message: dict[str, Any]) -> None:
        """Take the answer of the supervisor to `add`."""
        self._answer.set_result(message)

    async def answer(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """Return the document of a response. Raises `ApiError`."""
        key = context_of(scope).key
        if key is None or not key.admin:
            raise ApiError(403, "this API key may not change adapters: use an admin key", code="forbidden")
        if scope["method"] != "POST":
            raise wrong_method(scope["method"], "POST")
        try:
            asked = _Asked.model_validate_json(await read_body(receive))
        except ValidationError as error:
            (first, *_) = error.errors()
            raise ApiError(400, f"{first['loc']}: {first['msg']}", code="invalid_value") from None
        change = self._remove(asked.name) if scope["path"] == _REMOVE else self._add(asked.name, asked.source)
        self._changes.add(task := asyncio.create_task(change))
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)  # it goes on without its client

    async def _add(self, name: str, source: str) -> dict[str, Any]:
        async with self._one:
            if self._names.has(name) or any(each["name"] == name for each in self._loaded):
                raise ApiError(409, f"the name {name!r} is in use", code="name_in_use")
            if len(self._loaded) >= (most := self._settings.info["limits"]["max_adapters"]):
                message = f"{most} adapters are loaded, and the server has memory for {most}: remove one, or start it "
                raise ApiError(409, f"{message}with a larger serve.spare_adapters", code="adapters_full")
            self._answer = asyncio.get_running_loop().create_future()
            self._send("add", name=name, source=source)
            answer = await self._answer
            if answer["kind"] == "refused":
                raise ApiError(400, answer["message"], code="adapter_refused")
            added: dict[str, Any] = answer["adapter"]
            try:
                await self._load(name, answer["path"])
                await adapter_probe.check_added(self._app, self._settings, self._folder, added)
            except Exception as error:
                await self._unload(name)
                if not isinstance(error, InferctlError):
                    raise
                message = f"adapter {name} {error.message}; {adapter_probe.HINT}"
                raise ApiError(400, message, code="adapter_refused") from None
            self._loaded.append(added)
            self._setup.metering.add(name, "generate")
            self._setup.metering.ready(self._settings.info["device"], added["sha256"], name)
            if self._setup.access:
                self._setup.access.names.add(name)
            self._names.add(name)
            self._send("added", name=name, next_tokens=added["next_tokens"])
            return added

    async def _remove(self, name: str) -> dict[str, Any]:
        if name not in self._names.adapters:
            raise ApiError(404, f"no adapter {name!r} on this server", code="adapter_not_found")
        self._send("removed", name=name)
        await self._names.remove(name)
        await self._unload(name)
        self._loaded[:] = [each for each in self._loaded if each["name"] != name]
        return {"name": name}

    async def _load(self, name: str, path: str) -> None:
        """Let vLLM load an adapter, as at its start. Raises `InferctlError`."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
        found = await self._app.state.openai_serving_models.load_lora_adapter(request)
        if not isinstance(found, str):
            raise InferctlError(f"is not loaded by vLLM: {found.error.message}")

    async def _unload(self, name: str) -> None:
        """Let vLLM forget an adapter. Its endpoint forgets the name only, so the last slot would be used in time."""
        models = self._app.state.openai_serving_models
        if (known := models.lora_requests.pop(name, None)) is not None:
            await models.engine_client.remove_lora(known.lora_int_id)
