"""Random requests to the four APIs for generation, sent by the official clients, and the usage that vLLM reports."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any

import anthropic
import openai

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WORDS = "the capital of France is Paris and a river flows through it into the sea".split()  # noqa: SIM905
PREFIX = " ".join(WORDS * 12)  # longer than a block of the prefix cache on CPUs: 128 tokens
FUNCTION = {"name": "weather", "description": "Return the weather", "parameters": SCHEMA}
# How each API has a function, and the field that limits an answer.
TOOLS: dict[str, Any] = {
    "chat": {"type": "function", "function": FUNCTION},
    "responses": {"type": "function", "strict": False, **FUNCTION},
    "messages": {"name": "weather", "description": "Return the weather", "input_schema": SCHEMA},
}
LIMITS = {"chat": "max_completion_tokens", "completions": "max_tokens", "responses": "max_output_tokens"}


@dataclass(frozen=True)
class Asked:
    """One request. `leaves`: the number of events, or the tenths of a second without a stream, after which it does."""

    id: str
    api: str
    stream: bool
    body: dict[str, Any]
    leaves: int | None

    @classmethod
    def number(cls, number: int) -> Asked:
        """Return a request that depends on nothing but its number."""
        draw = random.Random(number)
        api, stream = draw.choice(["chat", "completions", "responses", "messages"]), draw.random() < 0.6
        leaves = draw.randrange(1, 8) if draw.random() < 0.25 else None
        most = 1000 if leaves else draw.randrange(1, 13)
        body: dict[str, Any] = {"model": "smollm2", LIMITS.get(api, "max_tokens"): most}
        texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 120))) for _ in range(draw.choice([1, 1, 3]))]
        if draw.random() < 0.5:
            texts[0] = f"{PREFIX} {texts[0]}"
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        extra: dict[str, Any] = {"temperature": 1}
        if leaves and api != "messages":
            extra["ignore_eos"] = True
        if api == "completions":
            body["prompt"] = draw.choice([texts, texts[0], [draw.randrange(5, 4000) for _ in range(9)]])
        else:
            body["input" if api == "responses" else "messages"] = turns
        if api == "messages" and draw.random() < 0.5:
            body["system"] = "Answer in one word."
        if api == "responses" and draw.random() < 0.5:
            body["instructions"] = "Answer in one word."
        if api in ("chat", "completions"):
            extra["n"] = draw.choice([1, 1, 2, 3])
        if api in TOOLS and draw.random() < 0.4:
            body["tools"] = [TOOLS[api]]
        return cls(f"request-{number}", api, stream, {**body, "extra_body": extra}, leaves)


@dataclass
class Seen:
    """What the client of a request saw. `left`: before the end, so the tokens are at least those."""

    prompt: int = 0
    output: int = 0
    cached: int | None = None
    left: bool = False


class Clients:
    """The official clients of one server."""

    def __init__(self, url: str, key: str = "unused") -> None:
        options: dict[str, Any] = {"api_key": key, "max_retries": 0, "timeout": 300}
        self._openai = openai.AsyncOpenAI(base_url=f"{url}/v1", **options)
        self._anthropic = anthropic.AsyncAnthropic(base_url=url, **options)
        self._of = {
            "chat": self._openai.chat.completions,
            "completions": self._openai.completions,
            "responses": self._openai.responses,
            "messages": self._anthropic.messages,
        }

    async def send(self, asked: Asked) -> Seen:
        """Send one request, and return what it used, or what was seen of it."""
        api: Any = self._of[asked.api]
        body = {**asked.body, "extra_headers": {"x-request-id": asked.id}}
        if asked.leaves is None:
            return _seen(await (self._stream(api, asked.api, body) if asked.stream else api.create(**body)), asked)
        if not asked.stream:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(asked.leaves / 10):
                    return _seen(await api.create(**body), asked)
            return Seen(left=True)
        seen = Seen(left=True)
        async with await api.create(stream=True, **body) as events:
            async for number, event in _numbered(events):
                seen.output += bool(getattr(event, "delta", None)) or bool(getattr(event, "choices", None))
                if number == asked.leaves:
                    break
        seen.output = max(0, seen.output - asked.body["extra_body"].get("n", 1))  # the first of each may have no token
        return seen

    async def _stream(self, api: Any, name: str, body: dict[str, Any]) -> Any:
        """Return the whole response with the helper of the client, or the last event where it has none."""
        if name == "messages":
            async with api.stream(**body) as events:
                return await events.get_final_message()
        if name == "responses":
            async with api.stream(**body) as events:
                return [event async for event in events][-1].response
        chunks = [
            chunk async for chunk in await api.create(stream=True, stream_options={"include_usage": True}, **body)
        ]
        return chunks[-1]

    async def run(self, requests: list[Asked], at_once: int) -> list[Seen]:
        """Send requests, `at_once` of them at a time."""
        free = asyncio.Semaphore(at_once)

        async def one(asked: Asked) -> Seen:
            async with free:
                return await self.send(asked)

        async with self._openai, self._anthropic:
            return await asyncio.gather(*map(one, requests))


async def _numbered(events: Any) -> Any:
    number = 0
    async for event in events:
        number += 1
        yield number, event


def _seen(response: Any, asked: Asked) -> Seen:
    usage = response.usage
    if asked.api == "messages":
        cached, created = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        return Seen(usage.input_tokens + cached + created, usage.output_tokens, cached)
    if asked.api == "responses":
        return Seen(usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens)
    # Of several prompts or sequences, vLLM reports the cached tokens of one.
    one = asked.body["extra_body"]["n"] == 1 and not (asked.api == "completions" and len(asked.body["prompt"]) == 3)
    details = usage.prompt_tokens_details
    return Seen(
        usage.prompt_tokens, usage.completion_tokens, ((details and details.cached_tokens) or 0) if one else None
    )
