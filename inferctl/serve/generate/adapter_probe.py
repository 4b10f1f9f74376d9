"""Compares what vLLM serves of each adapter with PEFT in fp32, before the server is ready.

The supervisor runs the reference and leaves its output in a file. The edge waits for it in vLLM's process, and asks for
the same tokens there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Scope

from inferctl.core import cgroup, outputs
from inferctl.core.errors import InferctlError
from inferctl.core.sizes import size
from inferctl.models import adapter_effect, divergence, reference_process
from inferctl.models.adapter_effect import Effect
from inferctl.models.divergence import Scored
from inferctl.models.model import ModelFolder
from inferctl.models.reference_process import ReferenceFailedError
from inferctl.serve.generate import control
from inferctl.serve.generate.command import VllmModel
from inferctl.serve.generate.control import EdgeSettings

_EXPECTED = "adapters.json"  # the output of the reference
_POLL_S = 0.1
_HINT = "compare it with PEFT on the base; if it is right there, `inferctl merge` makes a model of both"


async def write_expected(base: ModelFolder, model: VllmModel, folder: Path, on_wait: Callable[[float], None]) -> None:
    """Run the reference for `base` with the adapters of `model`, and leave its output, or why there is none."""
    needed, memory = 4 * base.parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = (cgroup.memory_limit() or memory) - cgroup.memory_in_use()
    options = ["--task", "generate", "--max-input-tokens", str(model.context - 1)]
    options += [word for each in model.adapters for word in ("--adapter", str(each.path))]
    try:
        if needed > free:
            raise ReferenceFailedError(f"fp32 needs {size(needed)} of memory, and {size(free)} are free")
        found = await asyncio.to_thread(reference_process.run, base.path, adapter_effect.PROMPTS, options, on_wait)
    except ReferenceFailedError as error:
        found = {"error": error.reason}
    outputs.replace(folder / _EXPECTED, json.dumps(found), sync=False)


async def check(app: ASGIApp, settings: EdgeSettings, folder: Path) -> None:
    """Compare the adapters, and add the figures to the document of `GET /info`. `app`: vLLM's application.

    Tells the supervisor, and raises `InferctlError`, if vLLM does not apply an adapter, or an adapter changes nothing.
    """
    adapters = settings.info.get("adapters", [])
    while adapters and not (folder / _EXPECTED).exists():
        await asyncio.sleep(_POLL_S)
    expected = json.loads((folder / _EXPECTED).read_text()) if adapters else {}
    name = f"model {settings.name}"
    try:
        base = await _ask(app, settings.name, expected) if adapters else []
        for number, each in enumerate(adapters):
            name = f"adapter {each['name']}"
            own = await _ask(app, each["name"], expected)
            each["next_tokens"] = _compared(expected, number, base, own, settings.info["precision"]["effective"])
    except InferctlError as error:
        control.connect(folder).send("refused", message=f"{name} {error.message}", hint=_HINT)
        raise


def _compared(
    expected: dict[str, Any], number: int, base: list[Scored], own: list[Scored], precision: str
) -> dict[str, Any]:
    if unknown := expected.get("error"):
        if own == base:
            raise InferctlError("changes nothing: vLLM responds as without it")
        return {"unknown": unknown}
    effect = Effect.of(expected["texts"], expected["adapters"][number], base, own)
    if failure := effect.failure(precision):
        raise InferctlError(f"{failure}: {adapter_effect.line(effect.document())}")
    return effect.document() | ({"unknown": f"{precision} hides what it changes"} if effect.is_hidden else {})


async def _ask(app: ASGIApp, name: str, expected: dict[str, Any]) -> list[Scored]:
    """Return what vLLM predicts under a name for the prompts of the reference, or for texts without one."""

    async def ask(prompt: str | Sequence[int]) -> Scored:
        status, body = await request(app, "/v1/completions", divergence.request(name, prompt))
        if status != 200:
            raise InferctlError(f"cannot be checked: vLLM responds {status}, {body[:300].decode(errors='replace')}")
        response = orjson.loads(body)
        return divergence.read_served(response, response["choices"][0]["prompt_token_ids"])

    known = [text.ids for text in adapter_effect.texts(expected.get("texts", []))]
    # One at a time: with adapters, vLLM for CPUs fails if several prompts with log-probabilities are in one batch.
    return [await ask(prompt) for prompt in known or adapter_effect.TEXTS]


async def request(app: ASGIApp, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
    """Return status and body of the response of an application in this process, to a POST if there is a body."""
    status, parts = 500, []
    messages: list[Message] = [{"type": "http.request", "body": orjson.dumps(body) if body else b""}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # the client does not leave; vLLM waits for that
        return messages.pop()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    key = os.environ.get("VLLM_API_KEY", "")
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST" if body else "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())],
        "server": None,
        "client": None,
    }
    await app(scope, receive, send)
    return status, b"".join(parts)
