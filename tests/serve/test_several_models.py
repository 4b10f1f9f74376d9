"""Several models on one server: each name at each endpoint, by key; limits, ledger and metrics by name; one that crashes.

Two servers with the echo engine, of one and of three API processes, have all cases. Real engines have the vectors.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from inferctl.core.errors import UsageError
from inferctl.serve.api import app
from inferctl.tenancy.metering.ledger import Ledger
from tests import tiny_models
from tests.conftest import TEXTS
from tests.processes import CLIENT, ServerProcess, several, until
from tests.tenancy.key_files import add

ALIAS = "text-embedding-3-small"
TASKS = {"minilm": "embed", "second": "embed", "ranker": "rerank", "moods": "classify"}
EMBED = {"minilm", "second"}
RERANK = ("/v1/rerank", "/v2/rerank", "/jina/v1/rerank", "/rerank", "/voyage/rerank", "/v1/score", "/score")
OWNERS: dict[str, set[str]] = {
    **dict.fromkeys(("/v1/embeddings", "/voyage/embeddings", "/jina/v1/embeddings"), EMBED),
    **dict.fromkeys(("/embed", "/embed_all", "/similarity", "/v1/embed", "/v2/embed"), EMBED),
    **{path: {"ranker"} for path in RERANK},
    **{path: {"moods"} for path in ("/classify", "/predict")},
    "/embed_sparse": set(),
    "/pooling": {*EMBED, "moods"},
    "/": set(TASKS),
    "/tokenize": set(TASKS),
}
# Name -> the models that the key may use, and other fields.
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"models": ["minilm"]},
    "two": {"models": ["second", "moods", "elsewhere"]},
    "none": {"models": ["elsewhere"]},
    "classify": {"endpoints": ["classify", "predict"]},
    "limited": {"requests_per_minute": 30},
    "killed": {},
    "admin": {"admin": True},
}


@dataclass
class Mix:
    server: ServerProcess
    folder: Path
    secrets: dict[str, str]
    ids: dict[str, str]

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, headers={"authorization": f"Bearer {self.secrets[key]}"})

    def recorded(self, key: str) -> Counter[tuple[str, str, int]]:
        """What the ledger has of a key: requests by model, endpoint and status."""
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(UsageError):  # the relay has not made it yet
            ledger = Ledger.read(f"sqlite:///{self.folder}/metering/ledger.sqlite")
            rows = ledger.usage(["key", "model", "endpoint", "status"], 0, 2**62)
            ledger.close()
        mine = (row for row in rows if row["key"] == self.ids[key])
        return Counter({(row["model"], row["endpoint"], int(row["status"])): row["requests"] for row in mine})


@pytest.fixture(scope="module")
def sources(minilm: Path, cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    second = tiny_models.make(minilm, root / "second", "bert", "mean_tokens")
    # The echo engine returns eight numbers for each input.
    moods = tiny_models.make_cross_encoder(root / "moods", "bert", num_labels=8)
    return {"minilm": minilm, "second": second, "ranker": cross_encoder, "moods": moods}


def write_spec(folder: Path, sources: dict[str, Path], processes: int, **sections: Any) -> None:
    models = [{"name": name, "model": {"source": str(source)}} for name, source in sources.items()]
    models[0]["serve"] = {"aliases": [ALIAS]}
    spec = {"name": "mix", "models": models, "serve": {"api_processes": processes}, **sections}
    (folder / "inferctl.yaml").write_text(json.dumps(spec))


@pytest.fixture(scope="module", params=[1, 3])
def mix(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    serve_module: Callable[..., ServerProcess],
) -> Mix:
    folder = tmp_path_factory.mktemp("mix")
    added = {name: add(folder / "keys.json", name, **fields) for name, fields in KEYS.items()}
    access = {"keys": "keys.json", "open": ["metrics", "docs"]}
    write_spec(folder, sources, request.param, access=access, metering={"mode": "on"}, cache={"size": "16MiB"})
    server = serve_module("--spec", "inferctl.yaml", "--engine", "echo", place=folder)
    secrets, ids = ({name: each[i] for name, each in added.items()} for i in (1, 0))
    return Mix(server, folder, secrets, {name: key.id for name, key in ids.items()})  # type: ignore[union-attr]


def endpoint(path: str, model: str | None) -> app.Endpoint:
    """The endpoint of a model, else one of any, to have a body for it."""
    found = [each for each in app.ALL if path in each.paths]
    return next((each for each in found if each.task == TASKS.get(model or "")), found[0])


def expected(path: str, wanted: str | None, models: set[str]) -> tuple[int, str, str]:
    """The status, the code of an error, and the model that computes, of a key with these models."""
    named, here = "minilm" if wanted == ALIAS else wanted, OWNERS[path] & models
    if not here:
        return 404, "unsupported_task", "mix"
    if named is None and len(here) > 1:
        return 400, "model_required", "mix"
    if named is None or named in here:
        return 200, "", named or min(here)
    # A path of one model is that of its endpoint, whatever the name.
    return 404, "model_not_found", min(here) if len(OWNERS[path]) == 1 else "mix"


@pytest.mark.parametrize("key", ["all", "one", "two"])
def test_each_name_at_each_endpoint(mix: Mix, key: str) -> None:
    models = set(KEYS[key].get("models") or TASKS) & TASKS.keys()
    hidden, wrong, events = TASKS.keys() - models, [], Counter[tuple[str, str, int]]()
    with mix.client(key) as client:
        for path in OWNERS:
            for wanted in (*TASKS, ALIAS, "unknown", None):
                status, code, model = expected(path, wanted, models)
                body = endpoint(path, model if status == 200 else wanted).example
                answer = client.post(path, json=body if wanted is None else {"model": wanted, **body})
                found = answer.json()
                error = found.get("error") if isinstance(found, dict) else None
                right = answer.status_code == status and (not isinstance(error, dict) or error["code"] == code)
                named = isinstance(found, dict) and found.get("model", model) != model
                told = [name for name in hidden - {wanted} if status != 200 and name in answer.text]
                if not right or named or told:
                    wrong.append((path, wanted, status, code, model, answer.status_code, answer.text[:200]))
                different = {endpoint(path, owner).name for owner in OWNERS[path]}
                name = "by_model" if model == "mix" and len(different) > 1 else endpoint(path, model).name
                events[model, name, status] += 1
        listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
        shown = {name: client.get(f"/v1/models/{name}").status_code for name in TASKS}
    assert not wrong
    assert set(listed) == models | ({ALIAS} if "minilm" in models else set())
    assert shown == {name: 200 if name in models else 404 for name in TASKS}
    events["mix", "other", 200] += 1 + len(models)
    if hidden:
        events["mix", "other", 404] += len(hidden)
    until(lambda: mix.recorded(key).total() >= events.total())
    assert mix.recorded(key) == events


def test_a_key_for_no_model_and_one_for_other_endpoints(mix: Mix) -> None:
    with mix.client("none") as client:
        assert client.post("/v1/embeddings", json={"input": "a", "model": "minilm"}).status_code == 403
    with mix.client("classify") as client:
        found = [(path, model) for path in ("/", "/pooling", "/classify") for model in ("minilm", "moods")]
        bodies = [{"model": model, **endpoint(path, model).example} for path, model in found]
        answers = [client.post(path, json=body).status_code for (path, _), body in zip(found, bodies, strict=True)]
        assert answers == [403, 200, 403, 200, 404, 200]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"model": "minilm"', {}, 400),
        ('["minilm"]', {}, 400),
        ('{"model": 5, "input": "a"}', {}, 400),
        ('{"model": "second", "input": 5}', {}, 400),
        ('{"model": "second", "input": "a"}', {"content-type": "text/plain"}, 415),
        (json.dumps({"model": "second", "input": "a", "user": "b" * 100_000}), {}, 200),
    ],
)
def test_bodies_at_a_path_of_several_models(mix: Mix, body: str, headers: dict[str, str], status: int) -> None:
    with mix.client("all") as client:
        answer = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"} | headers)
        assert answer.status_code == status


def test_a_limit_is_of_the_key_and_the_ledger_has_the_names(mix: Mix) -> None:
    with ThreadPoolExecutor(8) as pool, mix.client("limited") as client:
        sent = ["minilm", "second", "ranker"] * 20
        requests = [("/v1/rerank" if name == "ranker" else "/v1/embeddings", name) for name in sent]
        ask = lambda path, name: client.post(path, json={"model": name, **endpoint(path, name).example})  # noqa: E731
        answers = list(pool.map(lambda each: ask(*each), requests))
    seen = Counter((name, each.status_code) for name, each in zip(sent, answers, strict=True))
    assert Counter(answer.status_code for answer in answers) == {200: 30, 429: 30}
    until(lambda: mix.recorded("limited").total() == 60)
    good = {(model, status): n for (model, _, status), n in mix.recorded("limited").items() if status == 200}
    assert good == {each: n for each, n in seen.items() if each[1] == 200}


def test_an_engine_that_is_killed_is_that_of_its_model(mix: Mix) -> None:
    def load(name: str) -> Counter[int]:
        path = {"rerank": "/v1/rerank", "classify": "/classify"}.get(TASKS[name], "/v1/embeddings")
        found, number = Counter[int](), 0
        with mix.client("killed") as client:
            while not done.is_set():
                number += 1
                body = {"model": name, **endpoint(path, name).example, "user": str(number)}
                found[client.post(path, json=body, headers={"cache-control": "no-cache"}).status_code] += 1
                begun[name].set()
        return found

    def info() -> dict[str, Any]:
        with mix.client("admin") as client:
            return {each["name"]: each for each in client.get("/info").json()["models"]}

    done, begun = threading.Event(), {name: threading.Event() for name in TASKS}
    before = {name: each["restarts"] for name, each in info().items()}
    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(load, name) for name in TASKS}
        try:
            assert all(event.wait(60) for event in begun.values())
            engines = mix.server.children("inferctl.serve.engine_process.engine_main")
            os.kill(engines[list(TASKS).index("ranker")], signal.SIGKILL)
            until(lambda: not mix.server.metric("inferctl_engine_up", model="ranker"))
            assert mix.server.get("/readyz").status_code == 200
            until(lambda: mix.server.metric("inferctl_engine_up", model="ranker"))
        finally:
            done.set()
    seen = {name: each.result() for name, each in running.items()}
    assert seen.pop("ranker").keys() <= {200, 503}
    assert all(each.keys() == {200} for each in seen.values())
    after = {name: each["restarts"] - before[name] for name, each in info().items()}
    assert after == {"minilm": 0, "second": 0, "ranker": 1, "moods": 0}
    assert {each["phase"] for each in info().values()} == {"ready"}


def test_the_document_names_the_models(mix: Mix) -> None:
    found = mix.server.get("/openapi.json").json()
    schemas = found["components"]["schemas"]
    assert schemas["EmbeddingRequest"]["properties"]["model"]["enum"] == ["minilm", ALIAS, "second"]
    assert "model" in schemas["EmbeddingRequest"]["required"] and "model" not in schemas["RerankRequest"]["required"]
    assert {path for path, methods in found["paths"].items() if "post" in methods} == {p for p in OWNERS if OWNERS[p]}
    assert mix.server.get("/docs").status_code == 200


@pytest.mark.slow
@pytest.mark.xdist_group("minilm")
def test_outputs_are_those_of_servers_of_one_model(
    minilm_server: ServerProcess, sources: dict[str, Path], tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    own = {name: sources[name] for name in ("minilm", "ranker")}
    write_spec(tmp_path, own, 3)
    mixed = serve("--spec", "inferctl.yaml", "--precision", "fp32")
    alone = serve("--model", str(sources["ranker"]), "--precision", "fp32", place=tmp_path / "..")
    vectors = {"input": TEXTS, "encoding_format": "base64"}
    pairs = {"query": TEXTS[0], "documents": TEXTS[1:]}
    for one, path, body, key in (
        (minilm_server, "/v1/embeddings", vectors, "data"),
        (alone, "/v1/rerank", pairs, "results"),
    ):
        found = [CLIENT.post(f"{server.url}{path}", json=body).json()[key] for server in (mixed, one)]
        assert found[0] == found[1]


def test_what_several_models_do_not_go_with(sources: dict[str, Path], minilm: Path, tmp_path: Path) -> None:
    generator = tmp_path / "generator"
    generator.mkdir()
    (generator / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    save_file({"a": np.zeros(1, np.float32)}, generator / "model.safetensors")
    write_spec(tmp_path, {"minilm": minilm, "writer": generator}, 1)
    (tmp_path / "pair").mkdir()
    write_spec(tmp_path / "pair", {"minilm": minilm, "second": sources["second"]}, 1)
    pair = ["serve", "-f", str(tmp_path / "pair" / "inferctl.yaml")]
    commands = [
        ["serve", "-f", str(tmp_path / "inferctl.yaml")],
        [*pair, "--model", str(minilm)],
        [*pair, "--capacity", str(tmp_path / "capacity.json")],
    ]
    for done, words in zip(several(commands), ("writer is of the task generate", "--model", "--capacity"), strict=True):
        assert done.returncode == 2 and words in done.stderr
