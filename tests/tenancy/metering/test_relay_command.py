"""`inferctl relay`: what it says before it works, and settings of metering that have no effect."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inferctl.config.spec import Metering, Spec
from inferctl.serve.observe import metering
from tests.processes import inferctl, python, until


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    done = inferctl("relay", "--data", "meterng", cwd=tmp_path, code=2)
    assert "the folder meterng does not exist" in done.stderr
    assert "hint:" in done.stderr
    assert not (tmp_path / "meterng").exists()


RELAY = ("-m", "inferctl.tenancy.relay")


def first_line(data: str = "metering") -> str:
    """Return what a server sends to its relay."""
    spec = {"name": "m", "model": {"source": "x"}, "metering": {"mode": "on", "data": data}}
    return json.dumps({"spec": Spec.model_validate(spec).model_dump(mode="json")}) + "\n"


def test_the_relay_of_a_server_reports_in_one_line_that_terminals_do_not_obey(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = python(*RELAY, cwd=tmp_path, input=first_line("file/metering"), timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    (tmp_path / "metering" / "\x1b[2J" / "lock").mkdir(parents=True)
    done = python(*RELAY, cwd=tmp_path, input=first_line(), timeout=60)
    assert "the outbox metering/\\u001b[2J cannot be read" in done.stderr


def test_a_folder_without_a_server_is_noted(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    log = tmp_path / "log"
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "inferctl", "relay", "--data", "other"]
        relay = subprocess.Popen(command, cwd=tmp_path, stderr=stream)
    until(lambda: "no server records usage in" in log.read_text(), 60)
    relay.send_signal(signal.SIGTERM)
    assert relay.wait(30) == 0


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no autogroups")
def test_a_relay_steps_back_for_its_server_and_no_longer_after_its_end(tmp_path: Path) -> None:
    """Otherwise, the relay of a killed server takes long to end on a busy machine."""
    command = [sys.executable, *RELAY]
    relay = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, start_new_session=True)
    assert relay.stdin
    relay.stdin.write(first_line().encode())
    relay.stdin.flush()
    group, seen = Path(f"/proc/{relay.pid}/autogroup"), ""
    until(lambda: group.read_text().endswith("nice 10\n"), 60)
    time.sleep(0.3)  # Linux rejects a second change within 0.1 s
    relay.stdin.close()
    while relay.poll() is None:
        with contextlib.suppress(OSError):
            seen = group.read_text() or seen
        time.sleep(0.005)
    assert relay.returncode == 0
    assert seen.endswith("nice 0\n")


def test_an_address_without_effect_is_a_warning() -> None:
    for effective in ({}, {"ledger": "sqlite:///l", "mode": "on"}):
        assert not list(metering.warnings(Metering.model_validate(effective)))
    for settings in ({"ledger": "sqlite:///l"}, {"broker": "nats://b"}):
        (warning,) = metering.warnings(Metering.model_validate(settings))
        assert "metering.mode" in warning
