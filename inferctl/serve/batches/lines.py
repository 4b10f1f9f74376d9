"""The lines of batches: checks of an input file, and what output and error files have of each line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, StrictStr, ValidationError

_MAX_LINES = 50_000  # as OpenAI has it
_MAX_LINE_BYTES = 4 * 1024 * 1024  # as the body of a request
_MAX_ERRORS = 100
_NUMBER = re.compile(rb'\{"id":"batch_req_[0-9a-f]+_([0-9]+)"')


class _Line(BaseModel):
    custom_id: Annotated[StrictStr, Field(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: StrictStr
    body: dict[str, Any]


def check(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """Return how many requests a file has, and its first errors, with the codes of OpenAI."""
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    if not path.exists():
        return 0, [_error("file_not_found", "the input file was deleted")]
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), 1):
            if raw.strip() and (error := _check_line(raw, endpoint, seen)):
                errors.append(error | {"line": number})
            if len(errors) == _MAX_ERRORS or len(raw) > _MAX_LINE_BYTES or len(seen) > _MAX_LINES:
                break
    return len(seen), errors if seen or errors else [_error("empty_file", "the file has no requests")]


def _check_line(raw: bytes, endpoint: str, seen: set[str]) -> dict[str, Any] | None:
    """Return the error of a line, and add its id to those that were `seen`."""
    if len(raw) > _MAX_LINE_BYTES:
        return _error("invalid_request", f"the line has more than {_MAX_LINE_BYTES:,} bytes")
    try:
        line = _Line.model_validate(orjson.loads(raw))
        orjson.dumps(line.body)  # it reads deeper JSON than it writes
    except (orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        return _error("invalid_json_line", f"the line is not valid JSON: {error}")
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_request"
        return _error(code, f"{param or 'the line'}: {first['msg']}", param)
    if line.custom_id in seen:
        return _error("duplicate_custom_id", "another line has the same custom_id", "custom_id")
    seen.add(line.custom_id)
    if len(seen) > _MAX_LINES:
        return _error("too_many_tasks", f"the file has more than {_MAX_LINES:,} requests")
    if line.url != endpoint:
        return _error("url_mismatch", f"url must be that of the batch, {endpoint}", "url")
    if line.body.get("stream"):
        return _error("invalid_request", "a request of a batch cannot have a stream", "body.stream")
    return None


def _error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": None}


def pending(path: Path, done: set[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the numbers and texts of the requests of a checked file that are not `done`."""
    with path.open("rb") as file:
        yield from ((number, raw) for number, raw in enumerate(file, 1) if raw.strip() and number not in done)


def output(request_id: str, raw: bytes, response: bytes = b"null", error: bytes = b"null") -> bytes:
    """Return what an output or error file has of a request. `response`, `error`: JSON, which is not read again."""
    custom_id = orjson.dumps(orjson.loads(raw)["custom_id"])
    values = request_id.encode(), custom_id, response, error
    return b'{"id":"%s","custom_id":%s,"response":%s,"error":%s}\n' % values


def request_id(batch_id: str, number: int) -> str:
    """Return the id of the request of a line."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def finished(path: Path) -> set[int]:
    """Return the numbers of the lines that an output or error file has. Cuts off one without its end."""
    numbers, size = set[int](), 0
    path.touch(0o600)
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not (found := _NUMBER.match(line)):
                break
            numbers.add(int(found[1]))
            size += len(line)
    os.truncate(path, size)
    return numbers
