"""The real vLLM behind the edge, asked by common clients. `make generator` creates the model."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.packages import install
from tests.processes import ServerProcess, execute, python, until
from tests.required import missing

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.xdist_group("vllm"), pytest.mark.timeout(900)]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
SPEC: dict[str, Any] = {
    "name": "smollm2",
    "model": {"source": str(MODEL)},
    "serve": {
        # In bf16, the answers of so small a model depend on the CPU: with AMX, it names no capital.
        "precision": "fp32",
        "max_context_tokens": 2048,
        "kv_cache": "1GiB",
        "port": 0,
        # Without compilation, the start takes half the time.
        "vllm_options": ["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
    },
}


@contextmanager
def serving(folder: Path, spec: dict[str, Any]) -> Iterator[ServerProcess]:
    """Run a server of `spec`; skip the test if there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        missing("vllm", "vLLM is not installed")
    if not (MODEL / "model.safetensors").exists():
        pytest.skip("the model is not there: make generator")
    (folder / "inferctl.yaml").write_text(json.dumps(spec))
    server = ServerProcess.launch(folder, "inferctl.serve", "--spec", "inferctl.yaml", "--log", "json")
    try:
        yield server.wait_announced(600)  # on a busy machine
        size = server.log.stat().st_size
        assert server.stop(seconds=30) == 0
        assert "Traceback" not in (said := server.log.read_bytes()[size:].decode()), said
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("vllm"), SPEC) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300)


def events(server: ServerProcess) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == "request" and line["endpoint"] in ("chat", "completions")]


