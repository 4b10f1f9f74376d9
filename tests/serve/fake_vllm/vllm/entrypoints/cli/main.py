"""Starts in a second, answers like vLLM, and fails on demand. Tests with the real vLLM are in test_vllm.py.

The first message of a chat is its script: `die` ends this process, `engine dies` ends the engine, `hang` stops it, and
a number is the count of tokens. The file named by FAKE_VLLM_START has the text with which the start fails, and
FAKE_VLLM_SECONDS is how long it takes. A token takes 50 ms. With FAKE_VLLM_TOKENS_PER_S, the first token takes
20 ms, and all streams share that rate for the others, at most 50 tokens/s each.

A response has the folder of its adapter as `system_fingerprint`. One whose adapter the engine lost is an error.

Without `--uds`, it listens at `--port`, like a vLLM without inferctl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from prometheus_client import REGISTRY, Counter, Gauge
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

GAP_S = 0.05
TOKENS = Counter("vllm:generation_tokens", "Generated tokens.")
KV_CACHE = Gauge("vllm:kv_cache_usage_perc", "Used part of the KV cache.")
WAITING = Gauge("vllm:num_requests_waiting", "Waiting requests.", ["engine"])
CACHED = {"cached_tokens": 4}
BUSY = "The engine is currently busy"
ENGINE_LOST = {"error": {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}}


class Engine:
    alive = True
    hangs = False
    streams = 0
    rate = float(os.environ.get("FAKE_VLLM_TOKENS_PER_S", "0"))

    @classmethod
    def gap_s(cls, number: int) -> float:
        if not cls.rate:
            return GAP_S
        return max(0.02, cls.streams / cls.rate) if number else 0.02


class Models:
    """What vLLM knows of adapters, by name: their folders. `engine`: those that the engine has, by id."""

    def __init__(self, modules: list[str]) -> None:
        self.lora_requests: dict[str, SimpleNamespace] = {}
        self.engine: dict[int, str] = {}
        self.engine_client = self
        for module in modules:
            self._add(*module.split("="))

    def _add(self, name: str, path: str) -> None:
        number = 1 + max(self.engine, default=0)
        self.lora_requests[name] = SimpleNamespace(lora_int_id=number)
        self.engine[number] = Path(path).name

    async def load_lora_adapter(self, request: Any) -> str:
        self._add(request.lora_name, request.lora_path)
        return "loaded"

    async def remove_lora(self, number: int) -> None:
        del self.engine[number]


class EngineClient:
    """As vLLM's: `generate` yields what is new, or all at the end. `abort` ends it with what it has until then."""

    def __init__(self) -> None:
        self.aborted: set[str] = set()

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted |= set(request_ids)

    async def generate(self, prompt: str, sampling_params: Any, request_id: str) -> AsyncIterator[SimpleNamespace]:
        stream = sampling_params.output_kind.name == "DELTA"
        sent = done = 0
        for part in range(15 if prompt == "prefill" else 0):
            await asyncio.sleep(0.2)
            KV_CACHE.set(part)
            if request_id in self.aborted:
                break
        for number in range(sampling_params.max_tokens):
            await asyncio.sleep(Engine.gap_s(number))
            while Engine.hangs:
                await asyncio.sleep(0.1)
            if not Engine.alive:
                return
            end = request_id in self.aborted
            if not end:
                TOKENS.inc()
                done += 1
                end = done == sampling_params.max_tokens
            if stream or end:
                yield SimpleNamespace(
                    prompt_token_ids=[1] * 7,
                    encoder_prompt_token_ids=None,
                    num_cached_tokens=CACHED["cached_tokens"],
                    outputs=[SimpleNamespace(token_ids=[2] * (done - sent))],
                )
                sent = done
            if end:
                return


