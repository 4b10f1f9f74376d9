"""The health check of the image."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.http_servers import Handler, serving
from tests.processes import execute


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server whose `/readyz` returns the status in the test's parameter."""

    class Answer(Handler):
        def do_GET(self) -> None:
            self.reply(getattr(request, "param", 200) if self.path == "/readyz" else 404)

    with serving(Answer) as port:
        yield port


def check(argument: object, **environment: str) -> int:
    command = [sys.executable, "-m", "inferctl.serve.health", str(argument)]
    inherited = {name: value for name, value in os.environ.items() if name != "INFERCTL_SERVE_PORT"}
    done = execute(*command, env={**inherited, **environment})
    assert done.stderr == ""
    return done.returncode


@pytest.mark.parametrize(("port", "code"), [(200, 0), (503, 1)], indirect=["port"])
def test_the_exit_code_reports_whether_the_server_is_ready(port: int, code: int) -> None:
    assert check(port) == code


def test_a_missing_server_is_not_ready() -> None:
    assert check(9) == 1


def test_proxy_variables_are_ignored(port: int) -> None:
    assert check(port, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9") == 0


def test_the_environment_sets_the_port_and_a_service_link_does_not(port: int) -> None:
    assert check(9, INFERCTL_SERVE_PORT=str(port)) == 0
    assert check(port, INFERCTL_SERVE_PORT="tcp://10.0.0.1:80") == 0