def greedy(stream: bool = False, **options: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": QUESTION, "max_tokens": 16, "temperature": 0, "stream": stream, **options}


def test_openai_answers_with_and_without_a_stream(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**greedy())
    assert "Paris" in plain.choices[0].message.content
    chunks = list(client.chat.completions.create(**greedy(stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)
    with client.chat.completions.stream(**{k: v for k, v in greedy().items() if k != "stream"}) as stream:
        assert stream.get_final_completion().choices[0].message.content == plain.choices[0].message.content
    text = client.completions.create(model="smollm2", prompt="The capital of France is", max_tokens=4, temperature=0)
    assert text.usage is not None
    assert text.usage.completion_tokens == 4
    assert [each.id for each in client.models.list().data] == ["smollm2"]


def test_the_metrics_of_dashboards_and_alerts_exist(server: ServerProcess, client: openai.OpenAI) -> None:
    client.chat.completions.create(**greedy())
    families = text_string_to_metric_families(server.get("/metrics").text)
    exposed = {sample.name for family in families for sample in family.samples}
    assert any(name.startswith("vllm:") for name in exposed)
    assert server.metric("inferctl_offered_tokens_total", basis="estimated") > 0
    assert server.metric("inferctl_requests_waiting") == server.metric("inferctl_queue_tokens") == 0


def test_usage_equals_what_the_clients_saw_also_of_those_that_left(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    before = len(events(server))
    options = {"max_tokens": 400, "temperature": 1, "extra_body": {"ignore_eos": True, "n": 2}}
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    received = []
    for _ in range(3):
        stream = client.chat.completions.create(**greedy(stream=True, stream_options=continuous) | options)
        last: dict[int, int] = {}
        for number, chunk in enumerate(stream):
            last[chunk.choices[0].index] = chunk.usage.completion_tokens
            if number == 12:
                break
        stream.close()
        received.append(sum(last.values()))
    until(lambda: len(events(server)) == before + 3, 20)
    left = events(server)[before:]
    assert [(event["status"], event["code"]) for event in left] == [(499, "client_disconnected")] * 3
    # Some tokens were on their way when the client left, more on a busy machine, but far from all 800.
    more = [event["output_tokens"] - seen for event, seen in zip(left, received, strict=True)]
    assert 0 <= min(more) <= max(more) <= 200, more
    complete = client.chat.completions.create(**greedy() | {"temperature": 1, "extra_body": {"n": 2}})
    until(lambda: len(events(server)) == before + 4, 20)
    assert events(server)[-1]["output_tokens"] == complete.usage.completion_tokens


@pytest.mark.parametrize(("most", "code"), [(60, "client_disconnected"), (1500, "usage_estimated")])
@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
def test_a_client_that_leaves_before_a_plain_response_is_counted(
    server: ServerProcess, endpoint: str, most: int, code: str
) -> None:
    before, computed = len(events(server)), server.metric("vllm:generation_tokens_total")
    prompt = {"prompt": ["France", "Italy"]} if endpoint == "completions" else {"messages": QUESTION, "n": 2}
    body = {"model": "smollm2", "max_tokens": most, "ignore_eos": True, "temperature": 1, **prompt}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/{endpoint}", json=body, timeout=0.3)
    until(lambda: len(events(server)) == before + 1)
    until(lambda: server.metric("vllm:num_requests_running") == 0, 20)
    (left,) = events(server)[before:]
    assert (left["status"], left["code"], left["output_tokens"]) == (499, code, 2 * most)
    generated = server.metric("vllm:generation_tokens_total") - computed
    assert generated == 2 * most if code == "client_disconnected" else generated < most


def test_errors_have_their_status_and_openais_envelope(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="use 'smollm2'"):
        client.chat.completions.create(**greedy() | {"model": "another"})
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
        client.completions.create(model="smollm2", prompt="word " * 3000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**greedy(stream=True) | {"temperature": -1})
    with pytest.raises(openai.NotFoundError, match="no such endpoint; POST to /v1/chat/completions"):
        client.responses.create(model="smollm2", input="hi")


LLAMAINDEX = """
import sys
from llama_index.llms.openai_like import OpenAILike
options = {"api_base": sys.argv[1], "api_key": "unused", "is_chat_model": True, "max_tokens": 16, "temperature": 0}
model = OpenAILike(model="smollm2", **options)
print(model.complete("What is the capital of France?").text)
print(list(model.stream_complete("What is the capital of France?"))[-1].text)
"""
LITELLM = """
import sys, litellm
options = {"model": "openai/smollm2", "api_base": sys.argv[1], "api_key": "unused", "max_tokens": 16, "temperature": 0}
options["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
print(litellm.completion(**options).choices[0].message.content)
print("".join(part.choices[0].delta.content or "" for part in litellm.completion(stream=True, **options)))
"""


@pytest.fixture(scope="module")
def older_clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with clients that require an older version of the package openai, in a folder of their own."""
    folder = str(tmp_path_factory.mktemp("clients"))
    install(sys.executable, "--target", folder, "litellm", "llama-index-llms-openai-like")
    return os.environ | {"PYTHONPATH": folder}


@pytest.mark.parametrize("script", [LLAMAINDEX, LITELLM], ids=["llamaindex", "litellm"])
def test_clients_with_an_older_openai(server: ServerProcess, older_clients: dict[str, str], script: str) -> None:
    done = python("-c", script, f"{server.url}/v1", env=older_clients, code=0)
    answer, stream = done.stdout.splitlines()
    assert "Paris" in answer
    assert "Paris" in stream


def test_llm_comply(server: ServerProcess) -> None:
    command = shutil.which("llm-comply", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("llm-comply is not installed")
    options = ["--base-url", f"{server.url}/v1", "--api-key", "unused", "--model", "smollm2", "--format", "openai-chat"]
    # The others: images, which the model does not read, a request without a model, which vLLM accepts, and a system
    # prompt whose answer often fills the context.
    names = ("basic-response", "multi-turn", "tool-calling", "streaming-response", "streaming-usage")
    # vLLM sends optional fields as null, where OpenAI's document has no null.
    options += ["--filter", ",".join(f"chat-{name}" for name in names), "--ignore", "None is not"]
    execute(command, *options, "--timeout", "120", "--json", timeout=280, code=0)


def test_schemathesis_finds_no_failures(tmp_path: Path) -> None:
    # vLLM generates up to the context for each valid example, so it has one layer of 30.
    smaller = ["--hf-overrides", '{"num_hidden_layers": 1}', "--load-format", "dummy"]
    serve = {**SPEC["serve"], "max_context_tokens": 128}
    serve["vllm_options"] = [*serve["vllm_options"], *smaller]
    command = ["--no-color", "--seed", "1", "--max-examples", "10", "--request-timeout", "60"]
    command += ["--generation-database", "none", "--checks", "not_a_server_error"]
    with serving(tmp_path, {**SPEC, "serve": serve}) as server:
        done = python(
            "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *command, cwd=tmp_path, timeout=250, code=0
        )
        generated = re.search(r"(\d+) generated, \1 passed", done.stdout)
        assert generated and int(generated[1]) > 1000
        assert server.get("/readyz").status_code == 200


def test_clients_that_vanish_in_mid_stream_free_their_sequences(server: ServerProcess) -> None:
    before = len(events(server))

    async def vanish(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            **greedy(stream=True) | {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
        )
        await anext(stream)
        await stream.close()

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120) as client:
            await asyncio.gather(*(vanish(client) for _ in range(40)))

    asyncio.run(run())
    running = "vllm:num_requests_running"
    until(lambda: server.metric(running) == server.metric("vllm:num_requests_waiting") == 0, 30)
    until(lambda: len(events(server)) == before + 40, 20)
    codes = Counter(event["code"] for event in events(server)[before:])
    assert codes == {"client_disconnected": 40}


def test_a_killed_engine_is_replaced_and_no_stream_ends_silently(server: ServerProcess, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        **greedy(stream=True) | {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    )
    next(iter(stream))
    group = str(server.engine_pid())
    engines = execute("pgrep", "-g", group, "-f", "^VLLM::EngineCore", code=0)
    os.kill(int(engines.stdout), signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    until(lambda: server.readiness()[0] == 503, 30)
    until(lambda: server.readiness()[0] == 200, 250)
    assert "Paris" in client.chat.completions.create(**greedy()).choices[0].message.content
    assert "starting it again" in server.log.read_text()


def test_a_client_gets_at_most_16_tokens_in_one_event(server: ServerProcess) -> None:
    body = {"model": "smollm2", "messages": QUESTION, "max_tokens": 40, "ignore_eos": True, "stream": True}
    body |= {"stream_interval": 1000, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    text = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert (counts[0], counts[-1]) == (0, 40)
    assert max(b - a for a, b in itertools.pairwise(counts)) == 16
