"""Adapters that are added to and removed from a server while clients use others. vLLM is a stand-in."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models.adapters import settings, write_adapter, write_base
from tests.processes import ServerProcess, inferctl, until
from tests.serve.test_adapters import adapted, ask, counts
from tests.tenancy.key_files import add

# Names of a key -> the names that it asks for in turn.
KEYS: dict[str, tuple[list[str] | None, list[str]]] = {
    "all": (None, ["m", "poet", "new", "other"]),
    "base": (["m"], ["m"]),
    "poet": (["poet"], ["poet"]),
    "new": (["new", "other"], ["new", "other"]),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[ServerProcess, dict[str, str], dict[str, str]]]:
    base, allowed = write_base(tmp_path / "base"), tmp_path / "allowed"
    for seed, name in enumerate(("poet", "new", "other", "third")):
        write_adapter(allowed / name, base, seed=seed)
    write_adapter(tmp_path / "elsewhere", base)
    (allowed / "link").symlink_to(tmp_path / "elsewhere")
    write_adapter(allowed / "dora", base, settings(use_dora=True))
    made = {name: add(tmp_path / "keys.json", name, models=models) for name, (models, _) in KEYS.items()}
    made["admin"] = add(tmp_path / "keys.json", "admin", admin=True)
    model = {"source": str(base), "adapters": [{"name": "poet", "source": str(allowed / "poet")}]}
    secrets, ids = {name: secret for name, (_, secret) in made.items()}, {n: k.id for n, (k, _) in made.items()}
    with adapted(tmp_path, model, adapter_folders=[str(allowed)], spare_adapters=2) as running:
        yield running, secrets, ids


def change(server: ServerProcess, key: str, *words: str) -> tuple[int, str]:
    done = inferctl("adapters", *words, "--url", server.url, env={**os.environ, "INFERCTL_API_KEY": key})
    return done.returncode, done.stdout + done.stderr


def post(server: ServerProcess, key: str, name: str, source: str = "", path: str = "") -> httpx.Response:
    body = {"name": name, "source": source}
    return httpx.post(f"{server.url}/adapters{path}", json=body, headers={"x-api-key": key}, timeout=120)


def test_adapters_come_and_go_under_the_load_of_four_keys(
    server: tuple[ServerProcess, dict[str, str], dict[str, str]],
) -> None:
    running, keys, ids = server
    seen: list[tuple[str, str, int, Any]] = []
    ended = threading.Event()

    def load(key: str) -> None:
        while not ended.is_set():
            for name in KEYS[key][1]:
                answer = ask(running, keys[key], name)
                seen.append((key, name, answer.status_code, answer.json().get("system_fingerprint")))

    threads = [threading.Thread(target=load, args=(key,)) for key in KEYS for _ in range(2)]
    for thread in threads:
        thread.start()
    digests = {}
    for _ in range(2):
        for name in ("new", "other"):
            digests[name] = post(running, keys["admin"], name, name).json()["sha256"]
        refused = {"third": "3 adapters are loaded, and the server has memory for 3", "new": "the name 'new' is in use"}
        for name, reason in refused.items():
            assert reason in post(running, keys["admin"], name, name).text
        until(lambda: {("new", 200), ("other", 200)} <= {each[1:3] for each in seen[-30:]})
        for name in ("new", "other"):
            assert change(running, keys["admin"], "remove", name) == (0, f"{name} removed\n")
    before = len(seen)
    until(lambda: len(seen) > before + 20)
    ended.set()
    for thread in threads:
        thread.join()
    assert {status for _, name, status, _ in seen if name in ("m", "poet")} == {200}
    assert {status for _, name, status, _ in seen if name in digests} <= {200, 403, 404}
    assert {(n, of) for _, n, status, of in seen if n in digests and status == 200} == set(digests.items())
    wanted = Counter((ids[key], name) for key, name, status, _ in seen if status == 200)
    until(lambda: counts(running) == wanted, 30)


def test_what_is_refused_and_what_a_new_vllm_has(
    server: tuple[ServerProcess, dict[str, str], dict[str, str]],
) -> None:
    running, keys, _ = server
    assert "use an admin key" in change(running, keys["all"], "add", "new", "new")[1]
    outside = ("../elsewhere", str(running.log.parent / "elsewhere"), "link", "absent", ".", "/etc", "a\0b")
    for source in outside:
        found = post(running, keys["admin"], "new", source)
        assert (found.status_code, "is no folder below" in found.text) == (400, True), source
    code, said = change(running, keys["admin"], "add", "n" * 200, "dora")
    assert (code, said.endswith("`merge_and_unload` of PEFT\n")) == (1, True), "a long reason is shown whole"
    assert "the name 'm' is in use" in post(running, keys["admin"], "m", "new").text
    assert change(running, keys["admin"], "add", "new", "new")[0] == 0
    assert post(running, keys["admin"], "poet", path="/remove").status_code == 200
    with suppress(httpx.HTTPError):
        running.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "die"}]}, keys["base"])

    def restarted() -> bool:
        with suppress(httpx.TransportError):  # the killed process had accepted the connection
            return ask(running, keys["new"], "new").status_code == 200
        return False

    until(restarted)
    assert ask(running, keys["all"], "poet").status_code == 404
    info = running.get("/info", keys["admin"]).json()
    assert [each["name"] for each in info["adapters"]] == ["new"]
