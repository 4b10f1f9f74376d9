"""Computes ranges on a server of inferctl: bulk requests for dense vectors, as many at a time as it keeps up with."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpx
import numpy as np

from inferctl.bench.load.http_json import get
from inferctl.bench.load.target import ServerConnection, connect
from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.embed.computer import Input, Report, Result
from inferctl.reading.outputs import Role
from inferctl.reading.rows import slices
from inferctl.reading.space import HEADER

# A request has about the tokens of one batch. Larger ones would keep the server's event loop from others.
_CHARACTERS_PER_TOKEN, _MAX_CHARACTERS, _MAX_INPUTS = 4, 48 * 1024, 256
_MAX_IN_FLIGHT, _TIMEOUT_S, _CONNECT_S, _MAX_PAUSE_S = 64, 600.0, 10.0, 10.0
# A request that failed so often, while the server responded to others, is divided until its input is found.
_ATTEMPTS = 4


@dataclass
class RemoteComputer:
    """It is a `Computer`. Servers report the tokens of a request, which are divided among its inputs by length.

    `patience_s`: how long the server may compute nothing until the run stops.
    """

    server: ServerConnection
    role: Role = None
    prompt: str | None = None
    truncate: bool = False
    patience_s: float = 600.0

    async def start(self) -> dict[str, Any]:
        """Return what the server says of itself. Part of `Computer`."""
        headers = {**self.server.access.headers, "x-priority": "bulk", "content-type": "application/json"}
        timeout, limits = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S), httpx.Limits(max_connections=None)
        # A server with another model, for example one of several behind an address, responds with 412.
        if spaces := _identity(self.server)["spaces"]:
            headers[HEADER] = spaces["dense"]["name"]
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._places, self._window, self._shortest_s = asyncio.Semaphore(2), 2, math.inf
        self._checking, self._responded = asyncio.Lock(), time.monotonic()
        info = self.server.info
        self._parallel = max(info["parallel_batches"], info["idle_batches"]) * info["engines"]["count"]
        self._characters = min(_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN * info["limits"]["max_batch_tokens"])
        return {**_identity(self.server), "device": info["device"]}

    async def close(self) -> None:
        """Close the connections. Part of `Computer`."""
        await self._client.aclose()

    async def compute(self, inputs: Sequence[Input], report: Report) -> None:
        """Send requests of inputs with similar lengths. Part of `Computer`."""
        order = sorted(range(len(inputs)), key=lambda number: -len(inputs[number]))

        async def add(numbers: Sequence[int]) -> None:
            found = await self._results([cast("str", inputs[number]) for number in numbers])
            report(zip(numbers, found, strict=True), 0.0)

        sizes = [max(self._characters // _MAX_INPUTS, len(inputs[number])) for number in order]
        try:
            async with asyncio.TaskGroup() as tasks:
                for start, stop in slices(sizes, self._characters):
                    tasks.create_task(add(order[start:stop]))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _check_model(self) -> None:
        """Return when the server computes. Raises `InferctlError` if it has another model then."""
        url, access = self.server.url, self.server.access
        async with self._checking:
            while True:
                try:
                    await asyncio.to_thread(get, f"{url}/readyz", _CONNECT_S, access)
                    now = _identity(await asyncio.to_thread(connect, url, _CONNECT_S, access))
                    break
                except NotReadyError as error:
                    await self._wait(1.0, error.message)
        for name, value in _identity(self.server).items():
            if now[name] != value:
                message = f"{url} now has the {name} {now[name]!r} in place of {value!r}"
                raise InferctlError(message, "start the server as before, and run the same command again")

    async def _results(self, inputs: list[str], failures: int = 0) -> list[Result]:
        """Return the results of inputs. They are sent again, or in two parts, as long as that may help."""
        while True:
            status = 0
            try:
                response = await self._send(inputs)
                status, problem = response.status_code, _reason(response)
            except httpx.TransportError as error:
                problem = f"unreachable: {error or type(error).__name__}"
            if status == 200:
                return _divided(inputs, response.json())
            if status in (401, 403, 404, 412) or (status == 429 and response.headers.get("x-should-retry") == "false"):
                raise InferctlError(f"{self.server.url} rejects requests with {status}: {problem}")
            if status in (400, 413, 422) or failures >= _ATTEMPTS:
                break
            if status != 429:
                failures += 1
                await self._wait(2.0**failures / 8, problem)
                await self._check_model()
        if len(inputs) == 1:
            return [(problem, 0)]
        middle, failures = (len(inputs) + 1) // 2, failures and _ATTEMPTS - 1
        return await self._results(inputs[:middle], failures) + await self._results(inputs[middle:], failures)

    async def _send(self, inputs: list[str]) -> httpx.Response:
        """Send a request when it is its turn, and adapt how many may be in flight."""
        own = {"truncate": self.truncate, "prompt": self.prompt, "input_type": self.role}
        content = json.dumps(self.server.body(inputs) | own).encode()
        change = 0
        await self._places.acquire()
        sent = time.monotonic()
        try:
            response = await self._client.post(self.server.endpoint_url, content=content)
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

    async def _wait(self, seconds: float, problem: str) -> None:
        """Wait before a request is sent again. Raises `InferctlError` if the server computed nothing for too long."""
        if time.monotonic() - self._responded > self.patience_s:
            message = f"{self.server.url} computed nothing for {self.patience_s:g} s: {problem}"
            raise InferctlError(message, "run the same command again when it does: it continues")
        await asyncio.sleep(min(seconds, _MAX_PAUSE_S))


def _identity(server: ServerConnection) -> dict[str, Any]:
    """Return what identifies the vectors of a server."""
    model = server.info.get("model", {})
    same = ("dimensions", "token_dimensions", "vocabulary_size", "max_tokens")
    return {
        **{name: model.get(name) for name in same},
        "task": server.task,
        "model": model.get("source"),
        "revision": server.info.get("model_sha"),
        "digest": model.get("sha256"),
        "precision": server.info.get("precision", {}).get("effective"),
        "outputs": ["dense"],
        "spaces": {name: each for name, each in model.get("spaces", {}).items() if name == "dense"},
        "normalized": model.get("normalize"),
    }


def _divided(inputs: Sequence[str], content: Any) -> list[Result]:
    """Return the rows of a response, and the part of its tokens of each."""
    rows = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in content["data"]]
    ends = np.cumsum([len(each) for each in inputs])
    counts = np.diff((content["usage"]["prompt_tokens"] * ends / ends[-1]).round().astype(int), prepend=0)
    return list(zip(rows, counts.tolist(), strict=True))


def _reason(response: httpx.Response) -> str:
    """Return the code and the message of an error response; empty for a successful one."""
    if response.status_code == 200:
        return ""
    try:
        error = response.json()["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):  # of a proxy
        return f"{response.status_code}: {response.text[:200]}"
