"""`inferctl keys`, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.cli.key_place import Place
from inferctl.config.spec import Access
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(...)` runs `inferctl keys` in this process, which is faster."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        found = cli.run(["keys", *arguments])
        done = subprocess.CompletedProcess([], found, *capsys.readouterr())
        assert done.returncode == code, done.stderr
        return done

    return run


def created(run: Run, *arguments: str) -> str:
    """Create a key, and return its id."""
    return keys.parse(run("create", *arguments).stdout.strip()) or ""


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
    expected = [key_id, "team-a", "active", 5]
    assert [found[name] for name in ("id", "name", "status", "requests_per_minute")] == expected
    assert (found["models"], found["endpoints"], found["admin"]) == (["m"], ["embeddings"], False)
    (tmp_path / "other").mkdir()
    document = json.loads(run("create", "b", "--json", "--admin", "--expires", "2h", "--file", "other/k.json").stdout)
    assert keys.parse(document["key"]) == document["id"]
    expires = datetime.fromisoformat(document["expires"]) - datetime.fromisoformat(document["created"])
    assert (expires, document["admin"]) == (timedelta(hours=2), True)
    text = run("list").stdout
    assert key_id in text
    assert key not in text


def test_the_budget_of_a_key_changes(run: Run) -> None:
    for arguments, budget in (
        (("create", "a", "--budget", "50 EUR/month"), "50 EUR/month"),
        (("budget", "a", "8.5 USD/day Europe/Berlin soft"), "8.5 USD/day Europe/Berlin soft"),
        (("budget", "a", "none"), None),
    ):
        run(*arguments)
        assert [key["budget"] for key in listed(run)] == [budget]
    assert "Mars" in run("budget", "a", "1 EUR/day Mars", code=2).stderr
    run("create", "b", "--budget", "", code=2)  # an unset variable of a shell
    Path("p.yaml").write_text("prices: [{hardware: cpu, currency: EUR, from: 2026-01-01, input: 1}]")
    Path("inferctl.yaml").write_text("{name: m, model: {source: ./a}, metering: {prices: p.yaml}}")
    warned = [run("budget", "a", f"1 {name}/day").stderr.count("no prices in USD") for name in ("EUR", "USD")]
    assert warned == [0, 1]


def test_a_scope_that_the_spec_does_not_have_is_named(run: Run, tmp_path: Path) -> None:
    models = "{name: dense, model: {source: ./a}, serve: {aliases: [small]}}, {name: order, model: {source: ./b}}"
    (tmp_path / "inferctl.yaml").write_text(f"name: all\nmodels: [{models}]\n")
    assert "warning" not in run("create", "a", "--model", "small", "--model", "order").stderr
    assert "no model or adapter 'ordr', only dense, small, order" in run("create", "b", "--model", "ordr").stderr
    assert [key["models"] for key in listed(run)] == [["small", "order"], ["ordr"]]


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
    run("rotate", key_id, "--overlap", "7d")
    later = [each.not_after for each in key_file.read(tmp_path / "keys.json").keys[0].digests]
    assert later[2:] == ends[1:], "a longer overlap prolongs no earlier key"
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
        (("create", "-"), "must not be `-`"),
        (("create", " a"), "1 to 100 printable characters"),
        (("create", keys.generate("a" * 12)), "or a key"),
        (("create", "a", "--team", "-"), "must not be `-`"),
        (("create", "a", "--team", "a\x1b"), "1 to 100 printable characters"),
        (("create", "a", "--team", ""), "1 to 100 printable characters"),
        (("create", "a", "--expires", "soon"), "'soon' is not a time"),
        (("create", "a", "--expires", "0s"), "'0s' is not a time"),
        (("create", "a", "--expires=-1d"), "'-1d' is not a time"),
        (("create", "a", "--expires", "1.5h"), "'1.5h' is not a time"),
        (("create", "a", "--expires", ""), "'' is not a time"),
        (("create", "a", "--expires", "٣d"), "is not a time"),
        (("create", "a", "--expires", "1000000w"), "ends after the year 9999"),
        (("create", "a", "--expires", "999999999w"), "ends after the year 9999"),
        (("create", "a", "--expires", "9" * 5000 + "s"), "is not a time"),
        (("rotate", "a", "--overlap", "1000000w"), "ends after the year 9999"),
        (("rotate", "a", "--overlap=-1s"), "'-1s' is not a time"),
        (("create", "a", "--force"), "--output FILE"),
        (("create", "a", "--output", "none/a.key"), "none/a.key cannot be written"),
        (("create", "a", "--output", "."), "it is a folder"),
        (("create", "a", "--output", "/dev/full"), "not a regular file"),
        (("create", "a", "--output", "keys.json"), "keys.json"),
        (("create", "a", "--endpoint", "embedding"), "did you mean embeddings?"),
        (("create", "a", "--priority", "high"), "'high' is not one of"),
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
    key_id = created(run, "team-a")
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
    assert "did you mean team-a?" in run("revoke", "team_a", code=2).stderr
    done = run("revoke", key, code=2)
    assert "on stdin" in done.stderr
    assert key not in done.stderr
    assert "typing error" in run("revoke", "-", code=2, stdin=key[:-1]).stderr
    assert (tmp_path / "keys.json").read_bytes() == before


def test_keys_of_one_service_differ_in_their_priority_and_belong_to_a_team(run: Run) -> None:
    ids = {}
    for priority in ("interactive", "bulk"):
        ids[priority] = created(run, "search", "--priority", priority, "--team", "t 1")
        assert ids[priority] in run("create", "search", "--priority", priority, code=2).stderr
    assert {(each["id"], each["name"], each["priority"], each["team"]) for each in listed(run)} == {
        (key_id, "search", priority, "t 1") for priority, key_id in ids.items()
    }
    table = run("list").stdout.splitlines()
    done = run("revoke", "search", code=2)
    for priority, key_id in ids.items():
        assert any(key_id in line and priority in line and "t 1" in line for line in table)
        assert f"{key_id} ({priority})" in done.stderr
    run("revoke", ids["bulk"])
    assert keys.parse(run("rotate", "search").stdout.strip()) == ids["interactive"]


def test_a_name_stands_for_one_key(run: Run, tmp_path: Path) -> None:
    first = created(run, "team-a")
    done = run("create", "team-a", code=2)
    assert first in done.stderr and "inferctl keys rotate" in done.stderr
    assert f"{first!r} is the id of a key" in run("create", first, code=2).stderr
    assert keys.parse(run("rotate", "team-a").stdout.strip()) == first
    assert first in run("revoke", "team-a").stderr
    assert first in run("revoke", "team-a").stderr, "again"
    second = created(run, "team-a")
    assert keys.parse(run("rotate", "team-a").stdout.strip()) == second, "not the revoked one"
    # An earlier version did not ask.
    document = json.loads((tmp_path / "keys.json").read_text())
    document["keys"].append({**document["keys"][-1], "id": "0" * 12, "digests": []})
    (tmp_path / "keys.json").write_text(json.dumps(document))
    for command in ("rotate", "revoke"):
        done = run(command, "team-a", code=2)
        assert second in done.stderr and "0" * 12 in done.stderr
    run("revoke", second)
    assert "0" * 12 in run("revoke", "team-a").stderr


ADDRESSES = ["keys.json", "sqlite:///keys.sqlite"]


def stored(folder: Path, address: str) -> list[ApiKey]:
    return Place(
        Access(keys=f"sqlite:///{folder}/keys.sqlite" if "sqlite" in address else f"{folder}/{address}")
    ).read()


CREATE, ROTATE = "create b", "rotate a --overlap 0s"


@pytest.mark.parametrize(
    ("address", "options", "commands"),
    [(ADDRESSES[0], "--json", (CREATE, ROTATE, CREATE)), (ADDRESSES[1], "", (ROTATE, CREATE, ROTATE))],
)
def test_a_key_that_nobody_gets_is_not_stored(
    run: Run, tmp_path: Path, address: str, options: str, commands: tuple[str, ...]
) -> None:
    run("create", "a", "--keys", address)
    before = stored(tmp_path, address)
    for command, stdout in zip(commands, (">&-", ">/dev/full", "broken pipe"), strict=True):
        line = f"{shlex.quote(sys.executable)} -m inferctl keys {command} --keys {address} {options}"
        line += f" {stdout}" if stdout != "broken pipe" else ""
        done = shell(line, tmp_path, broken_pipe=stdout == "broken pipe")
        assert done.returncode == 3, (line, done.stderr)
        assert "error: " in done.stderr and "Traceback" not in done.stderr
        assert "created" not in done.stderr and "rotated" not in done.stderr
        assert stored(tmp_path, address) == before, line


def shell(line: str, folder: Path, *, broken_pipe: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a line of bash. `broken_pipe`: nobody reads its stdout."""
    stdout = subprocess.PIPE
    if broken_pipe:
        reader, stdout = os.pipe()
        os.close(reader)
    try:
        command = ["bash", "-c", line]
        return subprocess.run(command, cwd=folder, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        if broken_pipe:
            os.close(stdout)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_key_in_a_file_is_for_its_owner_alone(run: Run, tmp_path: Path, address: str) -> None:
    file, place = tmp_path / "me.key", ("--keys", address)
    done = run("create", "me", *place, "--output", "me.key")
    assert (done.stdout, file.stat().st_mode & 0o777) == ("", 0o600)
    assert "in me.key" in done.stderr
    (key,) = stored(tmp_path, address)
    assert keys.parse(file.read_text().strip()) == key.id
    before = file.read_text()
    for command in ("create you", "rotate me --overlap 0s"):
        done = run(*command.split(), *place, "--output", "me.key", code=2)
        assert "me.key already exists" in done.stderr and "--force" in done.stderr
    assert (stored(tmp_path, address), file.read_text()) == ([key], before)
    file.chmod(0o644)
    link = tmp_path / "link.key"
    link.symlink_to(file)
    document = json.loads(
        run("rotate", "me", *place, "--overlap", "0s", "--output", "link.key", "--force", "--json").stdout
    )
    assert (document["id"], document["output"], "key" in document) == (key.id, "link.key", False)
    assert (link.is_symlink(), file.stat().st_mode & 0o777) == (True, 0o600)
    (new,) = stored(tmp_path, address)
    assert new.digests[0].sha256 == keys.digest(file.read_text().strip().encode()).hex() != key.digests[0].sha256
    # The change fails: the file stays what it was.
    before = file.read_text()
    for output, options in (("me.key", ["--force"]), ("new.key", [])):
        run("rotate", "nobody", *place, "--output", output, *options, code=2)
        run("create", "me", *place, "--output", output, *options, code=2)
    store = address.rpartition("/")[2]
    assert "input of this command" in run("create", "b", *place, "--output", store, "--force", code=2).stderr
    assert file.read_text() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([store, "link.key", "me.key"])


def test_an_old_key_ends_with_its_expiry(run: Run) -> None:
    run("create", "a", "--expires", "1h")
    until = re.search(r"until (\S+ \S+) UTC", run("rotate", "a", "--overlap", "5000w").stderr)
    assert until and datetime.fromisoformat(f"{until[1]}+00:00") - datetime.now(UTC) < timedelta(hours=2)


def test_the_spec_names_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "inferctl.yaml").write_text("name: m\nmodel: {source: org/m}\naccess: {keys: secrets/k.json}\n")
    run("create", "a")
    assert (tmp_path / "secrets" / "k.json").stat().st_mode & 0o777 == 0o600
    assert len(listed(run)) == 1
