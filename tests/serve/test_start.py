"""What a start shows, and how it ends after a signal at any time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from inferctl.core.errors import EXIT_INTERRUPTED
from inferctl.serve.generate.generation_server import _probe
from inferctl.serve.observe.progress import StartProgress
from inferctl.serve.signals import StopSignals
from tests.processes import python

# A module whose import ends in the middle of a start: a signal for the whole process group, as a terminal sends it.
_SIGNALS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r} and {process!r} in " ".join(sys.orig_argv):
            os.killpg(os.getpgid({group}), signal.{number})
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("command", "number", "process", "name"),
    [
        # Before the engine can ignore signals.
        ("inferctl serve", "SIGINT", "engine_process.engine_main", "inferctl.serve.engine_process"),
        ("inferctl.serve", "SIGINT", "engine_process.engine_main", "numpy"),
        ("inferctl.serve", "SIGTERM", "engine_process.engine_main", "numpy"),
        ("inferctl.serve", "SIGINT", "engine_process.engine_main", "inferctl.serve.engines.echo"),
        ("inferctl serve", "SIGINT", "-m inferctl", "inferctl.serve.encoder_server"),
        ("inferctl.serve", "SIGTERM", "-m inferctl", "inferctl.serve.encoder_server"),
        ("inferctl serve", "SIGTERM", "-m inferctl", "starlette"),
    ],
)
def test_a_signal_to_all_processes_ends_a_start_without_a_traceback(
    minilm: Path, tmp_path: Path, command: str, number: str, process: str, name: str
) -> None:
    group = "os.getppid()" if "engine_process" in process else "0"
    (tmp_path / "sitecustomize.py").write_text(_SIGNALS.format(name=name, process=process, number=number, group=group))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = ("--model", minilm, "--engine", "echo", "--port", "0")
    done = python(
        *("-m", *command.split(), *options), env=environment, cwd=tmp_path, timeout=120, start_new_session=True
    )
    # A server that listens drains after SIGTERM.
    assert done.returncode == EXIT_INTERRUPTED or (number == "SIGTERM" and done.returncode == 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("starting ")]
    assert len(lines) <= 1, lines


def test_a_signal_ends_the_search_for_a_device(tmp_path: Path) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _probe("auto", StartProgress(lambda _: None), signals)


def test_a_pipe_gets_one_line_and_then_one_for_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines: list[str] = []
    shown = StartProgress(lines.append)
    for phase in ("starting an engine", "loading the weights", "warming up"):
        shown.phase(phase)
        for _ in range(10):
            now += 1
            shown.tick()
    assert len(lines) == 3
    assert all(
        word in line for word, line in zip(("an engine", "weights; 15 s", "warming up; 30 s"), lines, strict=True)
    )
    shown.stop()
    now += 100
    shown.tick()
    shown.phase("a later start")
    assert len(lines) == 3
