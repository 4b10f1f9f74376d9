"""Keys in SQLite and PostgreSQL: `inferctl keys`, and the file that a relay writes for servers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from inferctl import cli
from inferctl.config.spec import Access, Metering
from inferctl.core.errors import UsageError
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import ApiKey
from inferctl.tenancy.fleet.key_store import KeyStore
from inferctl.tenancy.metering import outbox
from inferctl.tenancy.relay.access import AccessRelay, _Copy
from inferctl.tenancy.relay.relay import Relay
from tests.processes import until
from tests.tenancy.access.test_cli_keys import run as keys_command  # noqa: F401  # a fixture
from tests.tenancy.parts import Postgres

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(keys_command: Run, address: str) -> Run:  # noqa: F811  # the fixture
    """`run(...)` runs `inferctl keys` for the store."""
    return lambda *arguments, **options: keys_command(*arguments, "--keys", address, **options)


@pytest.fixture
def relay(tmp_path: Path, address: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """`relay()` starts `inferctl relay` for the store, in the folder of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = {"INFERCTL_ACCESS_KEYS": address, "INFERCTL_ACCESS_DATA": "access"}
        command = [sys.executable, "-m", "inferctl", "relay"]
        with (tmp_path / "relay.log").open("ab") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **environment}, stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def copy_of(address: str, folder: Path) -> Path:
    """Return the file with the keys that a relay writes for servers."""
    return Path(Access(keys=address, data=str(folder / "access")).key_file or "")


def key(number: int, **fields: Any) -> ApiKey:
    content = {"id": f"{number:012}", "name": f"k{number}", "digests": [], "created": datetime.now(UTC), **fields}
    return ApiKey.model_validate(content)


def test_edits_at_the_same_time_do_not_lose_each_other(address: str) -> None:
    KeyStore.open(address).close()

    def add(first: int) -> None:
        store = KeyStore.open(address)
        for number in range(first, first + 10):
            with store.edit() as found:
                found[f"{number:012}"] = key(number)
        store.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(0, 400, 100)))
    store = KeyStore.open(address)
    content, changes = store.read()
    assert len(content.keys) == changes == store.changes() == 40
    with pytest.raises(RuntimeError), store.edit() as found:
        found["000000000900"] = key(900)
        raise RuntimeError

    def deliver() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError), store.edit(deliver) as found:
        found["000000000900"] = key(900)
    assert (len(store.read()[0].keys), store.changes()) == (40, 40), "an edit that fails changes nothing"
    store.close()


def test_the_relay_keeps_the_file_of_the_servers_equal(
    run: Run, relay: Callable[[], subprocess.Popen[bytes]], address: str, tmp_path: Path
) -> None:
    secret = run("create", "a").stdout.strip()
    copy = copy_of(address, tmp_path)
    first = relay()
    until(copy.exists)
    assert copy.stat().st_mode & 0o777 == 0o600
    (only,) = key_file.read(copy).keys
    assert only.digests[0].sha256 == keys.digest(secret.encode()).hex()
    assert secret not in copy.read_text()
    run("revoke", "-", stdin=secret)
    assert "revoked" in run("list").stdout
    until(lambda: key_file.read(copy).keys[0].revoked is not None, 10)
    first.send_signal(signal.SIGKILL)
    first.wait()
    run("create", "b")
    second = relay()
    until(lambda: len(key_file.read(copy).keys) == 2, 30)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    assert not (tmp_path / "metering").exists(), "nobody asked for usage events"


def test_a_store_that_stops_leaves_the_last_keys(
    postgres: Postgres, relay: Callable[[], subprocess.Popen[bytes]], run: Run, address: str, tmp_path: Path
) -> None:
    if not address.startswith("postgresql"):
        pytest.skip("SQLite does not stop")
    run("create", "a")
    relay()
    copy = copy_of(address, tmp_path)
    until(copy.exists)
    before = copy.read_bytes()
    assert postgres.process
    postgres.process.send_signal(signal.SIGINT)
    postgres.process.wait()
    until(lambda: b"is not available" in (tmp_path / "relay.log").read_bytes(), 30)
    assert copy.read_bytes() == before
    postgres.start()
    run("create", "b")
    until(lambda: len(key_file.read(copy).keys) == 2, 30)


