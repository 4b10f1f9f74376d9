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

    def report(code: str, message: str, param: str | None = None) -> None:
        errors.append({"code": code, "message": message, "param": param, "line": number or None})

    number = 0
    if not path.exists():
        report("file_not_found", "the input file was deleted")
        return 0, errors
    with path.open("rb") as file:
        while (raw := file.readline(_MAX_LINE_BYTES + 1)) and len(errors) < _MAX_ERRORS:
            number += 1
            if len(raw) > _MAX_LINE_BYTES:
                report("invalid_request", f"the line has more than {_MAX_LINE_BYTES:,} bytes")
                break
            if not raw.strip():
                continue
            try:
                line = _Line.model_validate(orjson.loads(raw))
                orjson.dumps(line.body)
            except orjson.JSONDecodeError as error:
                report("invalid_json_line", f"the line is not valid JSON: {error}")
                continue
            except orjson.JSONEncodeError as error:  # it reads deeper JSON than it writes
                report("invalid_request", f"the body cannot be sent: {error}", "body")
                continue
            except ValidationError as error:
                first = error.errors(include_input=False, include_url=False)[0]
                param = ".".join(map(str, first["loc"])) or None
                code = "missing_required_parameter" if first["type"] == "missing" else "invalid_request"
                report(code, f"{param or 'the line'}: {first['msg']}", param)
                continue
            if line.custom_id in seen:
                report("duplicate_custom_id", "another line has the same custom_id", "custom_id")
            elif line.url != endpoint:
                report("url_mismatch", f"url must be that of the batch, {endpoint}", "url")
            elif line.body.get("stream"):
                report("invalid_request", "a request of a batch cannot have a stream", "body.stream")
            seen.add(line.custom_id)
            if len(seen) > _MAX_LINES:
                report("too_many_tasks", f"the file has more than {_MAX_LINES:,} requests")
                break
    if not seen and not errors:
        number = 0
        report("empty_file", "the file has no requests")
    return len(seen), errors


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
