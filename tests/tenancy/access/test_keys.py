"""Keys, the key file, and the table in memory."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.core.errors import UsageError
from inferctl.tenancy.access import key_file, keys
from inferctl.tenancy.access.key_file import StoredDigest
from inferctl.tenancy.access.key_table import KeyTable
from tests.processes import until
from tests.tenancy.key_files import add


def test_a_key_names_its_id_and_is_one_word() -> None:
    key_id = keys.new_id()
    key = keys.generate(key_id)
    assert keys.parse(key) == key_id
    assert re.fullmatch(r"\w+", key)
    assert len({keys.generate(key_id) for _ in range(100)}) == 100


@given(st.data())
def test_the_checksum_finds_every_single_typing_error(data: st.DataObject) -> None:
    key = keys.generate(keys.new_id())
    at = data.draw(st.integers(0, len(key) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda each: each != key[at]))
    assert keys.parse(key[:at] + other + key[at + 1 :]) is None
    assert keys.parse(key[:at]) is None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "keys.json"
    add(found, "first")
    return found


def test_the_file_has_no_key_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, secret = add(path, models=["m"], requests_per_minute=5)
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret.rsplit("_", 1)[-1] not in path.read_text()
    assert key_file.read(path).keys == [key]
    path.chmod(0o640)
    add(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640  # for a container, for example


def test_a_file_that_others_can_write_or_with_an_id_twice_is_an_error(path: Path) -> None:
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        with pytest.raises(UsageError, match="others could add keys"):
            key_file.read(path)
    path.chmod(0o600)
    content = json.loads(path.read_text())
    content["keys"] *= 2
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="same id"):
        key_file.read(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"version": 2}',
        '{"keys": [{"id": "ik_live_a_hunter2"}]}',
        '{"version": 1, "keys": [], "unknown": "hunter2"}',
        '{"keys": [{"id": "abcdefghijkl", "name": "a", "created": "2026-01-01T00:00:00Z", "digests": '
        '[{"sha256": "hunter2"}]}]}',
        '{"keys": [{"id": "abcdefghijkl", "name": "a", "created": "2026-01-01T00:00:00Z", "digests": [], '
        '"team": "hunter2\\u0000"}]}',
        "\udcff",
    ],
)
def test_an_invalid_file_is_an_error_without_its_values(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(UsageError) as error:
        key_file.read(path)
    assert str(path) in error.value.message
    assert "hunter2" not in error.value.message


def test_commands_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda number: add(path, f"k{number}"), range(16)))
    assert len(key_file.read(path).keys) == 16
    assert [each.name for each in tmp_path.iterdir()] == ["keys.json"]


def test_a_body_that_fails_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyError), key_file.edit(path) as found:
        found.clear()
        raise KeyError
    assert path.read_bytes() == before


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def table(path: Path, warnings: list[str]) -> Iterator[KeyTable]:
    found = KeyTable(path, warnings.append)
    found.follow()
    yield found
    found.close()


def test_the_table_follows_the_file(path: Path, table: KeyTable) -> None:
    assert not table.shared
    key, secret = add(path, "b")
    until(lambda: table.find(secret.encode(), time.time()))
    assert table.find(secret.encode(), time.time()) == key
    assert table.shared
    with key_file.edit(path) as found:
        found[key.id] = key.model_copy(update={"revoked": key_file.now()})
    until(lambda: table.find(secret.encode(), time.time()) is None)
    assert not table.shared


def test_a_broken_file_keeps_the_last_keys(path: Path, table: KeyTable, warnings: list[str]) -> None:
    key, secret = add(path, "b")
    until(lambda: table.find(secret.encode(), time.time()))
    good = path.read_text()
    path.write_text("{")
    until(lambda: warnings)
    assert "last valid keys stay in use" in warnings[-1]
    assert table.find(secret.encode(), time.time()) == key
    path.unlink()
    until(lambda: len(warnings) == 2)
    assert table.find(secret.encode(), time.time()) == key
    path.write_text(good.replace('"name": "b"', '"name": "c"'))
    path.chmod(0o600)
    until(lambda: (found := table.find(secret.encode(), time.time())) and found.name == "c")


def test_a_read_that_fails_once_is_repeated(
    path: Path, table: KeyTable, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process has no descriptor left: the file does not change again after it."""
    key, secret = add(path, "b")
    until(lambda: table.find(secret.encode(), time.time()))
    read, attempts = key_file.read, []

    def fails(file: Path) -> key_file.KeyFile:
        attempts.append(file)
        raise OSError(24, "too many open files")

    monkeypatch.setattr(key_file, "read", fails)
    content = read(path)
    revoked = [each.model_copy(update={"revoked": key_file.now()}) for each in content.keys]
    path.write_text(content.model_copy(update={"keys": revoked}).model_dump_json(exclude_none=True))
    until(lambda: len(attempts) >= 3)
    assert table.find(secret.encode(), time.time()) == key
    assert len(warnings) == 1, "one for each version of the file"
    monkeypatch.setattr(key_file, "read", read)
    until(lambda: table.find(secret.encode(), time.time()) is None)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_key_ends_at_its_time(path: Path, rotated: bool) -> None:
    end = datetime.now(UTC) + timedelta(hours=1)
    key, secret = add(path, expires=None if rotated else end)
    if rotated:
        with key_file.edit(path) as found:
            old = key.digests[0].model_copy(update={"not_after": end})
            found[key.id] = key.model_copy(update={"digests": [StoredDigest(sha256="0" * 64), old]})
    table = KeyTable(path, lambda _: None)
    assert table.find(secret.encode(), end.timestamp() - 1)
    assert table.find(secret.encode(), end.timestamp()) is None
