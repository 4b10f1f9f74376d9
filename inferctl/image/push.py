"""Pushes an image through the Docker Engine.

Every line of the response is read, because the engine reports a failure as a line in a response with status 200
(docker-py #3161, #3277).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from inferctl.core.errors import InferctlError
from inferctl.image import failures
from inferctl.image.events import LayerPush, LayerStatus, Note, PushEvent, Retry
from inferctl.image.records import ATTEMPTS

Step = TypeVar("Step")
Result = TypeVar("Result")
_FIRST_DELAY = 1.0
_STATUS: dict[str, LayerStatus] = {
    "Preparing": "waiting",
    "Waiting": "waiting",
    "Pushing": "pushing",
    "Pushed": "pushed",
    "Layer already exists": "exists",
}
_DONE = ("pushed", "exists", "mounted")


@dataclass(frozen=True)
class Pushed:
    """A completed push: the digest in the registry, and the status of each layer by short diff id."""

    digest: str
    layers: Mapping[str, LayerStatus]

    @property
    def sent(self) -> set[str]:
        """Short diff ids of the layers that were sent."""
        return {layer for layer, status in self.layers.items() if status == "pushed"}


class PushFailedError(Exception):
    """A push attempt failed. The text is from the engine. `retried`: whether it has retried the upload itself."""

    def __init__(self, message: str, *, retried: bool = False) -> None:
        super().__init__(message)
        self.retried = retried


def retrying(
    attempt: Callable[[], Generator[Step, None, Result]],
    reference: str,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[Step | Retry, None, Result]:
    """Run `attempt` until it succeeds, and retry after a transient `PushFailedError` with delays of 1, 2, 4, ... s.

    A failure that the engine has retried is the last one: its retries of a layer take 50 s.
    Raises `failures.push_error` of the last failure.
    """
    for number in range(1, attempts + 1):
        try:
            return (yield from attempt())
        except PushFailedError as error:
            message = str(error)
            if number == attempts or error.retried or not failures.transient(message):
                raise failures.push_error(message, reference) from None
            delay = _FIRST_DELAY * 2 ** (number - 1)
            yield Retry(number, attempts, delay, message)
            sleep(delay)
    raise InferctlError(f"pushing {reference} failed: 0 attempts", "allow at least one attempt")


def push(
    open_stream: Callable[[], Iterable[Mapping[str, Any]]],
    reference: str,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[PushEvent, None, Pushed]:
    """Push with retries. `open_stream` starts one attempt and returns its lines."""
    return (yield from retrying(lambda: read(open_stream()), reference, attempts, sleep))


def read(lines: Iterable[Mapping[str, Any]]) -> Generator[LayerPush | Note, None, Pushed]:
    """Read the lines of one attempt. Raises `PushFailedError` for an error line or a response without a digest."""
    layers: dict[str, LayerStatus] = {}
    retried: set[str] = set()
    digest: str | None = None
    for line in lines:
        if problem := line.get("error") or line.get("errorDetail"):
            raise PushFailedError(
                str(problem.get("message", problem)) if isinstance(problem, Mapping) else str(problem),
                retried=any(layers.get(layer) not in _DONE for layer in retried),
            )
        digest = _digest(line) or digest
        if str(line.get("status", "")).startswith("Retrying in "):
            if not retried:
                yield Note("the upload of a layer failed: the engine retries it for up to 50 s")
            retried.add(str(line.get("id")))
        for event in _layer(line):
            layers[event.id] = event.status
            yield event
    if digest is None:
        raise PushFailedError("the engine's response ended without a digest")
    return Pushed(digest, layers)


def _layer(line: Mapping[str, Any]) -> Iterator[LayerPush]:
    identity, status = line.get("id"), str(line.get("status", ""))
    if not identity:
        return
    kind = "mounted" if status.startswith("Mounted from") else _STATUS.get(status)
    if kind is None:
        return
    detail = line.get("progressDetail") or {}
    yield LayerPush(str(identity), kind, int(detail.get("current") or 0), int(detail.get("total") or 0))


def _digest(line: Mapping[str, Any]) -> str | None:
    aux = line.get("aux")
    if isinstance(aux, Mapping) and aux.get("Digest"):
        return str(aux["Digest"])
    found = re.search(r"digest: (sha256:[0-9a-f]{64})", str(line.get("status", "")))
    return found.group(1) if found else None
