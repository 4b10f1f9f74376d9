"""Computes ranges on a server: bulk requests, as many at a time as it keeps up with.

Any server that `inferctl bench --url` measures will do. Outputs other than dense vectors, roles, scores of pairs and
truncation need inferctl.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx
import numpy as np

from inferctl.bench.load.http_json import ServerAccess
from inferctl.bench.load.target import connect
from inferctl.core.errors import InferctlError, UsageError
from inferctl.embed.computer import Computed, Input, Progress
from inferctl.reading.outputs import FORMS, Form, Output, Outputs, Role, pack
from inferctl.reading.rows import Vectors, join_rows, slices

# A request has about the tokens of one batch. Larger ones would keep the server's event loop from others.
_CHARACTERS_PER_TOKEN, _MAX_CHARACTERS, _MAX_INPUTS = 4, 48 * 1024, 256
_MAX_IN_FLIGHT, _TIMEOUT_S, _CONNECT_S, _MAX_PAUSE_S = 64, 600.0, 10.0, 10.0
# A request that failed so often, while the server responded to others, is divided until its input is found.
_ATTEMPTS = 4
_IDENTITY = ("task", "model", "digest", "precision", "dimensions")
# The row of an input, or the code and the reason why there is none; and its tokens.
_Row: TypeAlias = tuple[Vectors | str, int]


@dataclass
class RemoteComputer:
    """It is a `Computer`. Servers report the tokens of a request, which are divided among its inputs by length.

    `model`: the name of one of several. `patience_s`: how long the server may compute nothing until the run stops.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None
    outputs: tuple[Output, ...] = ("dense",)
    role: Role = None
    prompt: str | None = None
    truncate: bool = False
    patience_s: float = 600.0
    progress: Progress = field(default_factory=Progress, init=False)

    async def start(self) -> dict[str, Any]:
        """Ask the server what it serves. Part of `Computer`."""
        self._client = httpx.AsyncClient(
            headers={**self.headers, "x-priority": "bulk", "content-type": "application/json"},
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None),
        )
        self._places, self._window, self._shortest_s = asyncio.Semaphore(2), 2, math.inf
        self._checking, self._responded = asyncio.Lock(), time.monotonic()
        self._served = await self._describe()
        return self._served

    async def close(self) -> None:
        """Close the connections. Part of `Computer`."""
        await self._client.aclose()

    async def compute(self, inputs: Sequence[Input]) -> Computed:
        """Send requests of inputs with similar lengths, equal ones once. Part of `Computer`."""
        places: dict[Input, list[int]] = {}
        for place, each in enumerate(inputs):
            places.setdefault(each, []).append(place)
        distinct = sorted(places, key=_length, reverse=True)
        found: dict[Input, _Row] = {}

        async def add(part: Sequence[Input]) -> None:
            for each, row in zip(part, await self._rows(part), strict=True):
                found[each] = row
                self.progress.inputs += len(places[each])
                self.progress.tokens += len(places[each]) * row[1]

        sizes = [max(self._characters // self._inputs, _length(each)) for each in distinct]
        try:
            async with asyncio.TaskGroup() as tasks:
                for start, stop in slices(sizes, self._characters) if sizes else ():
                    tasks.create_task(add(distinct[start:stop]))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        ordered = [found[each] for each in inputs]
        rows = [row for row, _ in ordered if not isinstance(row, str)]
        errors = {place: row for place, (row, _) in enumerate(ordered) if isinstance(row, str)}
        tokens = np.array([tokens for _, tokens in ordered], np.int32)
        found_rows = join_rows(rows) if rows else np.empty((0, 0), np.float32)
        return Computed(found_rows, errors, tokens, distinct=len(distinct))

    async def _describe(self) -> dict[str, Any]:
        """Return what identifies the vectors. Raises `InferctlError` if the server does not compute now."""
        access = ServerAccess({**self.headers, "x-priority": "bulk"}, self.model)
        self._server = server = await asyncio.to_thread(connect, self.url, _CONNECT_S, access)
        info, model = server.info, server.info.get("model") or {}
        self._own = "inferctl" in info
        if not self._own and (self.outputs != ("dense",) or self.role or server.task != "embed"):
            raise UsageError(f"{self.url} is not a server of inferctl, so it gets texts for dense vectors only")
        probe: Any = await asyncio.to_thread(server.request, ["ready", "ready"])
        parallel = max(info.get("parallel_batches", 1), info.get("idle_batches", 0))
        self._parallel = parallel * (info.get("engines") or {}).get("count", 1)
        # The names of text-embeddings-inference, which inferctl has too, and its defaults.
        self._inputs = min(_MAX_INPUTS, info.get("max_client_batch_size", 32))
        self._characters = min(_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN * info.get("max_batch_tokens", 2048))
        return {
            "dimensions": np.asarray(probe[0]).size,
            **{name: model.get(name) for name in ("token_dimensions", "vocabulary_size", "labels", "max_tokens")},
            "task": server.task,
            "model": model.get("source", server.model),
            "revision": info.get("model_sha"),
            "digest": model.get("sha256"),
            "precision": (info.get("precision") or {}).get("effective"),
            "outputs": list(self.outputs),
            "normalized": model.get("normalize"),
            "device": info.get("device"),
        }

    async def _check_model(self) -> None:
        """Return when the server computes. Raises `InferctlError` if it has another model then."""
        async with self._checking:
            while True:
                try:
                    served = await self._describe()
                    break
                except InferctlError as error:
                    await self._wait(1.0, error.message)
        if changed := [name for name in _IDENTITY if served[name] != self._served[name]]:
            name = changed[0]
            message = f"{self.url} now has the {name} {served[name]!r} in place of {self._served[name]!r}"
            raise InferctlError(message, "start the server as before, and run the same command again")

    async def _rows(self, inputs: Sequence[Input], failures: int = 0) -> list[_Row]:
        """Return the rows of inputs. They are sent again, or in two parts, as long as that may help."""
        while True:
            status = 0
            try:
                response = await self._send(inputs)
                status, problem = response.status_code, _reason(response)
            except httpx.TransportError as error:
                problem = f"unreachable: {error or type(error).__name__}"
            if status == 200:
                return self._divided(inputs, response)
            if status in (401, 403, 404) or (status == 429 and response.headers.get("x-should-retry") == "false"):
                raise InferctlError(f"{self.url} rejects requests with {status}: {problem}")
            if status in (400, 413, 422) or failures >= _ATTEMPTS:
                break
            if status != 429:
                failures += 1
                await self._wait(2.0**failures / 8, problem)
                await self._check_model()
        if len(inputs) == 1:
            return [(problem, 0)]
        middle, failures = (len(inputs) + 1) // 2, failures and _ATTEMPTS - 1
        rows = await self._rows(inputs[:middle], failures) + await self._rows(inputs[middle:], failures)
        if status in (400, 422) and not any(isinstance(row, str) for row, _ in rows):
            self._inputs = min(self._inputs, middle)  # it was the number of inputs
        return rows

    async def _send(self, inputs: Sequence[Any]) -> httpx.Response:
        """Send a request when it is its turn, and adapt how many may be in flight."""
        server = self._server
        own: dict[str, Any] = {"truncate": self.truncate} if self._own else {}
        url, texts = server.endpoint_url, list(inputs)
        if server.task == "rerank":
            url, own = f"{server.url}/v1/score", own | {"instruction": self.prompt}
            body = {"model": server.model, "text_1": [a for a, _ in texts], "text_2": [b for _, b in texts]}
        elif server.task == "embed" and self._own:
            own |= {"prompt": self.prompt, "input_type": self.role, "outputs": self.outputs}
            body = server.body(texts)
        else:
            body = server.body([f"{self.prompt or ''}{text}" for text in texts])
        change = 0
        await self._places.acquire()
        sent = time.monotonic()
        try:
            response = await self._client.post(url, content=json.dumps(body | own).encode())
            if response.status_code == 429:
                change = -(self._window > 1)
                self._window += change  # before another one decides
                wait = response.headers.get("retry-after", "1")  # or a date
                await self._wait(float(wait) if wait.isdigit() else _MAX_PAUSE_S, _reason(response))
            elif response.status_code == 200:
                # As TCP Vegas: requests wait for as long as they take more time than the fastest one. If there are one
                # to three for each batch that the server runs at a time, it is busy, and more would only wait longer.
                self._responded = time.monotonic()
                seconds = self._responded - sent
                self._shortest_s = min(self._shortest_s, seconds)
                waiting = self._window * (1 - self._shortest_s / seconds) / self._parallel
                change = (waiting < 1 and self._window < _MAX_IN_FLIGHT) - (waiting > 3 and self._window > 1)
                self._window += change
            return response
        finally:
            for _ in range(1 + change):
                self._places.release()

    def _divided(self, inputs: Sequence[Input], response: httpx.Response) -> list[_Row]:
        """Return the rows of a response, and the part of its tokens of each."""
        content = response.json()
        data = content if isinstance(content, list) else sorted(content["data"], key=lambda entry: entry["index"])
        rows = [self._row(entry) for entry in data]
        if len(rows) != len(inputs):
            raise InferctlError(f"{self.url} returned {len(rows)} rows for {len(inputs)} inputs")
        tokens = 0 if isinstance(content, list) else content.get("usage", {}).get("prompt_tokens", 0)
        ends = np.cumsum([_length(each) for each in inputs])
        counts = np.diff((tokens * ends / ends[-1]).round().astype(int), prepend=0)
        return list(zip(rows, counts.tolist(), strict=True))

    def _row(self, entry: Any) -> Vectors:
        if self._server.task != "embed":
            return np.array(entry.get("probs") or [entry["score"]], np.float32)
        if isinstance(entry, list):
            return _numbers(entry)
        outputs = Outputs(_numbers(entry.get("embedding", [])))
        if sparse := entry.get("sparse_embedding"):
            outputs = outputs._replace(ids=np.array(sparse["indices"]), weights=_numbers(sparse["values"]))
        if tokens := entry.get("token_embeddings"):
            outputs = outputs._replace(tokens=np.stack([_numbers(each) for each in tokens]))
        return pack(Form(sum(FORMS[name] for name in self.outputs)), outputs)

    async def _wait(self, seconds: float, problem: str) -> None:
        """Wait before a request is sent again. Raises `InferctlError` if the server computed nothing for too long."""
        if time.monotonic() - self._responded > self.patience_s:
            message = f"{self.url} computed nothing for {self.patience_s:g} s: {problem}"
            raise InferctlError(message, "run the same command again when it does: it continues")
        await asyncio.sleep(min(seconds, _MAX_PAUSE_S))


def _reason(response: httpx.Response) -> str:
    """Return the code and the message of an error response; empty for a successful one."""
    if response.status_code == 200:
        return ""
    try:
        error = response.json()["error"]
        return f"{error.get('code') or response.status_code}: {error['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{response.status_code}: {response.text[:200]}"


def _length(value: Input) -> int:
    return len(value) if isinstance(value, str) else len(value[0]) + len(value[1])


def _numbers(value: str | Sequence[float]) -> Vectors:
    return np.frombuffer(base64.b64decode(value), "<f4") if isinstance(value, str) else np.array(value, np.float32)
