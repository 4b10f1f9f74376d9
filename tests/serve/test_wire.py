"""Valid and invalid bodies of requests."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import numpy as np
import pytest

from inferctl.serve.api import embeddings, inference, schemas
from inferctl.serve.api.embeddings import EmbeddingRequest
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext

CONTEXT = RequestContext.of({"headers": []})


@pytest.mark.parametrize("value", ["a text", ["one", "two"], [1, 2, 3], [[1, 2], [3]]])
def test_all_four_types_of_input_are_accepted(value: object) -> None:
    assert (
        schemas.parse(
            EmbeddingRequest, json.dumps({"input": value, "model": "m", "extra": 1}).encode(), max_inputs=10
        ).input
        == value
    )


@pytest.mark.parametrize(
    ("raw", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b'{"input": "\xff"}', None, "invalid_json"),
        (b'{"input": "\\ud800"}', None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b'"text"', None, "invalid_type"),
        (b"{}", "input", "missing_field"),
        (b'{"input": null}', "input", "invalid_type"),
        (b'{"input": 1}', "input", "invalid_type"),
        (b'{"input": {"text": "a"}}', "input", "invalid_type"),
        (b'{"input": ["a", 1]}', "input", "invalid_type"),
        (b'{"input": [true]}', "input", "invalid_type"),
        (b'{"input": [1.5]}', "input", "invalid_type"),
        (b'{"input": [-1]}', "input", "invalid_token"),
        (b'{"input": [[1], [2147483648]]}', "input", "invalid_token"),
        (b'{"input": [[1], [true]]}', "input", "invalid_type"),
        (b'{"input": [NaN]}', None, "invalid_json"),
        (b'{"input": "a", "user": NaN}', None, "invalid_json"),
        (b'{"input": "a", "truncate": "yes"}', "truncate", "invalid_value"),
        (b'{"input": [[1], "a"]}', "input", "invalid_type"),
        (b'{"input": [99999999999999999999]}', "input", "invalid_token"),
        (b'{"input": [1, 2.5]}', "input", "invalid_type"),
        (b'{"input": [[1], [2, "a"]]}', "input", "invalid_type"),
        (b'{"input": ""}', "input", "empty_input"),
        (b'{"input": []}', "input", "empty_input"),
        (b'{"input": ["a", ""]}', "input", "empty_input"),
        (b'{"input": [[1], []]}', "input", "empty_input"),
        (b'{"input": ["a", "b", "c", "d"]}', "input", "too_many_inputs"),
        (b'{"input": "a", "encoding_format": "hex"}', "encoding_format", "invalid_value"),
        (b'{"input": "a", "dimensions": 0}', "dimensions", "invalid_value"),
        (b'{"input": "a", "dimensions": "8"}', "dimensions", "invalid_value"),
        (b'{"input": "a", "model": 3}', "model", "invalid_value"),
    ],
)
def test_errors_name_the_field(raw: bytes, param: str | None, code: str) -> None:
    with pytest.raises(ApiError) as rejected:
        schemas.parse(EmbeddingRequest, raw, max_inputs=3)
    assert (rejected.value.status, rejected.value.param, rejected.value.code) == (400, param, code)
    envelope = json.loads(rejected.value.body())["error"]
    assert set(envelope) == {"message", "type", "param", "code"}
    assert envelope["type"] == "invalid_request_error"


def test_whole_numbers_in_any_notation_are_token_ids() -> None:
    assert schemas.parse(EmbeddingRequest, b'{"input": [1, 2.0, 3e1]}', max_inputs=3).input == [1, 2, 30]
    assert schemas.parse(EmbeddingRequest, b'{"input": [[1.0], [2]]}', max_inputs=3).input == [[1], [2]]


@pytest.mark.parametrize("value", [b"", b"application/json", b"Application/JSON; charset=utf-8", b"application/a+json"])
def test_json_and_absent_content_types_are_accepted(value: bytes) -> None:
    schemas.check_content_type(value)


def test_base64_is_little_endian_float32_and_equals_the_floats() -> None:
    vectors = np.random.default_rng(1).standard_normal((131, 5)).astype(np.float32)
    floats = json.loads(b"".join(embeddings.response(vectors, "float", "m", 9)))
    encoded = json.loads(b"".join(embeddings.response(vectors, "base64", "m", 9)))
    assert floats["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert [entry["index"] for entry in floats["data"]] == list(range(len(vectors)))
    for row, plain, packed in zip(vectors, floats["data"], encoded["data"], strict=True):
        assert np.frombuffer(base64.b64decode(packed["embedding"]), "<f4").tobytes() == row.tobytes()
        assert np.array(plain["embedding"], dtype=np.float32).tobytes() == row.tobytes()


@pytest.mark.parametrize("shape", [(1, 100_000), (64, 4096), (2048, 384), (2048, 8), (5, 3)])
def test_no_part_of_a_response_has_many_numbers(shape: tuple[int, int]) -> None:
    """Each part stops the event loop: 64 vectors of 4,096 numbers took 6 ms."""
    vectors = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    parts = list(embeddings.response(vectors, "float", "m", 9))
    numbers = max(part.count(b".") for part in parts)
    assert numbers <= max(25_000, shape[1])
    assert len(parts) < 3 + max(shape[0] / 64, 2 * vectors.size / 25_000)
    assert len(json.loads(b"".join(parts))["data"]) == shape[0]


@pytest.mark.parametrize(("sizes", "has_length"), [([10, 20, 30], True), ([300_000] * 3, False), ([700_000], False)])
def test_short_responses_have_a_length_and_long_ones_arrive_in_parts(sizes: list[int], has_length: bool) -> None:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(inference.send_json(send, (bytes([65 + n]) * size for n, size in enumerate(sizes)), CONTEXT))
    start, *bodies = messages
    body = b"".join(message["body"] for message in bodies)
    assert body == b"".join(bytes([65 + n]) * size for n, size in enumerate(sizes))
    assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [False]
    assert dict(start["headers"]).get(b"content-length") == (b"%d" % sum(sizes) if has_length else None)
    assert max(len(message["body"]) for message in bodies) < 700_001


def test_short_parts_that_take_long_let_others_have_their_turn() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(_: Any) -> None:
        pass

    async def run() -> None:
        beside = asyncio.create_task(other())
        await inference.send_json(send, (time.sleep(0.002) or b"a" for _ in range(50)), CONTEXT)
        beside.cancel()

    asyncio.run(run())
    assert turns > 40
