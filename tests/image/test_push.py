"""Tests retries of a push, and the errors of an engine that cannot be reached."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.docker import DockerEngine
from inferctl.image.events import Retry
from inferctl.image.push import PushFailedError, retrying


@pytest.mark.parametrize(
    ("messages", "slept", "error", "hint"),
    [
        (["unexpected status: 503 Service Unavailable", "connection reset by peer"], [1.0, 2.0], None, ""),
        (["unexpected status: 502 Bad Gateway"] * 3, [1.0, 2.0], NotReadyError, "is up, reachable"),
        (["no basic auth credentials"], [], NotReadyError, "docker login registry.example.com"),
        (["denied: requested access to the resource is denied"], [], NotReadyError, "docker login"),
        (["http: server gave HTTP response to HTTPS client"], [], NotReadyError, "insecure-registries"),
        (["write: no space left on device"], [], NotReadyError, "disk space"),
        (["manifest invalid: manifest invalid"], [], InferctlError, "docker push"),
    ],
)
def test_only_transient_failures_are_retried(
    messages: list[str], slept: list[float], error: type[InferctlError] | None, hint: str
) -> None:
    failing, pauses, retries = iter(messages), list[float](), list[Retry]()

    def attempt() -> Generator[Retry, None, str]:
        yield from ()
        if message := next(failing, None):
            raise PushFailedError(message)
        return "sha256:0"

    going = retrying(attempt, "registry.example.com/t:x", 3, pauses.append)
    try:
        while True:
            retries.append(next(going))
    except StopIteration as end:
        assert (error, end.value) == (None, "sha256:0")
    except InferctlError as failed:
        assert type(failed) is error
        assert messages[-1] in failed.message and hint in (failed.hint or "")
    assert pauses == [retry.delay for retry in retries] == slept


def test_an_engine_that_is_missing_or_down_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "docker.sock"))
    for name, message, hint in (
        ("nothing.sock", "Docker Engine not found", "apt-get install docker.io"),
        ("docker.sock", "down", "systemctl start docker"),
    ):
        with pytest.raises(NotReadyError, match=message) as caught:
            DockerEngine.connect(f"unix://{tmp_path}/{name}")
        assert hint in (caught.value.hint or "")


def test_an_engine_without_permission_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        place.chmod(0)
        user = os.geteuid()
        if user == 0:
            # Root ignores file permissions.
            os.seteuid(65534)
        try:
            with pytest.raises(NotReadyError, match="permission denied") as caught:
                DockerEngine.connect(f"unix://{place}")
        finally:
            os.seteuid(user)
    assert "usermod -aG docker" in (caught.value.hint or "")
