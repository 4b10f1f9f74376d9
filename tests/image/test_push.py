"""Tests pushes with a fake engine on a real socket that returns recorded responses, also of failures."""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.docker import DockerEngine
from inferctl.image.events import LayerPush, Note, PushEvent, Retry
from inferctl.image.push import Pushed, PushFailedError, push, read
from tests.http_servers import Handler, serving_socket

DIGEST = "sha256:" + "a" * 64
GOOD = [
    {"status": "The push refers to repository [localhost:5000/t]"},
    {"status": "Preparing", "progressDetail": {}, "id": "e729a1e34409"},
    {"status": "Preparing", "progressDetail": {}, "id": "0a5cbea82d5c"},
    {"status": "Preparing", "progressDetail": {}, "id": "4e64fa8fcdf0"},
    {"status": "Mounted from base", "progressDetail": {}, "id": "4e64fa8fcdf0"},
    {"status": "Layer already exists", "progressDetail": {}, "id": "e729a1e34409"},
    {"status": "Pushing", "progressDetail": {"current": 512, "total": 2000}, "progress": "[>]", "id": "0a5cbea82d5c"},
    {"status": "Pushed", "progressDetail": {}, "id": "0a5cbea82d5c"},
    {"status": f"x: digest: {DIGEST} size: 947"},
    {"progressDetail": {}, "aux": {"Tag": "x", "Digest": DIGEST, "Size": 947}},
]


def failing(message: str) -> list[dict[str, Any]]:
    return [*GOOD[:2], {"errorDetail": {"message": message}, "error": message}]


class FakeEngine:
    """An engine on a Unix socket. Each push gets the next of `answers`: JSON lines, or None to cut the connection."""

    def __init__(self, folder: Path, answers: list[list[dict[str, Any]] | None]) -> None:
        self.pushes = 0
        self.asked: list[tuple[str, str]] = []
        outer = self

        class Pushes(Handler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, b"OK" if self.path.endswith("_ping") else json.dumps({"ApiVersion": "1.45"}).encode())

            def do_POST(self) -> None:
                answer = answers[min(outer.pushes, len(answers) - 1)]
                outer.pushes += 1
                outer.asked.append((self.path, self.headers["X-Registry-Auth"] or ""))
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for line in answer if answer is not None else GOOD[:3]:
                    data = json.dumps(line).encode() + b"\r\n"
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                if answer is None:
                    self.close_connection = True
                    return
                self.wfile.write(b"0\r\n\r\n")

        self.running, self.url = serving_socket(Pushes, folder / "engine.sock"), ""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as made:

        def make(*answers: list[dict[str, Any]] | None) -> FakeEngine:
            found = FakeEngine(tmp_path, list(answers))
            found.url = made.enter_context(found.running)
            return found

        yield make


def run(engine: FakeEngine, reference: str = "localhost:5000/t:x", attempts: int = 1) -> tuple[list[PushEvent], Pushed]:
    events: list[PushEvent] = []
    going = DockerEngine.connect(engine.url).push(reference, attempts)
    while True:
        try:
            events.append(next(going))
        except StopIteration as end:
            return events, end.value


def test_a_push_returns_the_digest_and_the_status_of_each_layer(fake: Any) -> None:
    events, pushed = run(fake(GOOD))
    assert pushed.digest == DIGEST
    assert pushed.layers == {"e729a1e34409": "exists", "0a5cbea82d5c": "pushed", "4e64fa8fcdf0": "mounted"}
    assert LayerPush("0a5cbea82d5c", "pushing", 512, 2000) in events


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("no basic auth credentials", "docker login registry.example.com"),
        ("denied: requested access to the resource is denied", "docker login registry.example.com"),
        ("unauthorized: authentication required", "docker login registry.example.com"),
        ('failed to do request: Put "https://r": write: no space left on device', "disk space"),
        (
            'Get "https://registry.example.com/v2/": http: server gave HTTP response to HTTPS client',
            "insecure-registries",
        ),
        ("An image does not exist locally with the tag: registry.example.com/t", "inferctl build"),
    ],
)
def test_an_error_line_in_a_200_response_is_a_failure_with_a_hint(fake: Any, message: str, hint: str) -> None:
    engine = fake(failing(message))
    with pytest.raises(NotReadyError) as caught:
        run(engine, "registry.example.com/t:x", attempts=3)
    assert caught.value.exit_code == 3
    assert hint in (caught.value.hint or "")
    assert engine.pushes == 1, "what will not pass is not tried again"


def test_an_unknown_error_line_is_a_failure_too(fake: Any) -> None:
    with pytest.raises(InferctlError, match="manifest invalid") as caught:
        run(fake(failing("manifest invalid: manifest invalid")))
    assert caught.value.exit_code == 1


