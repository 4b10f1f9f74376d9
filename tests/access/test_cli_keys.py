"""`inferctl keys`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inferctl.access import key_file, keys

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*arguments: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "inferctl", "keys", *arguments]
        done = subprocess.run(command, cwd=tmp_path, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    return run


def listed(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("list", "--json").stdout)["keys"]
    return found


def test_create_prints_the_key_alone(run: Run, tmp_path: Path) -> None:
    done = run("create", "team-a", "--requests-per-minute", "5", "--model", "m", "--endpoint", "embeddings")
    key = done.stdout.removesuffix("\n")
    key_id = keys.parse(key)
    assert key_id
    assert done.stderr == f"created {key_id} (team-a) in keys.json; the key is shown only now\n"
    (found,) = listed(run)
    assert (found["id"], found["name"], found["status"], found["requests_per_minute"]) == (
        key_id,
        "team-a",
        "active",
        5,
    )
    assert (found["models"], found["endpoints"], found["admin"]) == (["m"], ["embeddings"], False)
    (tmp_path / "other").mkdir()
    document = json.loads(run("create", "b", "--json", "--admin", "--expires", "2h", "--file", "other/k.json").stdout)
    assert keys.parse(document["key"]) == document["id"]
    expires = datetime.fromisoformat(document["expires"]) - datetime.fromisoformat(document["created"])
    assert (expires, document["admin"]) == (timedelta(hours=2), True)
    text = run("list").stdout
    assert key_id in text
    assert key not in text


def test_revoke_and_rotate(run: Run, tmp_path: Path) -> None:
    first = run("create", "a").stdout.strip()
    key_id = keys.parse(first) or ""
    second = run("rotate", key_id).stdout.strip()
    assert keys.parse(second) == key_id != second
    third = run("rotate", "-", "--overlap", "30m", stdin=second).stdout.strip()
    stored = key_file.read(tmp_path / "keys.json").keys[0].digests
    assert [each.sha256 for each in stored] == [keys.digest(each.encode()).hex() for each in (third, second, first)]
    ends = [each.not_after for each in stored]
    assert ends[0] is None
    assert ends[1] and ends[2] and abs(ends[1] - ends[2]) < timedelta(minutes=1)
    run("rotate", key_id, "--overlap", "0s")
    assert len(key_file.read(tmp_path / "keys.json").keys[0].digests) == 1
    done = run("revoke", "-", stdin=first)
    assert done.stdout == ""
    assert done.stderr == f"revoked {key_id} (a) in keys.json\n"
    assert listed(run)[0]["status"] == "revoked"
    assert "create another one" in run("rotate", key_id, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", ""), "1 to 100 printable characters"),
        (("create", "a\nb"), "1 to 100 printable characters"),
        (("create", "a", "--expires", "soon"), "'soon' is not a time"),
        (("create", "a", "--endpoint", "embedding"), "did you mean embeddings?"),
        (("create", "a", "--priority", "high"), "interactive or bulk"),
        (("create", "a", "--environment", "A_b"), "is not allowed"),
        (("create", "a", "--requests-per-minute", "0"), "requests-per-minute"),
        (("list",), "inferctl keys create NAME"),
        (("revoke", "x"), "keys.json cannot be read"),
    ],
)
def test_mistakes_are_named(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run(*arguments, code=2).stderr
    assert not (tmp_path / "keys.json").exists()


def test_a_terminal_obeys_nothing_that_an_edit_by_hand_wrote(run: Run, tmp_path: Path) -> None:
    escape = "\x1b[31mred\x1b[0m\r\x07\u202e"
    key_id = keys.parse(run("create", "team-a").stdout.strip()) or ""
    file = tmp_path / "keys.json"
    document = json.loads(file.read_text())
    document["keys"][0] |= {"name": f"a{escape}", "models": [escape], "endpoints": [escape]}
    file.write_text(json.dumps(document))
    shown = [run("list").stdout, run("rotate", key_id).stderr, run("revoke", key_id).stderr]
    document["keys"][0][escape] = 1
    file.write_text(json.dumps(document))
    shown.append(run("list", code=2).stderr)
    for text in shown:
        assert "\\x1b[31mred" in text
        assert all(each.isprintable() for line in text.split("\n") for each in line), text


def test_an_unknown_id_and_a_key_as_an_argument(run: Run, tmp_path: Path) -> None:
    key = run("create", "team-a").stdout.strip()
    before = (tmp_path / "keys.json").read_bytes()
    assert f"did you mean {keys.parse(key)}?" in run("revoke", "team-a", code=2).stderr
    done = run("revoke", key, code=2)
    assert "on stdin" in done.stderr
    assert key not in done.stderr
    assert "typing error" in run("revoke", "-", code=2, stdin=key[:-1]).stderr
    assert (tmp_path / "keys.json").read_bytes() == before


def test_the_spec_names_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("name: m\nmodel: {source: org/m}\naccess: {keys: secrets/k.json}\n")
    run("create", "a")
    assert (tmp_path / "secrets" / "k.json").stat().st_mode & 0o777 == 0o600
    assert len(listed(run)) == 1


def test_the_hint_for_a_missing_file_names_that_file(run: Run, tmp_path: Path) -> None:
    done = run("list", "--keys", "team keys.json", code=2)
    assert "`inferctl keys create NAME --keys 'team keys.json'`" in done.stderr