def test_a_restored_store_does_not_revive_keys(
    run: Run, relay: Callable[[], subprocess.Popen[bytes]], address: str, tmp_path: Path
) -> None:
    if not address.startswith("sqlite"):
        pytest.skip("a backup of SQLite is a copy")
    file, log = tmp_path / "data.sqlite", tmp_path / "relay.log"
    revoked, rotated, other = [keys.parse(run("create", name).stdout.strip()) or "" for name in "abc"]
    shutil.copy(file, tmp_path / "backup")
    run("revoke", revoked)
    run("rotate", rotated, "--overlap", "1h")
    copy = copy_of(address, tmp_path)
    process = relay()
    until(copy.exists)
    process.kill()  # it learns of the backup from the file alone
    process.wait()
    before = _valid(copy)
    shutil.copy(tmp_path / "backup", file)
    relay()
    until(lambda: revoked in log.read_text())
    until(lambda: len(_valid(copy)[rotated]) == 1)
    assert _valid(copy) == {revoked: [], rotated: before[rotated][1:], other: before[other]}
    assert before[rotated][1][1], "the rotated key ends as before"
    run("revoke", revoked)
    run("create", "d")
    until(lambda: len(_valid(copy)) == 4)
    assert log.read_text().count(revoked) == 1


def _valid(copy: Path) -> dict[str, list[Any]]:
    """Return what opens each key of a file: hashes, and until when."""
    return {
        key.id: [] if key.revoked else [(each.sha256, each.not_after) for each in key.digests]
        for key in key_file.read(copy).keys
    }


def test_a_store_that_went_back_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.sqlite"
    address = store_at(file)
    copy = _Copy(address, tmp_path / "copy.json")
    for number in range(2):
        with KeyStore.open(address).edit() as found:
            found[f"{number:012}"] = key(number)
        if not number:
            shutil.copy(file, tmp_path / "backup")
    copy.update()
    shutil.copy(tmp_path / "backup", file)
    copy.update()
    assert "WENT BACK from change 2 to 1" in caplog.text
    assert len(key_file.read(tmp_path / "copy.json").keys) == 1
    copy.close()


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/d", "sqlite:///missing.sqlite", "postgresql://u:secret@127.0.0.1:1/d"]
)
def test_errors_show_no_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["keys", "list", "--keys", url]) in (2, 3)
    told = capsys.readouterr().err
    assert "error:" in told
    assert "secret" not in told
    assert not (tmp_path / "missing.sqlite").exists()


def test_a_key_of_another_version_is_an_error(address: str) -> None:
    store = KeyStore.open(address)
    with store._engine.begin() as connection:
        content = json.dumps({"id": "a" * 12, "name": "a", "digests": [], "created": "2026-01-01T00:00:00Z", "no": 1})
        insert = sqlalchemy.text("insert into api_keys (id, content) values ('aaaaaaaaaaaa', :content)")
        connection.execute(insert, {"content": content})
    with pytest.raises(UsageError, match="not valid: no"):
        store.read()
    store.close()


def test_a_server_does_not_read_the_keys_of_another_store() -> None:
    files = {url: Access(keys=url).key_file for url in ("postgresql://a@h/x", "postgresql://a@h/y", "sqlite:///x")}
    assert len(set(files.values())) == 3
    assert Access(keys="postgresql://a:secret@h/x").key_file == files["postgresql://a@h/x"], "passwords change"
    assert Access(keys="postgresql://a@h/x?password=b").key_file == files["postgresql://a@h/x"]