def test_a_transient_failure_is_retried_with_an_event() -> None:
    answers = iter(
        [failing("received unexpected HTTP status: 503 Service Unavailable"), failing("connection reset by peer"), GOOD]
    )
    slept: list[float] = []
    events: list[PushEvent] = []
    going = push(lambda: next(answers), "localhost:5000/t:x", attempts=4, sleep=slept.append)
    while True:
        try:
            events.append(next(going))
        except StopIteration as end:
            assert end.value.digest == DIGEST
            break
    assert [event.attempt for event in events if isinstance(event, Retry)] == [1, 2]
    assert slept == [1.0, 2.0]


def test_repeated_transient_failures_end_after_the_last_attempt() -> None:
    tried: list[int] = []

    def attempt() -> list[dict[str, Any]]:
        tried.append(1)
        return failing("received unexpected HTTP status: 502 Bad Gateway")

    with pytest.raises(NotReadyError, match="502 Bad Gateway"):
        list(push(attempt, "localhost:5000/t:x", attempts=3, sleep=lambda _: None))
    assert len(tried) == 3


RETRYING = [
    {"status": f"Retrying in {seconds} seconds", "progressDetail": {}, "id": layer}
    for seconds in (5, 4)
    for layer in ("e729a1e34409", "0a5cbea82d5c")
]


@pytest.mark.parametrize(
    ("lines", "attempts"),
    [
        ([*GOOD[:4], *RETRYING, *failing("received unexpected HTTP status: 503 Service Unavailable")[-1:]], 1),
        # The layers have arrived in the end; the engine does not retry the manifest.
        ([*GOOD[:4], *RETRYING, *GOOD[4:8], *failing("received unexpected HTTP status: 503")[-1:]], 3),
    ],
    ids=["layer", "manifest"],
)
def test_what_the_engine_has_retried_is_not_retried_again(lines: list[dict[str, Any]], attempts: int) -> None:
    events: list[PushEvent] = []
    going = push(lambda: lines, "localhost:5000/t:x", attempts=3, sleep=lambda _: None)
    with pytest.raises(NotReadyError, match="503"):
        while True:
            events.append(next(going))
    assert len([event for event in events if isinstance(event, Note)]) == attempts


def test_a_truncated_response_is_not_a_success(fake: Any) -> None:
    with pytest.raises(NotReadyError, match=r"connection broken|without a digest"):
        run(fake(None))


def test_a_truncated_response_is_retried(fake: Any) -> None:
    engine = fake(None, GOOD)
    _, pushed = run(engine, attempts=2)
    assert pushed.digest == DIGEST
    assert engine.pushes == 2


def test_an_error_line_after_the_digest_still_fails() -> None:
    with pytest.raises(PushFailedError, match="late"):
        list(read([*GOOD, {"errorDetail": {"message": "late"}}]))


def test_a_missing_engine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="Docker Engine not found") as caught:
        DockerEngine.connect(f"unix://{tmp_path}/nothing.sock")
    assert "apt-get install docker.io" in (caught.value.hint or "")


def test_an_engine_that_is_down_is_an_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "docker.sock"))
    with pytest.raises(NotReadyError, match="down") as caught:
        DockerEngine.connect(f"unix://{tmp_path}/docker.sock")
    assert "systemctl start docker" in (caught.value.hint or "")


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


@pytest.mark.parametrize(
    ("reference", "full", "user"),
    [
        ("myorg/minilm:x", "docker.io/myorg/minilm", "hub"),
        ("minilm:x", "docker.io/library/minilm", "hub"),
        ("docker.io/library/minilm:x", "docker.io/library/minilm", "hub"),
        ("index.docker.io/myorg/minilm:x", "docker.io/myorg/minilm", "hub"),
        ("registry-1.docker.io/myorg/minilm:x", "docker.io/myorg/minilm", "hub"),
        ("localhost/minilm:x", "localhost/minilm", None),
        ("host:5000/minilm:x", "host:5000/minilm", "own"),
        ("registry.example.com/myorg/minilm:x", "registry.example.com/myorg/minilm", "example"),
    ],
)
def test_each_form_of_a_name_uses_the_login_of_its_registry(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, full: str, user: str | None
) -> None:
    # Configuration after `docker login`, `docker login host:5000` and `docker login registry.example.com`.
    hosts = {"https://index.docker.io/v1/": "hub", "host:5000": "own", "registry.example.com": "example"}
    auths = {host: {"auth": base64.b64encode(f"{name}:secret".encode()).decode()} for host, name in hosts.items()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    engine = fake(GOOD)
    assert run(engine, reference)[1].digest == DIGEST
    ((path, login),) = engine.asked
    assert path.endswith(f"/images/{full}/push?tag=x")
    found = json.loads(base64.urlsafe_b64decode(login)) if login else {}
    assert found.get("username") == user
