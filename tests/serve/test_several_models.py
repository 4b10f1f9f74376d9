"""Several models on one server: each name at each endpoint, by key; limits, ledger, metrics by name; one that crashes.

Two servers with the echo engine, of one and of three API processes, have all cases. Real engines have the vectors.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from inferctl.config.spec import Spec
from inferctl.reading import task_config
from inferctl.serve.api import app
from inferctl.serve.api.inference import Inference
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.edge.errors import ApiError
from inferctl.serve.edge.request_context import RequestContext
from inferctl.serve.text.tokenizer_pool import TokenizerPool
from inferctl.serve.work import Work
from inferctl.tenancy.access.key_file import ApiKey
from tests import tiny_models
from tests.conftest import TEXTS
from tests.processes import ServerProcess, several, until
from tests.tenancy.key_files import add

ALIAS = "text-embedding-3-small"
TASKS = {"minilm": "embed", "second": "embed", "ranker": "rerank", "moods": "classify"}
# Path -> task of the models that have it -> name of the endpoint in events.
SERVED = {
    path: dict(each.split("=") for each in what.split())
    for what, paths in {
        "embed=embeddings": "/v1/embeddings /voyage/embeddings /jina/v1/embeddings /embed /embed_all /similarity "
        "/v1/embed /v2/embed",
        "rerank=rerank": "/v1/rerank /v2/rerank /jina/v1/rerank /rerank /voyage/rerank",
        "rerank=score": "/v1/score /score",
        "classify=classify": "/classify",
        "classify=predict": "/predict",
        "embed=embeddings classify=classify": "/pooling",
        "embed=embeddings rerank=rerank classify=predict": "/",
        "embed=tokenize rerank=tokenize classify=tokenize": "/tokenize",
        "": "/embed_sparse",
    }.items()
    for path in paths.split()
}
PATHS = {"embed": "/v1/embeddings", "rerank": "/v1/rerank", "classify": "/classify"}
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"models": ["minilm"]},
    "two": {"models": ["second", "moods", "elsewhere"]},
    "none": {"models": ["elsewhere"]},
    "classify": {"endpoints": ["classify", "predict"]},
    "limited": {"requests_per_minute": 30},
    "admin": {"admin": True},
}


@dataclass
class Mix:
    server: ServerProcess
    keys: dict[str, tuple[ApiKey, str]]

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.server.url, headers={"authorization": f"Bearer {self.keys[key][1]}"})

    def recorded(self, key: str, count: str = "requests") -> Counter[tuple[str, str, int]]:
        """What the ledger has of a key: requests or tokens by model, endpoint and status."""
        rows = self.server.usage("key", "model", "endpoint", "status")
        mine = (row for row in rows if row["key"] == self.keys[key][0].id)
        return Counter({(row["model"], row["endpoint"], int(row["status"])): row[count] for row in mine})


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
    keys = {name: add(folder / "keys.json", name, **fields) for name, fields in KEYS.items()}
    access = {"keys": "keys.json", "open": ["metrics", "docs"]}
    serve = {"api_processes": request.param, "max_input_tokens": 64}
    more = {"access": access, "metering": {"mode": "on"}, "cache": {"size": "16MiB"}, "serve": serve}
    write_spec(folder, sources, request.param, **more)
    return Mix(serve_module("--spec", "inferctl.yaml", "--engine", "echo", place=folder), keys)


def body(path: str, model: str | None) -> dict[str, Any]:
    """A body for a model, if it has the path, else of any that has it."""
    found = [each for each in app.ALL if path in each.paths]
    example = next((each for each in found if each.task == TASKS.get(model or "")), found[0]).example
    return example if model is None else {"model": model, **example}


def expected(path: str, wanted: str | None, models: set[str]) -> tuple[int, str, str, str]:
    """The status, the code of an error, and model and endpoint in the ledger, for a key with these models."""
    tasks, named = SERVED[path], "minilm" if wanted == ALIAS else wanted
    here = {name for name in models if TASKS[name] in tasks}
    different = set(tasks.values())
    unknown = "mix", different.pop() if len(different) == 1 else "by_model" if different else "embeddings"
    if not here:
        return 404, "unsupported_task", *unknown
    if named is None and len(here) > 1:
        return 400, "model_required", *unknown
    if named is None or named in here:
        model = named or min(here)
        return 200, "", model, tasks[TASKS[model]]
    # A path of one model is that of its endpoint, whatever the name.
    alone = sum(task in tasks for task in TASKS.values()) == 1
    return 404, "model_not_found", min(here) if alone else "mix", unknown[1]


@pytest.mark.parametrize("key", ["all", "one", "two"])
def test_each_name_at_each_endpoint(mix: Mix, key: str) -> None:
    models = set(KEYS[key].get("models") or TASKS) & TASKS.keys()
    hidden, wrong, events = TASKS.keys() - models, [], Counter[tuple[str, str, int]]()
    with mix.client(key) as client:
        for path in SERVED:
            for wanted in (*TASKS, ALIAS, "unknown", None):
                status, code, model, name = expected(path, wanted, models)
                sent = body(path, model if status == 200 else wanted) | ({"model": wanted} if wanted else {})
                answer = client.post(path, json=sent if wanted else {**sent, "model": None})
                found = answer.json() if isinstance(answer.json(), dict) else {}
                error = found.get("error")
                right = answer.status_code == status and (not isinstance(error, dict) or error["code"] == code)
                told = [each for each in hidden - {wanted} if status != 200 and each in answer.text]
                if not right or told or found.get("model", model) != model:
                    wrong.append((path, wanted, status, code, model, answer.status_code, answer.text[:200]))
                events[model, name, status] += 1
        listed = {each["id"] for each in client.get("/v1/models").json()["data"]}
        shown = {name: client.get(f"/v1/models/{name}").status_code for name in TASKS}
    assert not wrong
    assert listed - {ALIAS} == models and (ALIAS in listed) == ("minilm" in models)
    assert shown == {name: 200 if name in models else 404 for name in TASKS}
    events |= {("mix", "other", 200): 1 + len(models), ("mix", "other", 404): len(hidden)}
    until(lambda: mix.recorded(key).total() >= events.total())
    assert mix.recorded(key) == +events


def test_each_model_has_its_space_in_each_process(mix: Mix) -> None:
    with mix.client("all") as client:
        found = {each["id"]: each.get("spaces") for each in client.get("/v1/models").json()["data"]}
    names = {model: found[model]["dense"] for model in ("minilm", "second")}
    assert len(set(names.values())) == 2 and found["ranker"] is found["moods"] is None
    assert found[ALIAS] == found["minilm"]
    for _ in range(6):  # each connection goes to one process
        with mix.client("all") as client:
            for model, name in names.items():
                for other in names.values():
                    asked = {"model": model, "input": "a"}
                    response = client.post("/v1/embeddings", json=asked, headers={"x-inferctl-space": other})
                    assert response.status_code == (200 if other == name else 412)
                    assert response.headers["x-inferctl-space"] == name
            ranked = client.post("/v1/rerank", json=body("/v1/rerank", None), headers={"x-inferctl-space": "other"})
            assert (ranked.status_code, "x-inferctl-space" in ranked.headers) == (200, False)


def test_a_key_for_no_model_and_one_for_other_endpoints(mix: Mix) -> None:
    with mix.client("none") as client:
        assert client.post("/v1/embeddings", json={"input": "a", "model": "minilm"}).status_code == 403
    with mix.client("classify") as client:
        both = [(path, model) for path in ("/", "/pooling", "/classify") for model in ("minilm", "moods")]
        answers = [client.post(path, json=body(path, model)).status_code for path, model in both]
        assert answers == [403, 200, 403, 200, 404, 200]


def test_bodies_at_a_path_of_several_models(mix: Mix) -> None:
    cases = {
        '{"model": "minilm"': 400,
        '["minilm"]': 400,
        '{"model": 5, "input": "a"}': 400,
        '{"model": "second", "input": 5}': 400,
        '{"model": "", "input": "a"}': 400,
        json.dumps({"model": "second", "input": "a", "user": "b" * 100_000}): 200,
    }
    with mix.client("admin") as client:
        found = {content: client.post("/v1/embeddings", content=content).status_code for content in cases}
        assert found == cases
        answer = client.post("/v1/embeddings", json={"input": "a"}, headers={"content-type": "text/plain"})
        assert answer.status_code == 415
        long = client.post("/v1/embeddings", json={"model": "second", "input": "a " * 200}).json()
        assert long["usage"]["total_tokens"] == 64  # by the setting of the whole server


def ask(client: httpx.Client, name: str) -> httpx.Response:
    path = PATHS[TASKS[name]]
    return client.post(path, json=body(path, name), headers={"cache-control": "no-cache"})


def test_a_limit_is_of_the_key_and_the_ledger_has_the_names(mix: Mix) -> None:
    with ThreadPoolExecutor(8) as pool, mix.client("limited") as client:
        answers = list(pool.map(lambda name: (name, ask(client, name)), list(TASKS) * 15))
    good = [(name, answer.json()) for name, answer in answers if answer.status_code == 200]
    assert len(good) == 30
    until(lambda: mix.recorded("limited").total() == 60)
    assert {model for model, _, status in mix.recorded("limited") if status == 429} == {"mix"}
    for model in TASKS:
        mine = [answer["usage"]["total_tokens"] for name, answer in good if name == model]
        event = model, SERVED[PATHS[TASKS[model]]][TASKS[model]], 200
        both = [mix.recorded("limited", column)[event] for column in ("requests", "input_tokens")]
        assert both == [len(mine), sum(mine)]


def test_an_engine_that_is_killed_is_that_of_its_model(mix: Mix) -> None:
    def load(name: str) -> Counter[int]:
        found = Counter[int]()
        with mix.client("admin") as client:
            while not done.is_set():
                found[ask(client, name).status_code] += 1
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
            until(lambda: mix.server.metric("inferctl_engine_restarts", model="ranker") > before["ranker"])
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
    assert "the engine process of ranker was killed by signal 9" in mix.server.log.read_text()


def test_requests_for_a_model_that_hangs_leave_room_for_another(minilm: Path) -> None:
    submitted = Counter[int]()

    class Hangs:
        """A backend whose engines do not respond."""

        def submit(self, number: int, work: Work) -> asyncio.Future[None]:
            submitted[work.model] += 1
            return asyncio.get_running_loop().create_future()

    async def main() -> list[int]:
        config, found = task_config.read("embed", minilm, None), []
        for number, name in enumerate("ab"):
            spec = Spec.model_validate({"name": name, "model": {"source": str(minilm)}})
            model = ServedModel.of(spec, config, False, number)
            found.append(Inference(model, TokenizerPool(minilm, config), Hangs()))  # type: ignore[arg-type]
        route = app.create("mix", found, 5)

        async def ask(name: str) -> int:
            scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "state": {}}
            RequestContext.of(scope, "embeddings")
            content = {"type": "http.request", "body": json.dumps({"model": name, "input": "a"}).encode()}
            try:
                await route(scope, partial(asyncio.sleep, 0, content), None)  # type: ignore[arg-type]
            except ApiError as error:
                return error.status
            return 200

        asked = [asyncio.create_task(ask(name)) for name in "aaaaaaaab"]
        while sum(task.done() for task in asked) + submitted.total() < len(asked):
            await asyncio.sleep(0.01)
        return [task.result() for task in asked if task.done()]

    assert asyncio.run(main()) == [429] * 4 and submitted == {0: 4, 1: 1}


def test_the_document_names_the_models(mix: Mix) -> None:
    found = mix.server.get("/openapi.json").json()
    schemas = found["components"]["schemas"]
    assert schemas["EmbeddingRequest"]["properties"]["model"]["enum"] == ["minilm", ALIAS, "second"]
    assert "model" in schemas["EmbeddingRequest"]["required"] and "model" not in schemas["RerankRequest"]["required"]
    assert {path for path, methods in found["paths"].items() if "post" in methods} == {p for p in SERVED if SERVED[p]}
    assert mix.server.get("/docs").status_code == 200


@pytest.mark.slow
def test_outputs_are_those_of_servers_of_one_model(
    minilm_server: ServerProcess, sources: dict[str, Path], tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    own = {name: sources[name] for name in ("minilm", "ranker")}
    write_spec(tmp_path, own, 3)
    mixed = serve("--spec", "inferctl.yaml", "--precision", "fp32")
    alone = serve("--model", str(sources["ranker"]), "--precision", "fp32", place=tmp_path / "..")
    for one, path, sent, key in (
        (minilm_server, "/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}, "data"),
        (alone, "/v1/rerank", {"query": TEXTS[0], "documents": TEXTS[1:]}, "results"),
    ):
        found = [server.post(path, sent).json()[key] for server in (mixed, one)]
        assert found[0] == found[1]


def test_what_several_models_do_not_go_with(sources: dict[str, Path], minilm: Path, tmp_path: Path) -> None:
    generator = tmp_path / "generator"
    generator.mkdir()
    (generator / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    save_file({"a": np.zeros(1, np.float32)}, generator / "model.safetensors")
    pair = tmp_path / "pair"
    pair.mkdir()
    write_spec(tmp_path, {"minilm": minilm, "writer": generator}, 1)
    write_spec(pair, {"minilm": minilm, "second": sources["second"]}, 1)
    options = ((tmp_path,), (pair, "--model", str(minilm)))
    commands = [["serve", "-f", str(folder / "inferctl.yaml"), *more] for folder, *more in options]
    for done, words in zip(several(commands), ("writer is of the task generate", "--model"), strict=True):
        assert done.returncode == 2 and words in done.stderr
