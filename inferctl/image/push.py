"""Retries pushes of a builder, and pushes through the Docker Engine for builders that cannot push compressed layers."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from inferctl.core.errors import InferctlError
from inferctl.image import buildx, failures
from inferctl.image.events import Note, Retry

Step = TypeVar("Step")
Result = TypeVar("Result")
_FIRST_DELAY = 1.0
# What the docker command says of a layer at its end, or while it uploads it again.
_SHOWN = re.compile(r": (?:Pushed|Layer already exists|Mounted from .*|Retrying in \d+ seconds?)$")


class PushFailedError(Exception):
    """A push attempt failed. The text is from the builder."""


def retrying(
    attempt: Callable[[], Generator[Step, None, Result]],
    reference: str,
    attempts: int,
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[Step | Retry, None, Result]:
    """Run `attempt` until it succeeds, and retry after a transient `PushFailedError` with delays of 1, 2, 4, ... s.

    Raises `failures.push_error` of the last failure.
    """
    for number in range(1, attempts + 1):
        try:
            return (yield from attempt())
        except PushFailedError as error:
            message = str(error)
            if number == attempts or not failures.transient(message):
                raise failures.push_error(message, reference) from None
            delay = _FIRST_DELAY * 2 ** (number - 1)
            yield Retry(number, attempts, delay, message)
            sleep(delay)
    raise InferctlError(f"pushing {reference} failed: 0 attempts", "allow at least one attempt")


def push(reference: str) -> Generator[Note, None, str]:
    """Push an image of the Docker Engine with the docker command, and return its digest in the registry.

    The command has the logins, and the engine uploads a layer again for up to 50 s. Raises `failures.push_error`.
    """
    with buildx.child(["docker", "push", reference], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line.rstrip())
            if _SHOWN.search(lines[-1]):
                yield Note(lines[-1])
        code = running.wait()
    text = "\n".join(lines)
    digest = re.search(r"digest: (sha256:[0-9a-f]{64})", text)
    if code or digest is None:
        raise failures.push_error(failures.last_line(text) or f"exit code {code}", reference)
    return digest[1]
