"""Ranges that a server computes: a real one, and one that fails in many ways."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from inferctl.bench.load.target import connect
from inferctl.core.errors import InferctlError
from inferctl.embed import computer
from inferctl.embed.computer import Computed, Progress
from inferctl.embed.remote import RemoteComputer
from tests.http_servers import Handler, serving
from tests.processes import ServerProcess

# What a server does with the inputs of a request, the number of earlier requests with the same ones: a status, 0 to
# close the connection, and headers.
Fault = Callable[[list[str], int], tuple[int, dict[str, str]]]
TEXTS = [f"{'word ' * (i % 7)}{i}" for i in range(90)]


async def compute(url: str, inputs: list[str], progress: Progress | None = None, patience_s: float = 60) -> Computed:
    remote = RemoteComputer(connect(url), patience_s=patience_s)
    try:
        await remote.start()
        return await computer.compute(remote, inputs, progress or Progress())
    finally:
        await remote.close()


async def test_rows_errors_and_tokens_are_those_of_the_server(echo: ServerProcess) -> None:
    before = echo.metric("inferctl_request_duration_seconds_count", priority="bulk")
    inputs, progress = [*TEXTS, "a \ud800 b", "", "long " * 5000, *TEXTS[:20]], Progress()
    found = await compute(echo.url, inputs, progress)
    expected = echo.embed(input=TEXTS).json()
    rows = np.array([row["embedding"] for row in expected["data"]], np.float32)
    np.testing.assert_array_equal(found.rows, np.concatenate([rows, rows[:20]]))
    assert {place: text.partition(":")[0] for place, text in found.errors.items()} == {
        90: "invalid_json",
        91: "empty_input",
        92: "context_length_exceeded",
    }
    assert (found.tokens[:90].sum(), found.distinct) == (expected["usage"]["prompt_tokens"], 90)
    assert (progress.rows, progress.tokens) == (len(inputs), found.tokens.sum())
    assert echo.metric("inferctl_request_duration_seconds_count", priority="bulk") > before


@contextmanager
def failing_server(fault: Fault, digests: list[str]) -> Iterator[str]:
    """Serve vectors with the length of each text, of a model with the last of these digests. Yields the URL."""
    seen = Counter[str]()

    class Server(Handler):
        def do_GET(self) -> None:
            info = {"name": "m", "inferctl": "1", "model": {"dimensions": 1, "sha256": digests[-1]}, "device": None}
            info |= {"parallel_batches": 1, "idle_batches": 0, "engines": {"count": 1}}
            self.reply(body=json.dumps(info | {"limits": {"max_batch_tokens": 100}}).encode())

        def do_POST(self) -> None:
            texts: list[str] = json.loads(self.body())["input"]
            status, headers = fault(texts, seen[texts[0]])
            seen[texts[0]] += 1
            rows = [base64.b64encode(np.array([len(text)], "<f4")).decode() for text in texts]
            body = {"data": [{"embedding": row} for row in rows], "usage": {"prompt_tokens": len(texts)}}
            if status:
                error = {"code": "c", "message": "injected"}
                self.reply(status, json.dumps(body | {"error": error}).encode(), **headers)
            self.close_connection = not status

    with serving(Server) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (lambda texts, earlier: (429 if earlier < 3 else 200, {"retry_after": "0"}), []),
        (lambda texts, earlier: (503 if earlier < 2 else 200, {}), []),
        (lambda texts, earlier: (0 if earlier < 1 else 200, {}), []),
        (lambda texts, earlier: (413 if sum(map(len, texts)) > 90 else 200, {}), []),
        (lambda texts, earlier: (500 if TEXTS[33] in texts else 200, {}), [33]),
        (lambda texts, earlier: (400 if {TEXTS[3], TEXTS[80]} & {*texts} else 200, {}), [3, 80]),
    ],
    ids=["at capacity", "away", "disconnects", "small bodies", "a poison input", "two bad inputs"],
)
async def test_every_input_gets_its_row_or_its_error_whatever_fails(
    fault: Fault, failing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferctl.embed.remote._MAX_PAUSE_S", 0.01)
    with failing_server(fault, ["m"]) as url:
        found = await compute(url, TEXTS)
    assert list(found.errors) == failing
    assert all(reason.endswith("injected") for reason in found.errors.values())
    assert found.rows[:, 0].tolist() == [len(text) for i, text in enumerate(TEXTS) if i not in failing]


@pytest.mark.parametrize(
    ("status", "headers", "digests", "part"),
    [
        (401, {}, ["m"], "401"),
        (429, {"x_should_retry": "false"}, ["m"], "429"),
        (503, {}, ["m"], "computed nothing"),
        (500, {}, ["m", "another"], "another"),
    ],
)
async def test_what_no_retry_changes_stops_the_run(
    status: int, headers: dict[str, str], digests: list[str], part: str
) -> None:
    served = digests[:1]

    def fault(_: list[str], __: int) -> tuple[int, dict[str, str]]:
        served.append(digests[-1])
        return status, headers

    with failing_server(fault, served) as url, pytest.raises(InferctlError, match=part):
        await compute(url, TEXTS, patience_s=-1 if status == 503 else 60)
