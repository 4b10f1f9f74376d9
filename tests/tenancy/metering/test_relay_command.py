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


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    metering = {"mode": "on", "data": "file/metering"}
    spec = Spec.model_validate({"name": "m", "model": {"source": "x"}, "metering": metering})
    line = json.dumps({"spec": spec.model_dump(mode="json")}) + "\n"
    done = python("-m", "inferctl.tenancy.relay", cwd=tmp_path, input=line, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_what_terminals_obey_is_escaped_in_the_relay_of_a_server_too(tmp_path: Path) -> None:
    (tmp_path / "metering" / "\x1b[2J" / "lock").mkdir(parents=True)
    spec = Spec.model_validate({"name": "m", "model": {"source": "x"}, "metering": {"mode": "on"}})
    line = json.dumps({"spec": spec.model_dump(mode="json")}) + "\n"
    done = python("-m", "inferctl.tenancy.relay", cwd=tmp_path, input=line, timeout=60)
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
    spec = Spec.model_validate({"name": "m", "model": {"source": "x"}, "metering": {"mode": "on"}})
    command = [sys.executable, "-m", "inferctl.tenancy.relay"]
    relay = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, start_new_session=True)
    assert relay.stdin
    relay.stdin.write(json.dumps({"spec": spec.model_dump(mode="json")}).encode() + b"\n")
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


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"ledger": "sqlite:///l", "mode": "on"}, False),
        ({"ledger": "sqlite:///l"}, True),
        ({"broker": "nats://b"}, True),
    ],
)
def test_an_address_without_effect_is_a_warning(settings: dict[str, str], warned: bool) -> None:
    found = list(metering.warnings(Metering.model_validate(settings)))
    assert ["metering.mode" in warning for warning in found] == [True] * warned
