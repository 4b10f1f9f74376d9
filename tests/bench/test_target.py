"""Tests of servers at a URL: their responses, whether they are on this machine, and their process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_foreign_servers import MODEL, Answer, Body, Serve, serve, vllm

from inferctl.bench.load import process_usage, server_activity, target
from inferctl.bench.load.http_json import ServerAccess
from inferctl.bench.load.server_activity import ServerActivity
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


def test_loopback_addresses_are_local() -> None:
    local = ("127.0.0.1:8080", "127.0.0.9", "localhost:8080", "[::1]:8080", "0.0.0.0:8080")
    assert all(target.is_local(f"http://{host}") for host in local)
    assert not any(target.is_local(f"http://{host}") for host in ("10.0.0.7:8080", "localhost.example.org"))


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


def exposition(created: float = 5, **seconds: float) -> str:
    """`/metrics` of a server: `api_event_loop_running=1.5` is its time so far."""
    lines = ["# HELP inferctl_thread_seconds_total Time.", f"inferctl_tokens_created {created}"]
    for name, value in seconds.items():
        process, thread, state = name.partition("_")[0], name.partition("_")[2].rpartition("_")[0], name.split("_")[-1]
        labels = f'{{process="{process}",state="{state}",thread="{thread}"}}'
        metric = f"thread_seconds_total{labels}" if process != "engine" else "batch_duration_seconds_sum"
        lines.append(f"inferctl_{metric} {value}")
    return "\n".join(lines) + "\n"


def share(api: float, waiting: float, engine: float) -> dict[str, float]:
    return {"api_busy_percent": api, "api_waiting_percent": waiting, "engine_busy_percent": engine}


SERVER = {"inferctl": "1", "api_processes": {"count": 1}, "engines": {"count": 1}, "parallel_batches": 1}
EARLY = exposition(api_event_loop_running=3, api_event_loop_waiting=1, engine_busy=7)
# Two seconds later.
LATER = exposition(api_event_loop_running=4.5, api_event_loop_waiting=1.25, engine_busy=7.5)
FOUR = {
    "api_event_loop_running": (3, 5),
    "api_event_loop_waiting": (1, 3),
    "api_tokenizer_running": (0, 0.8),
    "api_tokenizer_waiting": (0, 0.08),
    "backend_event_loop_running": (4, 5),
    "backend_event_loop_waiting": (1, 1),
    "backend_tokenizer_running": (0, 0),
    "backend_tokenizer_waiting": (0, 0),
    "engine_busy": (7, 9.1),
}


@pytest.mark.parametrize(
    ("info", "pages", "found"),
    [
        (SERVER, (EARLY, LATER), share(87.5, 12.5, 25)),
        (SERVER | {"parallel_batches": 2, "engines": {"count": 5}}, (EARLY, LATER), share(87.5, 12.5, 2.5)),
        (
            SERVER | {"api_processes": {"count": 4}},
            [exposition(**{name: values[at] for name, values in FOUR.items()}) for at in (0, 1)],
            share(50, 25, 100)
            | {"tokenizer_busy_percent": 11, "tokenizer_waiting_percent": 1}
            | {"backend_busy_percent": 50, "backend_waiting_percent": 0},
        ),
        ({"inferctl": "1"}, (EARLY, LATER), {"api_busy_percent": 87.5, "api_waiting_percent": 12.5}),
        (SERVER, (exposition(engine_busy=7), exposition(engine_busy=8)), {"engine_busy_percent": 50}),
        (
            SERVER,
            [
                f"{exposition()}inferctl_engine_flops_total {flops:.1e}\n"
                f'inferctl_engine_flops_total{{model="other"}} {flops:.1e}\n'
                'inferctl_matrix_flops_per_second{source="measured"} 2e+12\n'
                'inferctl_matrix_flops_per_second{model="other",source="measured"} 1e+12\n'
                for flops in (1e12, 2e12)
            ],
            {"matrix_share_percent": 75},
        ),
        (SERVER, [f"{exposition()}inferctl_engine_flops_total {flops}\n" for flops in (1e12, 2e12)], {}),
        (SERVER, [exposition() + f'inferctl_engine_restarts{{name="a"}} {n}\n' for n in "13"], {"engine_restarts": 2}),
        (SERVER, (EARLY, LATER.replace("created 5", "created 6")), {}),  # another replica, or a restart
        (SERVER, (EARLY, ""), {}),
        (SERVER, ("", ""), {}),
        ({}, (EARLY, LATER), {}),  # not a server of inferctl
    ],
)
def test_the_shares_of_the_time_are_from_both_ends_of_the_window(
    info: dict[str, object], pages: Sequence[str], found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, scraped = [0.0], []  # type: ignore[var-annotated]

    def get(url: str, timeout_s: float, access: ServerAccess) -> bytes:
        scraped.append(now[0])
        return pages[now[0] > 3].encode()

    monkeypatch.setattr(server_activity, "get", get)
    monkeypatch.setattr(server_activity.time, "monotonic_ns", lambda: int(now[0] * 1e9))
    activity = ServerActivity("http://127.0.0.1:9", info, ServerAccess())
    for at, phase, left_s in ((0, "warm-up", 9), (2, "measure", 2.5), (3, "measure", 1.5), (4, "measure", 0.5)):
        now[0] = at
        activity.follow(phase, left_s)
    now[0] = 5
    activity.follow("drain", 0)
    assert scraped == ([2, 4] if info else [])
    assert activity.between(int(1.9e9), int(4.5e9)) == found
    assert activity.between(int(2.1e9), int(4.5e9)) == {}