async def words(request: Request, script: str, count: int, stream: bool) -> AsyncIterator[str]:
    kind = SimpleNamespace(name="DELTA" if stream else "FINAL_ONLY")
    params, number = SimpleNamespace(n=1, max_tokens=count, output_kind=kind), 0
    async for output in request.app.state.engine_client.generate(script, params, os.urandom(8).hex()):
        for _ in output.outputs[0].token_ids:
            yield f"word{number} "
            number += 1


async def events(request: Request, script: str, count: int, options: dict[str, bool]) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]]) -> str:
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
        if not choices or options.get("continuous_usage_stats"):
            chunk["usage"] = {"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens}
        if not choices:
            chunk["usage"]["prompt_tokens_details"] = CACHED
        return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"

    tokens = 0
    Engine.streams += 1
    async for word in words(request, script, count, True):
        if not tokens:
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        tokens += 1
        end = "length" if tokens == count else None
        yield event([{"index": 0, "delta": {"content": word}, "finish_reason": end}])
        if script == "engine dies" and tokens == 3:
            Engine.alive = False
        if script == "early end" and tokens == 3:
            return
    Engine.streams -= 1
    if not Engine.alive:
        yield f"data: {json.dumps(ENGINE_LOST)}\n\ndata: [DONE]\n\n"
        return
    if options.get("include_usage"):
        yield event([])
    yield "data: [DONE]\n\n"


def log_error(place: str, *lines: str) -> None:
    """Print an error as vLLM does: each line has the whole prefix."""
    for line in lines:
        print(f"(EngineCore pid=1) ERROR 11-26 19:00:00 [{place}] {line}", flush=True)


async def collect(parts: AsyncIterator[str]) -> str:
    return "".join([part async for part in parts])


async def disconnect(request: Request) -> None:
    """Return when the client left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def chat(request: Request) -> Response:
    body = await request.json()
    script = (body.get("messages") or body["input"])[0]["content"]
    count = int(script) if script.isdigit() else int(body.get("max_completion_tokens") or body.get("max_tokens") or 20)
    if grammar := body.get("structured_outputs"):
        log_error("__init__.py:208", "Failed to compile grammar for request 1", "Traceback:", "", f"Error: {grammar}")
        return JSONResponse({"error": {"message": "no", "type": "BadRequestError", "param": "p", "code": 400}}, 400)
    if script == "engine dies":
        log_error("dump_input.py:79", f"Dumping scheduler output for model execution: stop={body.get('stop')}")
    if script == "die":
        os._exit(1)
    if script == "busy":
        return JSONResponse({"error": {"message": BUSY, "type": "x", "param": None, "code": 503}}, 503)
    if script == "hang":
        Engine.hangs = True
    if script == "tokenize":
        left = asyncio.ensure_future(disconnect(request))
        await asyncio.wait([left], timeout=3)
        if left.done():
            return JSONResponse(None)
        left.cancel()
    if script == "wait":
        WAITING.labels("0").set(3)
    if script == "block":
        time.sleep(600)
    models, name = request.app.state.openai_serving_models, body.get("model")
    adapter = models.lora_requests.get(name)
    if adapter is None and name not in request.app.state.names:
        return JSONResponse({"error": {"message": f"no {name}", "type": "x", "param": None, "code": 404}}, 404)
    path = models.engine[adapter.lora_int_id] if adapter else None
    if script == "invalid":
        return JSONResponse({"error": {"message": "no", "type": "BadRequestError", "param": "p", "code": 400}}, 400)
    if body.get("stream"):
        options = body.get("stream_options") or {}
        return StreamingResponse(events(request, script, count, options), media_type="text/event-stream")
    generating = asyncio.ensure_future(collect(words(request, script, count, False)))
    left = asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait((generating, left), return_when=asyncio.FIRST_COMPLETED)
        if not generating.done():
            generating.cancel()
            return JSONResponse(None)
    finally:
        left.cancel()
    text = generating.result()
    if not Engine.alive or (adapter and models.engine.get(adapter.lora_int_id) != path):
        return JSONResponse(ENGINE_LOST, 500)
    usage = {"prompt_tokens": 7, "total_tokens": 7 + count, "completion_tokens": count, "prompt_tokens_details": CACHED}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": name, "system_fingerprint": path}
    return Response(json.dumps({**head, "choices": [choice], "usage": usage}, separators=(",", ":")), 200)


async def completions(request: Request) -> Response:
    """Return log-probabilities of a prompt: those of the base for all names, or without a reference by their length."""
    body = await request.json()
    ids = body["prompt"] if isinstance(body["prompt"], list) else [1, 2]
    rows = [{token: {"logprob": -len(body["model"])}} for token in ids[1:]]
    for text in json.loads((Path(os.environ["INFERCTL_EDGE"]) / "adapters.json").read_text()).get("texts", []):
        if text and text["ids"] == ids:
            lists = zip(text["top_ids"], text["top_logprobs"], ids[1:], text["logprobs"], strict=True)
            rows = [dict(zip([*tops, own], [*values, value], strict=True)) for tops, values, own, value in lists]
            rows = [{token: {"logprob": value} for token, value in row.items()} for row in rows]
    if "logprobs" in body:
        choice = {"logprobs": {"top_logprobs": [{"token_id:1": -len(body["model"])}]}}
        return JSONResponse({"choices": [choice]})
    return JSONResponse({"choices": [{"prompt_token_ids": ids, "prompt_logprobs": [None, *rows]}]})


async def tokenize(request: Request) -> Response:
    await request.json()
    await asyncio.sleep(3)
    return JSONResponse({"count": 1})


async def health(_: Request) -> Response:
    return Response(status_code=200 if Engine.alive else 503)


async def document(_: Request) -> Response:
    post = {"post": {"summary": "Create <it>"}}
    paths = {"/v1/chat/completions": post, "/v1/completions/render": post, "/tokenize": post}
    return JSONResponse({"openapi": "3.1.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths})


async def page(_: Request) -> Response:
    return Response("<script src=https://cdn.example.com/ui.js></script>", media_type="text/html")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("command")
    options.add_argument("model")
    options.add_argument("--uds")
    options.add_argument("--port", type=int)
    options.add_argument("--middleware")
    options.add_argument("--lora-modules", nargs="*", default=[])
    options.add_argument("--served-model-name", nargs="*", default=[])
    chosen, others = options.parse_known_args()
    time.sleep(float(os.environ.get("FAKE_VLLM_SECONDS", "0")))
    start = Path(os.environ.get("FAKE_VLLM_START", "/nonexistent"))
    if start.exists():
        sys.exit(start.read_text())
    if "--disable-log-stats" in others:
        REGISTRY.unregister(TOKENS)
        REGISTRY.unregister(KV_CACHE)
        REGISTRY.unregister(WAITING)
    print("(APIServer pid=1) INFO 11-26 19:00:00 [x.py:1] started with", *others)
    print("(APIServer pid=1) ERROR 11-26 19:00:00 [x.py:1] an error line")
    warning = {"time": "2026-11-26T19:00:00.000+00:00", "level": "warning", "logger": "vllm.renderers.hf"}
    for logger in ("vllm.renderers.hf", "transformers"):
        print("(APIServer pid=1)", json.dumps(warning | {"logger": logger, "message": "geheim"}, separators=(",", ":")))
    routes = [
        Route("/health", health),
        Route("/openapi.json", document),
        *(Route(path, page) for path in ("/docs", "/redoc", "/docs/oauth2-redirect")),
        *(Route(path, chat, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/completions/render", chat, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        log_error("async_llm.py:906", "AsyncLLM output_handler failed.", "Traceback", "EngineDeadError")

    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.engine_client = EngineClient()
    app.state.openai_serving_models, app.state.names = Models(chosen.lora_modules), chosen.served_model_name
    if chosen.middleware:
        module, _, name = chosen.middleware.rpartition(".")
        app.add_middleware(getattr(importlib.import_module(module), name))
    uvicorn.run(app, uds=chosen.uds, port=chosen.port or 8000, log_level="warning")


if __name__ == "__main__":
    main()
