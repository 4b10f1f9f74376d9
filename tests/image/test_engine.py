"""Tests facts of Docker Engines and their errors, with recorded responses and a real socket."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.docker import Container, DockerEngine
from inferctl.image.records import ContainerOptions, read_engine

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


def test_a_gpu_with_a_device_specification_is_found() -> None:
    assert read_engine(CDI, VERSION).gpu


@pytest.mark.parametrize("devices", [None, [], [{"Source": "cdi", "ID": "vendor.com/nic=0"}]])
def test_folders_for_device_specifications_are_not_a_gpu(devices: Any) -> None:
    folders = ["/etc/cdi", "/etc/nvidia/cdi"]
    assert not read_engine({**CDI, "DiscoveredDevices": devices, "CDISpecDirs": folders}, VERSION).gpu


@pytest.mark.parametrize(("api", "mounts"), [("1.9", False), ("1.47", False), ("1.48", True), ("1.51", True)])
def test_engines_mount_images_from_a_version_of_their_api(api: str, mounts: bool) -> None:
    assert read_engine(CDI, {**VERSION, "ApiVersion": api}).image_mounts == mounts


def test_the_nvidia_runtime_is_a_gpu() -> None:
    assert read_engine({"Runtimes": {"nvidia": {}, "runc": {}}}, VERSION).gpu


class FakeEngine:
    """An engine on a Unix socket. `answers`: end of a path -> JSON or a status. `posted`: the last posted body."""

    def __init__(self, folder: Path, answers: dict[str, Any]) -> None:
        self.url = f"http+unix://{folder / 'engine.sock'}"
        self.posted: dict[str, Any] = {}
        self._socket = folder / "engine.sock"
        known = {"_ping": "OK", "version": VERSION, **answers}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                found = next((answer for end, answer in known.items() if path.endswith(end)), 404)
                status = found if isinstance(found, int) else 200
                body = json.dumps({"message": "the daemon is unwell"} if isinstance(found, int) else found).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.posted = json.loads(body or b"{}")
                self.do_GET()

        self.server = socketserver.ThreadingUnixStreamServer(str(self._socket), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def die(self) -> None:
        """Close the socket, so that connections are refused as after a crash."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Any]:
    made: list[FakeEngine] = []

    def make(**answers: Any) -> tuple[FakeEngine, DockerEngine]:
        one = FakeEngine(tmp_path, answers)
        made.append(one)
        return one, DockerEngine.connect(one.url)

    yield make
    for one in made:
        one.die()


ASKED: dict[str, Callable[[DockerEngine], object]] = {
    "info": lambda engine: engine.info(),
    "image": lambda engine: engine.image("a:b"),
    "history": lambda engine: engine.history("a:b"),
    "save": lambda engine: list(engine.save("a:b")),
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

    class Handler(http.server.BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            if self.path.endswith(("_ping", "version")):
                body = json.dumps(VERSION).encode()
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("content-length", "20")
            self.end_headers()
            self.wfile.flush()
            over.wait()

        do_POST = do_GET  # noqa: N815

    server = socketserver.ThreadingUnixStreamServer(str(tmp_path / "engine.sock"), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        engine = DockerEngine.connect(f"http+unix://{tmp_path / 'engine.sock'}")
        assert Container(engine._api, "c").wait(1) is None
    finally:
        over.set()
        server.shutdown()
        server.server_close()


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
