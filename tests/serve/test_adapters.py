"""Adapters on a generative model: who sees and uses which name, with a stand-in for vLLM and with the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from inferctl.models.adapter import Slots
from inferctl.models.model import ModelFolder
from inferctl.serve.generate import generation_server, probe
from tests.conftest import ROOT
from tests.models.adapters import write_adapter, write_base
from tests.processes import ServerProcess, python, until, write_spec
from tests.required import missing
from tests.serve.test_generation import launch
from tests.serve.test_vllm import SPEC, greedy, serving
from tests.tenancy.key_files import add
from tests.tiny_models import make_generator

BASE, POET, CODER = ["m", "gpt-4o"], "poet", "org/coder"
# Names of a key -> those that it sees.
SCOPES: dict[str, tuple[list[str] | None, list[str]]] = {
    "all": (None, [*BASE, POET, CODER]),
    "base": (["gpt-4o"], BASE),
    "poet": ([POET], [POET]),
    "two": (["m", CODER, "else"], [*BASE, CODER]),
}


@contextmanager
def adapted(folder: Path, model: dict[str, Any], **serve: Any) -> Iterator[ServerProcess]:
    """Run a server with adapters, with the keys of `folder` and usage events. vLLM is a stand-in."""
    base, access = Path(model["source"]), {"keys": "keys.json"}
    spec = write_spec(folder, base, model=model, serve=serve, metering={"mode": "on"}, access=access)
    started = launch(folder, base, "--spec", spec)
    try:
        yield started.wait_announced()
    finally:
        started.kill()


def counts(server: ServerProcess) -> Counter[tuple[str, str]]:
    """Return the good chats in the ledger by key and model."""
    rows = server.usage("key", "model", "status", "endpoint")
    good = (row for row in rows if (row["status"], row["endpoint"]) == (200, "chat"))
    return Counter({(row["key"], row["model"]): row["requests"] for row in good})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("adapters")
    base = write_base(folder / "base")
    sources = {name: write_adapter(folder / name.replace("/", "-"), base, seed=len(name)) for name in (POET, CODER)}
    keys = {name: add(folder / "keys.json", name, models=models)[1] for name, (models, _) in SCOPES.items()}
    keys["admin"] = add(folder / "keys.json", "admin", admin=True)[1]
    model = {"source": str(base), "adapters": [{"name": name, "source": str(sources[name])} for name in sources]}
    with adapted(folder, model, aliases=BASE[1:]) as running:
        yield running, keys


def ask(server: ServerProcess, key: str, model: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "1"}], "prompt": "a"} | ({} if model is None else {"model": model})
    return server.post(path, body, key)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_sees_and_uses_its_names_only(server: tuple[ServerProcess, dict[str, str]], scope: str) -> None:
    running, keys = server
    seen = SCOPES[scope][1]
    cards = {card["id"]: card for card in running.get("/v1/models", keys[scope]).json()["data"]}
    assert list(cards) == seen
    assert {name: card["parent"] for name, card in cards.items()} == {
        name: None if name in BASE else "m" for name in seen
    }
    assert "/" not in json.dumps(list(cards.values())).replace(CODER, "")
    unknown = ask(running, keys[scope], "absent")
    for name in [*BASE, POET, CODER]:
        answer = ask(running, keys[scope], name)
        one = running.get(f"/v1/models/{name}", keys[scope])
        assert (answer.status_code, one.status_code) == ((200, 200) if name in seen else (404, 404))
        if name not in seen:
            assert (
                answer.json()["error"]["message"].replace(repr(name), "'absent'") == unknown.json()["error"]["message"]
            )
    # Without a name, only one model can be meant.
    assert ask(running, keys[scope], None).status_code == (200 if seen in (BASE, [POET]) else 400)
    assert [ask(running, keys[scope], wrong).status_code for wrong in (5, 0, [POET], [], {"a": 1})] == [400] * 5
    assert ask(running, keys[scope], "absent", "/tokenize").status_code == 404


def test_log_probabilities_of_a_prompt_are_computed_alone(server: tuple[ServerProcess, dict[str, str]]) -> None:
    running, keys = server

    def send(script: str, **options: Any) -> httpx.Response:
        body = {"model": POET, "messages": [{"role": "user", "content": script}], "max_tokens": 1, **options}
        return running.post("/v1/chat/completions", body, keys["all"])

    for options in ({"n": 2}, {"max_tokens": 2}):
        assert send("1", prompt_logprobs=1, **options).json()["error"]["param"] == "prompt_logprobs"
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(send, "60")
        until(lambda: send("1", prompt_logprobs=0).json().get("error", {}).get("code") == "prompt_logprobs_busy", 3)
        assert plain.result().status_code == 200
        alone = pool.submit(send, "20", echo=True)
        others = [pool.submit(send, "1") for _ in range(3)]
        assert {each.result().status_code for each in (alone, *others)} <= {200, 429}
    assert send("1", prompt_logprobs=1).status_code == 200


def test_events_have_the_name_and_vllm_gets_the_derived_options(server: tuple[ServerProcess, dict[str, str]]) -> None:
    running, keys = server
    key, secret = add(running.log.parent / "keys.json", "counted")
    until(lambda: ask(running, secret, "m").status_code == 200)
    for name in ("gpt-4o", CODER, CODER):
        ask(running, secret, name)
    mine = {(key.id, "m"): 2, (key.id, CODER): 2}
    until(lambda: {each: count for each, count in counts(running).items() if each[0] == key.id} == mine, 30)
    info = running.get("/info", keys["admin"]).json()
    found = {each["name"]: each for each in info["adapters"]}
    assert found[POET]["sha256"] != found[CODER]["sha256"]
    assert {(each["rank"], each["bytes"] > 1000) for each in found.values()} == {(4, True)}
    options = info["engine"]["options"]
    assert (options["--max-loras"], options["--max-lora-rank"], options["--max-cpu-loras"]) == ("3", "8", "3")
    paths = dict(each.split("=") for each in options["--lora-modules"].split())
    assert [Path(paths[name]).name for name in found] == [each["sha256"] for each in found.values()]


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (write_base, "a", "adapter a changes nothing: vLLM responds as without it"),
        (make_generator, "poet", "adapter poet is not applied as PEFT does: KL divergence from PEFT in fp32"),
    ],
    ids=["without a reference", "with the reference"],
)
def test_the_server_does_not_start_with_an_adapter_that_vllm_does_not_apply(
    tmp_path: Path, write: Callable[[Path], Path], name: str, reason: str
) -> None:
    base = write(tmp_path / "base")
    adapters = [{"name": name, "source": str(write_adapter(tmp_path / "adapter", base))}]
    spec = write_spec(tmp_path, base, model={"source": str(base), "adapters": adapters})
    server = launch(tmp_path, base, "--spec", spec, "--log", "text")
    try:
        assert server.process.wait(280) == 3
    finally:
        server.kill()
    said = server.log.read_text()
    assert f"error: {reason}" in said
    assert "ready " not in said


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(900)
def test_the_slots_of_vllm_have_the_estimated_size(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        missing("vllm", "vLLM is not installed")
    found: Any = SimpleNamespace(versions=probe.versions())
    paths = generation_server._python_path(tmp_path, found)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = python("-m", "tests.serve.vllm_alone", str(tmp_path), env=os.environ | environment, cwd=ROOT, timeout=500)
    assert int(done.stdout.splitlines()[-1]) == Slots(2, 16).numbers(ModelFolder(tmp_path / "base"))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(900)
def test_openais_client_switches_between_adapters_of_vllm_by_name(tmp_path: Path) -> None:
    # Small, because vLLM computes adapters slowly on CPUs.
    base = make_generator(tmp_path / "base", num_hidden_layers=2, hidden_size=256)
    sources = {name: write_adapter(tmp_path / name, base, seed=number) for number, name in enumerate(("one", "two"))}
    adapters = [{"name": name, "source": str(source)} for name, source in sources.items()]
    for number, name in enumerate(("three", "four"), 2):
        write_adapter(tmp_path / "allowed" / name, base, seed=number)
    secret = add(tmp_path / "keys.json", "admin", admin=True)[1]
    spec = {**SPEC, "model": {"source": str(base), "adapters": adapters}}
    spec["serve"] = {**SPEC["serve"], "adapter_folders": [str(tmp_path / "allowed")], "spare_adapters": 1}
    spec["access"] = {"keys": str(tmp_path / "keys.json"), "open": ["info"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with serving(tmp_path, spec) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0, timeout=300)

            def answer(name: str) -> str:
                found = client.chat.completions.create(**greedy(max_tokens=4) | {"model": name})
                assert found.model == name
                return str(found.choices[0].message.content)

            names = [card.id for card in client.models.list().data]
            assert names == ["smollm2", *sources]
            effects = [each["next_tokens"] for each in server.get("/info").json()["adapters"]]
            # An adapter that vLLM serves as its base would have the distance of the base, and be refused.
            assert all(each["kl"] < 1e-3 < 0.1 < each["kl_base"] for each in effects), effects
            alone = {name: answer(name) for name in names}
            assert len(set(alone.values())) == 3
            mixed = names * 3
            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(answer, mixed)) == [alone[name] for name in mixed]
            shown = {"prompt": [1, 2, 3], "max_tokens": 1, "prompt_logprobs": 1}
            with ThreadPoolExecutor(6) as pool:  # together they would end vLLM's engine
                asked = ({"model": name, **shown} for name in [*names, *names])
                found = pool.map(lambda body: server.post("/v1/completions", body, secret), asked)
                assert {each.status_code for each in found} == {200, 429}
            assert answer("one") == alone["one"]
            with pytest.raises(openai.NotFoundError, match="'three' not found; use 'smollm2' or 'one' or 'two'"):
                answer("three")
            for path in ("load_lora_adapter", "unload_lora_adapter"):
                body = {"lora_name": "one", "lora_path": str(sources["one"])}
                assert server.post(f"/v1/{path}", body, secret).status_code == 404
            check_changes(server, secret, alone, answer)


def check_changes(server: ServerProcess, secret: str, alone: dict[str, str], answer: Callable[[str], str]) -> None:
    """Add and remove other weights under one name, while clients use the other names."""
    ended, said = threading.Event(), []

    def load(name: str) -> None:
        while not ended.is_set():
            said.append((name, answer(name)))

    def post(path: str, **body: str) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {secret}"}
        found = httpx.post(f"{server.url}/adapters{path}", json=body, headers=headers, timeout=280)
        assert found.status_code == 200, found.text
        return dict(found.json())

    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(load, name) for name in alone]
        try:
            for source in ("three", "four"):
                effect = post("", name="new", source=source)["next_tokens"]
                assert effect["kl"] < 1e-3 < 0.1 < effect["kl_base"], effect
                alone[source] = answer("new")
                post("/remove", name="new")
                with pytest.raises(openai.NotFoundError):
                    answer("new")
        finally:
            ended.set()
        for each in loads:
            each.result()
    assert len(set(alone.values())) == 5
    assert {name for name, text in said if text != alone[name]} == set()
    assert len(said) > 9
