"""Tests facts of Docker Engines and their errors, with recorded responses and a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.docker import Container, DockerEngine
from inferctl.image.records import ContainerOptions, read_engine
from tests.http_servers import Handler, serving_socket

VERSION = {"Version": "28.3.0", "ApiVersion": "1.51", "Os": "linux", "Arch": "amd64"}
# Response of Docker 28.3 on a machine with a CDI file for its GPU and without the NVIDIA runtime.
CDI = {
    "Driver": "overlay2",
    "DriverStatus": [["Backing Filesystem", "extfs"]],
    "Runtimes": {"io.containerd.runc.v2": {"path": "runc"}, "runc": {"path": "runc"}},
    "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"],
    "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "cdi", "ID": "nvidia.com/gpu=all"}],
    "MemTotal": 16000000000,
    "NCPU": 8,
}


FOLDERS = {"CDISpecDirs": ["/etc/cdi", "/etc/nvidia/cdi"]}


@pytest.mark.parametrize(
    ("info", "gpu"),
    [
        (CDI, True),
        ({"Runtimes": {"nvidia": {}, "runc": {}}}, True),
        # Folders for device specifications are no GPU.
        ({**CDI, **FOLDERS, "DiscoveredDevices": None}, False),
        ({**CDI, **FOLDERS, "DiscoveredDevices": [{"Source": "cdi", "ID": "vendor.com/nic=0"}]}, False),
    ],
)
def test_a_gpu_is_found_by_its_runtime_or_device_specification(info: dict[str, Any], gpu: bool) -> None:
    assert read_engine(info, VERSION).gpu == gpu


class FakeEngine:
    """An engine on a Unix socket. `answers`: end of a path -> JSON or a status. `posted`: the last posted body."""

    def __init__(self, folder: Path, answers: dict[str, Any]) -> None:
        self.posted: dict[str, Any] = {}
        known = {"_ping": "OK", "version": VERSION, **answers}
        outer = self

        class Answers(Handler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                found = next((answer for end, answer in known.items() if path.endswith(end)), 404)
                status = found if isinstance(found, int) else 200
                body = json.dumps({"message": "the daemon is unwell"} if isinstance(found, int) else found).encode()
                self.reply(status, body, content_type="application/json")

            def do_POST(self) -> None:
                outer.posted = json.loads(self.body() or b"{}")
                self.do_GET()

        self._running = ExitStack()
        self.url = self._running.enter_context(serving_socket(Answers, folder / "engine.sock"))

    def die(self) -> None:
        """Close the socket, so that connections are refused as after a crash."""
        self._running.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as made:

        def make(**answers: Any) -> tuple[FakeEngine, DockerEngine]:
            one = FakeEngine(tmp_path, answers)
            made.callback(one.die)
            return one, DockerEngine.connect(one.url)

        yield make


ASKED: dict[str, Callable[[DockerEngine], object]] = {
    "info": lambda engine: engine.info(),
    "image": lambda engine: engine.image("a:b"),
    "history": lambda engine: engine.size("a:b"),
    "tag": lambda engine: engine.tag("sha256:0", "a:b"),
    "start": lambda engine: engine.start("a:b", ContainerOptions()),
    "state": lambda engine: Container(engine._api, "c").state(),
    "log": lambda engine: Container(engine._api, "c").log(),
    "follow": lambda engine: list(Container(engine._api, "c").follow()),
    "wait": lambda engine: Container(engine._api, "c").wait(60),
    "remove": lambda engine: Container(engine._api, "c").remove(),
}


@pytest.mark.parametrize("what", ASKED)
def test_an_engine_that_crashes_is_reported_as_down(fake: Any, what: str) -> None:
    server, engine = fake()
    server.die()
    with pytest.raises(NotReadyError, match="is down: connection refused"):
        ASKED[what](engine)


@pytest.mark.parametrize("what", ["history", "image", "state", "wait"])
def test_the_error_of_an_engine_is_in_the_message(fake: Any, what: str) -> None:
    _, engine = fake(history=500, json=500, wait=500)
    with pytest.raises(NotReadyError, match="the daemon is unwell") as caught:
        ASKED[what](engine)
    assert caught.value.hint


def test_cleanup_does_not_hide_the_first_error(fake: Any) -> None:
    server, engine = fake()
    server.die()
    engine.discard("sha256:0")
    engine.untag("a:b")
    with pytest.raises(InferctlError, match="the first"), Container(engine._api, "c"):
        raise InferctlError("the first", "")


def test_waiting_for_a_running_container_returns_none(tmp_path: Path) -> None:
    """Engines send the response header at once and the exit code at the end."""
    over = threading.Event()

    class Waiting(Handler):
        def do_GET(self) -> None:
            if self.path.endswith(("_ping", "version")):
                self.reply(200, json.dumps(VERSION).encode(), content_type="application/json")
                return
            self.reply(200, content_type="application/json", content_length="20")
            self.wfile.flush()
            over.wait()

        do_POST = do_GET

    with serving_socket(Waiting, tmp_path / "engine.sock") as url:
        assert Container(DockerEngine.connect(url)._api, "c").wait(1) is None
        over.set()


def test_two_mounts_may_have_the_same_source_file(fake: Any, tmp_path: Path) -> None:
    """Equal files of a hub snapshot are one file on disk."""
    server, engine = fake(**{"containers/create": {"Id": "c", "Warnings": []}})
    blob = str(tmp_path / "a:b")
    engine.create("sha256:0", ContainerOptions(mounts={"/model/a.json": blob, "/model/b.json": blob}))
    mounts = server.posted["HostConfig"]["Mounts"]
    assert [(mount["Target"], mount["Source"], mount["ReadOnly"]) for mount in mounts] == [
        ("/model/a.json", blob, True),
        ("/model/b.json", blob, True),
    ]


@pytest.mark.parametrize(
    ("info", "request_"),
    [
        (CDI, {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}),
        ({"Runtimes": {"nvidia": {}}}, {"Count": -1, "Capabilities": [["gpu"]]}),
    ],
)
def test_gpus_are_requested_by_runtime_or_device_specification(fake: Any, info: Any, request_: dict[str, Any]) -> None:
    server, engine = fake(**{"containers/create": {"Id": "c", "Warnings": []}, "info": info})
    engine.create("sha256:0", ContainerOptions(gpu=True))
    (asked,) = server.posted["HostConfig"]["DeviceRequests"]
    assert {key: asked[key] for key in request_} == request_
