"""Tests of servers at a URL: their responses, whether they are on this machine, and their process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_foreign_servers import MODEL, Answer, Body, Serve, serve, vllm

from inferctl.bench.load import process_usage, target
from inferctl.bench.measure import environment
from inferctl.core.errors import NotReadyError

__all__ = ["serve"]


def with_info_page(status: int) -> Callable[[str, Body | None], Answer]:
    pages: dict[str, Answer] = {"/info": (status, {}, {}), "/v1/models": (200, {"data": [{"id": MODEL}]}, {})}
    return lambda path, body: pages.get(path) or vllm(path, body)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_an_info_page_is_measured(serve: Serve, status: int) -> None:
    found = target.connect(serve(with_info_page(status)))
    api = {"path": "/v1/embeddings", "model": MODEL, "encoding_format": "base64"}
    assert (found.info, found.model) == ({"api": api}, MODEL)


@pytest.mark.parametrize(
    ("status", "hint"), [(503, "/readyz"), (429, "/readyz"), (401, "credentials"), (403, "credentials"), (500, "log")]
)
def test_a_server_that_rejects_requests_differs_from_one_without_an_info_page(
    serve: Serve, status: int, hint: str
) -> None:
    with pytest.raises(NotReadyError, match=f"/info returned {status}") as caught:
        target.connect(serve(with_info_page(status)))
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://127.0.0.9", True),
        ("http://localhost:8080", True),
        ("http://[::1]:8080", True),
        ("http://0.0.0.0:8080", True),
        ("http://10.0.0.7:8080", False),
        ("http://localhost.example.org", False),
        ("https://example.org", False),
    ],
)
def test_loopback_addresses_are_local(url: str, local: bool) -> None:
    assert target.is_local(url) is local


def test_the_process_that_listens_is_found(answering: Callable[..., str]) -> None:
    pid = target.local_pid(answering())
    assert pid is not None
    assert b"answering.py" in (Path("/proc") / str(pid) / "cmdline").read_bytes()


def test_the_parent_of_processes_that_share_a_socket_is_found() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        line = [sys.executable, "-c", "input()"]
        with subprocess.Popen(line, stdin=subprocess.PIPE, pass_fds=[listening.fileno()]) as child:
            assert process_usage.listener(port) == os.getpid()
            child.communicate(b"\n")
    assert process_usage.listener(port) is None


def test_a_forwarder_is_not_the_server(tmp_path: Path) -> None:
    code = (
        "import json, socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); input()"
    )
    forwarder = tmp_path / "docker-proxy"
    forwarder.symlink_to(sys.executable)
    with subprocess.Popen([str(forwarder), "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = json.loads(process.stdout.readline())
        assert process_usage.listener(port) is None
        process.communicate(b"\n")


def test_cores_are_limited_by_the_smallest_quota_of_the_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("50000 100000")
    (inner / "cpu.max").write_text("max 100000")
    process = tmp_path / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text("0::/a/b\n")
    monkeypatch.setattr(environment, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(environment, "_CGROUPS", tmp_path)
    assert environment.cores() == 1
    (tmp_path / "a" / "cpu.max").unlink()
    assert environment.cores() == len(os.sched_getaffinity(0))
