"""With `--json`, stdout is one JSON document whatever happens."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from tests.processes import python

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")


def failure(capsys: Captured, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.run([*arguments, "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert f"error: {document['error']['message']}\n\nhint: {document['error']['hint']}\n" in err
    assert document["error"]["exit_code"] == code
    return code, document["error"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["biuld"], 2),
        (["render", "--ouput", "x"], 2),
        (["bench", "--repeats", "many"], 2),
        (["config"], 2),
        (["catalog", "hardware", "a100"], 2),
        (["compare", "A", "B"], 2),
        (["estimate"], 2),
        (["pull", "registry.example.com/ml/m:1"], 3),
        (["bench", "--url", "t4=http://127.0.0.1:9", "--plan", "quick"], 3),
    ],
)
def test_a_failure_is_a_document_and_its_words_stay_on_stderr(
    arguments: list[str], code: int, capsys: Captured
) -> None:
    assert failure(capsys, *arguments)[0] == code


def test_each_problem_of_a_file_is_an_entry(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("nmae: m\nmodel: {source: org/m}\nserve: {port: 123456}\n")
    _, found = failure(capsys, "render")
    assert [(one["file"], one["line"], one["path"]) for one in found["problems"]] == [
        ("inferctl.yaml", 1, "nmae"),
        ("inferctl.yaml", 3, "serve.port"),
    ]
    assert all(one["message"] for one in found["problems"])


def test_the_check_keeps_its_own_keys_next_to_the_error(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("nmae: m\nmodel: {source: org/m}\n")
    assert cli.run(["check", "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["ok"], document["file"]) == (False, "inferctl.yaml")
    assert document["problems"][0]["path"] == document["error"]["problems"][0]["path"] == "nmae"
    assert "error: " in err
    # A result that fails is the only document.
    (tmp_path / "inferctl.yaml").write_text("name: m\nmodel: {source: org/m}\nserve: {precision: bf16}\n")
    assert cli.run(["check", "--hardware", "t4", "--driver", "300", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_a_document(sent: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "inferctl", "bench", "--url", f"a={url}", "--json"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # It waits for a response as long as the connection is open.
        connection, _ = silent.accept()
        with connection:
            process.send_signal(sent)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["error"] == {"message": "interrupted", "hint": None, "exit_code": 130, "problems": []}
    assert "Traceback" not in err


_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_MODULE, _FUNCTION = tomllib.loads(_PYPROJECT.read_text())["project"]["scripts"]["inferctl"].split(":")
_STARTS = {
    "script": f"from {_MODULE} import {_FUNCTION}; {_FUNCTION}()",
    "module": "import runpy; runpy.run_module('inferctl', run_name='__main__')",
}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", _STARTS)
def test_a_command_interrupted_during_its_imports_leaves_a_document(start: str, sent: signal.Signals) -> None:
    code = f"""
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), {sent})
sys.meta_path.insert(0, Finder)
sys.argv = ["inferctl", "doctor", "--json"]
{_STARTS[start]}
"""
    done = python("-c", code, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert json.loads(done.stdout)["error"]["message"] == "interrupted"


def test_ctrl_c_while_an_error_is_printed_ends_the_command(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "error", interrupted)
    assert cli.run(["check", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 130