def store_at(path: Path) -> str:
    address = f"sqlite:///{path}"
    KeyStore.open(address).close()
    return address


@pytest.fixture
def settings(tmp_path: Path) -> Access:
    """The settings of a relay with a store in SQLite."""
    return Access(keys=store_at(tmp_path / "keys.sqlite"), data=str(tmp_path / "access"))


async def _run_until(relay: Relay, condition: Callable[[], bool]) -> None:
    task = asyncio.create_task(relay.run())
    deadline = time.monotonic() + 20
    while not condition() and not task.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    found = condition()
    relay.end()
    await asyncio.gather(task, return_exceptions=True)
    assert found, task


def test_one_folder_for_events_and_for_two_stores(tmp_path: Path) -> None:
    """Each part has a lock of its own, so none waits for another one, also of other relays."""
    settings = [Access(keys=store_at(tmp_path / f"{name}.sqlite"), data=str(tmp_path / "data")) for name in "ab"]
    metering = Metering(mode="on", data=str(tmp_path / "data"), ledger=f"sqlite:///{tmp_path}/ledger.sqlite")
    files = [Path(each.key_file or "") for each in settings]
    with outbox.exclusive(files[0].parent, f"{files[0].stem}.lock"):  # a relay with another store
        asyncio.run(_run_until(Relay(metering, settings[1]), files[1].exists))
    assert not files[0].exists()


def test_a_ledger_of_a_newer_version_does_not_end_the_copy_of_keys(
    settings: Access, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metering = Metering(mode="on", data=str(tmp_path / "data"), ledger=f"sqlite:///{tmp_path}/ledger.sqlite")
    newer = sqlite3.connect(tmp_path / "ledger.sqlite")
    newer.execute("create table usage_version (version_num varchar(32) not null)")
    newer.execute("insert into usage_version values ('9999')")
    newer.commit()
    newer.close()
    relay, copied, removed = Relay(metering, settings), Path(settings.key_file or ""), list[bool]()

    def copied_after_the_error() -> bool:
        if "newer version" in caplog.text and not removed:
            copied.unlink(missing_ok=True)
            removed.append(True)
        return bool(removed) and copied.exists()

    asyncio.run(_run_until(relay, copied_after_the_error))


def test_only_the_owner_may_write_a_store(tmp_path: Path) -> None:
    address = store_at(tmp_path / "keys.sqlite")
    assert (tmp_path / "keys.sqlite").stat().st_mode & 0o777 == 0o600
    (tmp_path / "keys.sqlite").chmod(0o662)
    with pytest.raises(UsageError, match="can be written by other users"):
        KeyStore.open(address)


def test_a_flood_of_changes_asks_the_store_ten_times_a_second(
    settings: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[float]()
    monkeypatch.setattr("inferctl.tenancy.relay.access._Copy.update", lambda _: asked.append(time.monotonic()))

    async def run() -> None:
        relay, ending = AccessRelay(settings), asyncio.Event()
        task = asyncio.create_task(relay.run(ending))
        until_s = time.monotonic() + 0.8
        while time.monotonic() < until_s:
            relay._changed.set()
            await asyncio.sleep(0.001)
        ending.set()
        await task

    asyncio.run(run())
    assert 3 <= len(asked) <= 9, "without messages, it would be one"


def test_stores_in_two_schemas_of_a_database_share_no_keys(postgres: Postgres) -> None:
    url = postgres.url()
    with sqlalchemy.create_engine(url.replace("postgresql", "postgresql+psycopg")).begin() as connection:
        connection.execute(sqlalchemy.text("create schema a; create schema b"))
    stores = [KeyStore.open(f"{url}&options=-c%20search_path%3D{name}&connect_timeout=9") for name in "ab"]
    with stores[0].edit() as found:
        found["0" * 12] = key(0)
    assert [len(store.read()[0].keys) for store in stores] == [1, 0]
    for store in stores:
        store.close()
