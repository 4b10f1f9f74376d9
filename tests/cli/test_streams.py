"""stdout and stderr as shells and CI systems leave them: closed, full, read by nobody, not UTF-8; with real pipes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import execute

# What a result on stdout may be: text, a Rich table, JSON, help, a version.
PRINTING = {
    "text": "render --model org/m",
    "table": "catalog hardware",
    "json": "schema",
    "help": "--help",
    "version": "--version",
}
FAILING = {"usage": ("biuld", 2), "json": ("check --json", 2)}


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `inferctl` is this one; its exit code is that of its last command."""
    program = f'inferctl() {{ {sys.executable} -m inferctl "$@"; }}\n'
    return execute(
        "bash",
        "-c",
        program + line,
        cwd=folder,
        env={**os.environ, "DOCKER_HOST": "unix:///nowhere", **environment},
        timeout=60,
    )


@pytest.mark.parametrize(
    ("command", "reader", "code"),
    [
        *((command, "true", 0) for command in PRINTING.values()),
        # Only a long output is still written after `head` has read a part.
        ("catalog hardware", "head -c 1", 0),
        ("schema", "head -c 1", 0),
        ("check --json", "true", 2),
    ],
)
def test_a_reader_that_is_gone_does_not_change_the_exit_code(
    command: str, reader: str, code: int, tmp_path: Path
) -> None:
    done = shell(f"inferctl {command} | {reader} >/dev/null; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# Each of these makes a terminal do something: set its title, clear, color by one character, overwrite, reorder.
OBEYED = ("\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "good\rbad", "\u202e", "\x7f\x08")
WRITES = """
import logging, sys
from inferctl.core import streams
from inferctl.cli import console
streams.guard()
text = sys.argv[1]
console.note(text), console.warn(text), console.data(text), console.document({"a": text}), print(text)
logging.basicConfig(), logging.warning("%s", text)
from rich.table import Table
table = Table(text, title=text)
table.add_row(text)
console.report(table)
with console.progress(text) as show:
    show(text)
    console.rich(stderr=True).print(text), console.note(text)
    with console.progress(text):
        pass
console.fail(console.NotReadyError(text, text))
raise ValueError(text)
"""


def test_no_text_of_others_reaches_the_terminal_as_an_escape_sequence() -> None:
    """Whatever prints it: messages, tables, progress, the log, a traceback."""
    text = "".join(OBEYED)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", WRITES, text])
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 65536):
            written += part
    os.waitpid(pid, 0)
    shown = written.decode()
    assert shown.count("u202e") >= 12 and "ValueError" in shown
    assert "\x1b[" in shown, "Rich's own sequences work"
    for obeyed in OBEYED:
        assert obeyed not in shown
    done = execute(sys.executable, "-c", WRITES, text)
    assert not any(obeyed in done.stdout + done.stderr for obeyed in OBEYED)
    assert f'"a": "{json.dumps(text)[1:-1]}"' in done.stdout, "still the same JSON value"


@pytest.mark.parametrize("command", [*PRINTING.values(), "config --json"], ids=[*PRINTING, "failure"])
def test_a_full_disk_under_stdout_is_an_error_of_the_machine_and_a_closed_one_drops_the_output(
    command: str, tmp_path: Path
) -> None:
    full, closed = shell(f"inferctl {command} >/dev/full", tmp_path), shell(f"inferctl {command} >&-", tmp_path)
    assert full.returncode == 3, full.stderr
    assert "error: cannot write to stdout: no space left on device\n\nhint: " in full.stderr
    assert closed.returncode == (2 if command == "config --json" else 0), closed.stderr
    assert not any(words in full.stderr + closed.stderr for words in ("Traceback", "Exception ignored"))


@pytest.mark.parametrize(("command", "code"), FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(true)", ">&- 2>&-"])
def test_a_stderr_that_cannot_be_written_does_not_change_the_exit_code(
    command: str, code: int, redirection: str, tmp_path: Path
) -> None:
    assert shell(f"inferctl {command} {redirection}", tmp_path).returncode == code


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_a_result_does_not_need_stderr(redirection: str, tmp_path: Path) -> None:
    done = shell(f"inferctl catalog hardware {redirection}", tmp_path)
    assert done.returncode == 0
    assert "a100-40gb-sxm" in done.stdout


def test_files_opened_after_a_closed_stdout_do_not_get_the_output(tmp_path: Path) -> None:
    done = shell("inferctl render --model org/m --output out >&- && inferctl render --model org/m", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "Dockerfile").read_text() == done.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_table_is_readable_in_an_encoding_without_its_signs(encoding: str, tmp_path: Path) -> None:
    done = shell("inferctl doctor", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    # Works, and does not: two signs that must not become the same one.
    assert re.search(r"\+ +\W* *machine", done.stdout)
    assert re.search(r"x +\W* *docker", done.stdout)


def test_json_stays_json_in_an_encoding_without_its_signs(tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("name: m\nmodel: {source: ./größe-→}\n", encoding="utf-8")
    done = shell("inferctl config --json", tmp_path, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["model.source"]["value"] == "./größe-→"


def test_the_c_locale_without_utf8_mode_prints_everything(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for command in ("doctor", "catalog hardware a100-40gb-sxm", "estimate --help"):
        done = shell(f"inferctl {command}", tmp_path, **plain)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_file_name_that_is_not_utf8_is_printed_as_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inferctl", "init", b"caf\xe9"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"caf\xe9/inferctl.yaml\n"


@pytest.mark.parametrize("command", ["", "catalog"])
def test_a_group_without_a_command_prints_its_help(command: str, tmp_path: Path) -> None:
    """The help is the answer, as in kubectl, docker and gh: it goes to stdout, and nothing has failed."""
    bare, asked = shell(f"inferctl {command}", tmp_path), shell(f"inferctl {command} --help", tmp_path)
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")
    assert "Usage: inferctl" in bare.stdout
