"""Ranges that a server computes: one of inferctl, and one that only has OpenAI's API and fails in many ways."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from inferctl.core.errors import InferctlError
from inferctl.embed.computer import Computed
from inferctl.embed.remote import RemoteComputer
from tests.http_servers import Handler, serving
from tests.processes import ServerProcess

# What a server does with the inputs of a request, the number of earlier requests with the same ones: a status, 0 to
# close the connection, and headers.
Fault = Callable[[list[str], int], tuple[int, dict[str, str]]]
TEXTS = [f"{'word ' * (i % 7)}{i}" for i in range(90)]


async def compute(computer: RemoteComputer, inputs: list[str]) -> Computed:
    try:
        await computer.start()
        return await computer.compute(inputs)
    finally:
        await computer.close()


async def test_rows_errors_and_tokens_are_those_of_the_server(echo: ServerProcess) -> None:
    before = echo.metric("inferctl_request_duration_seconds_count", priority="bulk")
    inputs = [*TEXTS, "a \ud800 b", "", "long " * 5000, *TEXTS[:20]]
    computer = RemoteComputer(echo.url)
    found = await compute(computer, inputs)
    expected = echo.embed(input=TEXTS).json()
    rows = np.array([row["embedding"] for row in expected["data"]], np.float32)
    np.testing.assert_array_equal(found.rows, np.concatenate([rows, rows[:20]]))
    assert {place: text.partition(":")[0] for place, text in found.errors.items()} == {
        90: "invalid_json",
        91: "empty_input",
        92: "context_length_exceeded",
    }
    assert (found.tokens[:90].sum(), found.distinct) == (expected["usage"]["prompt_tokens"], 93)
    assert (computer.progress.inputs, computer.progress.tokens) == (len(inputs), found.tokens.sum())
    assert echo.metric("inferctl_request_duration_seconds_count", priority="bulk") > before


@contextmanager
def foreign(fault: Fault, model: list[str]) -> Iterator[str]:
    """Serve vectors with the length of each text. Yields the URL."""
    seen = Counter[str]()

    class Server(Handler):
        def do_GET(self) -> None:
            body = json.dumps({"data": [{"id": model[-1]}]}).encode()
            self.reply(200 if self.path == "/v1/models" else 404, body)

        def do_POST(self) -> None:
            texts: list[str] = json.loads(self.body())["input"]
            status, headers = (200, {}) if texts[0] == "ready" else fault(texts, seen[texts[0]])
            seen[texts[0]] += 1
            data: list[Any] = [{"index": i, "embedding": [len(text)]} for i, text in enumerate(texts)]
            if status:
                body = json.dumps({"data": data, "error": {"message": "injected"}}).encode()
                self.reply(status, body, **headers)
            self.close_connection = not status

    with serving(Server) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (lambda texts, earlier: (429 if earlier < 3 else 200, {"retry_after": "0"}), []),
        (lambda texts, earlier: (503 if earlier < 2 else 200, {}), []),
        (lambda texts, earlier: (0 if earlier < 1 else 200, {}), []),
        (lambda texts, earlier: (422 if len(texts) > 5 else 200, {}), []),
        (lambda texts, earlier: (413 if sum(map(len, texts)) > 90 else 200, {}), []),
        (lambda texts, earlier: (500 if TEXTS[33] in texts else 200, {}), [33]),
        (lambda texts, earlier: (400 if {TEXTS[3], TEXTS[80]} & {*texts} else 200, {}), [3, 80]),
    ],
    ids=["at capacity", "away", "disconnects", "few inputs", "small bodies", "a poison input", "two bad inputs"],
)
async def test_every_input_gets_its_row_or_its_error_whatever_fails(
    fault: Fault, failing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferctl.embed.remote._MAX_PAUSE_S", 0.01)
    with foreign(fault, ["m"]) as url:
        found = await compute(RemoteComputer(url), TEXTS)
    assert list(found.errors) == failing
    assert all(reason.endswith("injected") for reason in found.errors.values())
    assert found.rows[:, 0].tolist() == [len(text) for i, text in enumerate(TEXTS) if i not in failing]


@pytest.mark.parametrize(
    ("status", "headers", "models", "part"),
    [
        (401, {}, ["m"], "401"),
        (429, {"x_should_retry": "false"}, ["m"], "429"),
        (503, {}, ["m"], "computed nothing"),
        (500, {}, ["m", "another"], "another"),
    ],
)
async def test_what_no_retry_changes_stops_the_run(
    status: int, headers: dict[str, str], models: list[str], part: str
) -> None:
    served = models[:1]

    def fault(_: list[str], __: int) -> tuple[int, dict[str, str]]:
        served.append(models[-1])
        return status, headers

    with foreign(fault, served) as url, pytest.raises(InferctlError, match=part):
        await compute(RemoteComputer(url, patience_s=-1 if status == 503 else 60), TEXTS)
