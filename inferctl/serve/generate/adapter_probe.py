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
from inferctl.models.adapter import Adapter
from inferctl.models.adapter_effect import Effect
from inferctl.models.divergence import Scored
from inferctl.models.model import ModelFolder
from inferctl.models.reference_process import ReferenceFailedError
from inferctl.serve.generate import control
from inferctl.serve.generate.control import EdgeSettings

_EXPECTED = "adapters.json"  # the output of the reference
_POLL_S = 0.1
_AT_ONCE, _BESIDE = 4, 3  # requests at a time beside those of clients, and texts, each token of which is a request
HINT = "compare it with PEFT on the base; if it is right there, `inferctl merge` makes a model of both"


async def write_expected(
    base: ModelFolder, adapters: Sequence[Adapter], context: int, folder: Path, on_wait: Callable[[float], None]
) -> None:
    """Run the reference for `base` with `adapters`, and leave its output beside that of others, or the reason."""
    needed, memory = 4 * base.parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = (cgroup.memory_limit() or memory) - cgroup.memory_in_use()
    options = ["--task", "generate", "--max-input-tokens", str(context - 1)]
    options += [word for each in adapters for word in ("--adapter", str(each.path))]
    try:
        if needed > free:
            raise ReferenceFailedError(f"fp32 needs {size(needed)} of memory, and {size(free)} are free")
        found = await asyncio.to_thread(reference_process.run, base.path, adapter_effect.PROMPTS, options, on_wait)
    except ReferenceFailedError as error:
        found = {"adapters": [{"error": error.reason}] * len(adapters)}
    rows = {each.digest: of for each, of in zip(adapters, found["adapters"], strict=True)}
    known = json.loads((folder / _EXPECTED).read_text()) if (folder / _EXPECTED).exists() else {"adapters": {}}
    document = {**known, **found, "adapters": {**known["adapters"], **rows}}
    outputs.replace(folder / _EXPECTED, json.dumps(document), sync=False)


async def check(app: ASGIApp, settings: EdgeSettings, folder: Path) -> None:
    """Compare the adapters, and add the figures to the document of `GET /info`. `app`: vLLM's application.

    Tells the supervisor, and raises `InferctlError`, if vLLM does not apply an adapter, or an adapter changes nothing.
    """
    adapters = settings.info.get("adapters", [])
    while adapters and not (folder / _EXPECTED).exists():
        await asyncio.sleep(_POLL_S)
    expected = json.loads((folder / _EXPECTED).read_text()) if adapters else {}
    base_name = settings.info["name"]
    name = f"model {base_name}"
    try:
        base = await _ask(app, base_name, expected) if adapters else []
        for each in adapters:
            name = f"adapter {each['name']}"
            own = await _ask(app, each["name"], expected)
            each["next_tokens"] = _compared(expected, each, base, own, settings)
    except InferctlError as error:
        control.connect(folder).send("refused", message=f"{name} {error.message}", hint=HINT)
        raise


async def check_added(app: ASGIApp, settings: EdgeSettings, folder: Path, added: dict[str, Any]) -> None:
    """Compare an adapter that vLLM loaded while it serves, as `check` does."""
    expected = json.loads((folder / _EXPECTED).read_text())
    expected["texts"] = expected.get("texts", [])[-_BESIDE:]
    if isinstance(rows := expected["adapters"][added["sha256"]], list):
        expected["adapters"][added["sha256"]] = rows[-_BESIDE:]
    base = await _ask_beside(app, settings.info["name"], expected)
    own = await _ask_beside(app, added["name"], expected)
    added["next_tokens"] = _compared(expected, added, base, own, settings)


def _compared(
    expected: dict[str, Any], adapter: dict[str, Any], base: list[Scored], own: list[Scored], settings: EdgeSettings
) -> dict[str, Any]:
    rows, precision = expected["adapters"][adapter["sha256"]], settings.info["precision"]["effective"]
    if unknown := isinstance(rows, dict) and rows["error"]:
        if own == base:
            raise InferctlError("changes nothing: vLLM responds as without it")
        return {"unknown": unknown}
    effect = Effect.of(expected["texts"], rows, base, own)
    if failure := effect.failure(precision):
        raise InferctlError(f"{failure}: {adapter_effect.line(effect.document())}")
    return effect.document() | ({"unknown": f"{precision} hides what it changes"} if effect.is_hidden else {})


async def _ask(app: ASGIApp, name: str, expected: dict[str, Any]) -> list[Scored]:
    """Return what vLLM predicts under a name for the prompts of the reference, or for texts without one.

    With adapters, vLLM's engine on CPUs ends if a step has the log-probabilities of a prompt and another request, so
    each prompt is a step of its own.
    """
    known, found = [text.ids for text in adapter_effect.texts(expected.get("texts", []))], []
    for prompt in known or adapter_effect.TEXTS:
        status, body = await request(app, "/v1/completions", divergence.request(name, prompt))
        if status != 200:
            raise InferctlError(f"cannot be checked: vLLM responds {status}, {body[:300].decode(errors='replace')}")
        response = orjson.loads(body)
        found.append(divergence.read_served(response, response["choices"][0]["prompt_token_ids"]))
    return found


async def _ask_beside(app: ASGIApp, name: str, expected: dict[str, Any]) -> list[Scored]:
    """Return what `_ask` does, while vLLM has other requests. Then it cannot compute log-probabilities of prompts.

    So each token of a text is the answer to a request with those before it, which may answer with no other.
    """
    turn = asyncio.Semaphore(_AT_ONCE)

    async def row(prompt: str | list[int], **options: Any) -> dict[int, float]:
        body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, **options}
        body |= {"logprobs": divergence.SERVED_TOKENS, "return_tokens_as_token_ids": True}
        async with turn:
            status, found = await request(app, "/v1/completions", body)
        if status != 200:
            raise InferctlError(f"cannot be checked: vLLM responds {status}, {found[:300].decode(errors='replace')}")
        (values,) = orjson.loads(found)["choices"][0]["logprobs"]["top_logprobs"]
        return {int(token.removeprefix("token_id:")): value for token, value in values.items()}

    async def text(ids: list[int]) -> Scored:
        rows = (row(ids[:end], allowed_token_ids=[ids[end]]) for end in range(1, len(ids)))
        return Scored(ids, await asyncio.gather(*rows))

    known = adapter_effect.texts(expected.get("texts", []))
    if not known:
        return [Scored([], [await row(each)]) for each in adapter_effect.TEXTS]
    return [await text(list(each.ids)) for each in known]


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
        "headers": [(b"content-type", b"application/json")],
        "server": None,
        "client": None,
    }
    await app(scope, receive, send)
    return status, b"".join(parts)
