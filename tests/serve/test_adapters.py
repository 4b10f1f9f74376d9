"""Adapters on a generative model: who sees and uses which name, with a stand-in for vLLM and with the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models.adapters import write_adapter, write_base
from tests.processes import ServerProcess
from tests.serve.test_generation import FAKE
from tests.tenancy.key_files import add

BASE, POET, CODER = ["m", "gpt-4o"], "poet", "org/coder"
# Names of a key -> those that it sees.
SCOPES: dict[str, tuple[list[str] | None, list[str]]] = {
    "all": (None, [*BASE, POET, CODER]),
    "base": (["gpt-4o"], BASE),
    "poet": ([POET], [POET]),
    "two": (["m", CODER, "else"], [*BASE, CODER]),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("adapters")
    base = write_base(folder / "base")
    sources = {name: write_adapter(folder / name.replace("/", "-"), base, seed=len(name)) for name in (POET, CODER)}
    keys = {name: add(folder / "keys.json", name, models=models)[1] for name, (models, _) in SCOPES.items()}
    keys["admin"] = add(folder / "keys.json", "admin", admin=True)[1]
    spec = {
        "name": "m",
        "model": {"source": str(base), "adapters": [{"name": name, "source": str(sources[name])} for name in sources]},
        "serve": {"aliases": BASE[1:], "port": 0},
        "access": {"keys": str(folder / "keys.json")},
    }
    (folder / "inferctl.yaml").write_text(json.dumps(spec))
    options = ["--spec", "inferctl.yaml", "--log", "json", "--device", "cpu"]
    started = ServerProcess.launch(folder, "inferctl.serve", *options, PYTHONPATH=str(FAKE))
    try:
        yield started.wait_announced(), keys
    finally:
        started.kill()


def ask(server: ServerProcess, key: str, model: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "1"}], "prompt": "a"} | ({} if model is None else {"model": model})
    return httpx.post(f"{server.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_sees_and_uses_its_names_only(server: tuple[ServerProcess, dict[str, str]], scope: str) -> None:
    running, keys = server
    headers = {"authorization": f"Bearer {keys[scope]}"}
    seen = SCOPES[scope][1]
    cards = {card["id"]: card for card in httpx.get(f"{running.url}/v1/models", headers=headers).json()["data"]}
    assert list(cards) == seen
    assert {name: card["parent"] for name, card in cards.items()} == {
        name: None if name in BASE else "m" for name in seen
    }
    assert "/" not in json.dumps(list(cards.values())).replace(CODER, "")
    unknown = ask(running, keys[scope], "absent")
    for name in [*BASE, POET, CODER]:
        answer = ask(running, keys[scope], name)
        one = httpx.get(f"{running.url}/v1/models/{name}", headers=headers)
        assert (answer.status_code, one.status_code) == ((200, 200) if name in seen else (404, 404))
        if name not in seen:
            assert (
                answer.json()["error"]["message"].replace(repr(name), "'absent'") == unknown.json()["error"]["message"]
            )
    # Without a name, only one model can be meant.
    assert ask(running, keys[scope], None).status_code == (200 if seen in (BASE, [POET]) else 400)
    assert [ask(running, keys[scope], wrong).status_code for wrong in (5, [POET], {"a": 1})] == [404] * 3
    assert ask(running, keys[scope], "absent", "/tokenize").status_code == 404


def test_events_have_the_name_and_vllm_gets_the_derived_options(server: tuple[ServerProcess, dict[str, str]]) -> None:
    running, keys = server
    for name in ("gpt-4o", CODER):
        ask(running, keys["all"], name)
    lines = [json.loads(line) for line in running.log.read_text().splitlines() if line.startswith("{")]
    assert {line.get("model") for line in lines if line["message"] == "request" and line["status"] == 200} >= {
        "m",
        CODER,
    }
    info = httpx.get(f"{running.url}/info", headers={"authorization": f"Bearer {keys['admin']}"}).json()
    found = {each["name"]: each for each in info["adapters"]}
    assert found[POET]["sha256"] != found[CODER]["sha256"]
    assert {(each["rank"], each["bytes"] > 1000) for each in found.values()} == {(4, True)}
    options = info["engine"]["options"]
    assert (options["--max-loras"], options["--max-lora-rank"], options["--max-cpu-loras"]) == ("2", "8", "2")
    paths = dict(each.split("=") for each in options["--lora-modules"].split())
    assert [Path(paths[name]).name for name in found] == [each["sha256"] for each in found.values()]
