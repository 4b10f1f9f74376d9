"""The real vLLM behind the edge, asked by common clients. `make generator` creates the model."""

from __future__ import annotations

import asyncio
import importlib.util
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

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferctl.serve.generate.protocols import ENDPOINTS
from tests.conftest import ROOT
from tests.packages import install
from tests.processes import ServerProcess, execute, python, until
from tests.required import missing
from tests.serve.random_requests import TOOLS, Asked, Clients

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
        # Without compilation, the start takes half the time. A sampled answer fills the context now and then.
        "vllm_options": [
            *["--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
            *["--override-generation-config", '{"temperature": 0}'],
        ],
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
    return [line for line in lines if line["message"] == "request" and line["endpoint"] in ENDPOINTS.values()]


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


def test_usage_of_each_api_is_what_vllm_reports_also_of_clients_that_left(server: ServerProcess) -> None:
    requests = [Asked.number(number) for number in range(60)]
    computed = server.metric("vllm:generation_tokens_total")
    seen = asyncio.run(Clients(server.url).run(requests, 4))
    until(lambda: {asked.id for asked in requests} <= {event["request_id"] for event in events(server)}, 60)
    found = {event["request_id"]: event for event in events(server)}
    for asked, of_client in zip(requests, seen, strict=True):
        event = found[asked.id]
        if of_client.left:
            assert event["status"] in (200, 499) and event["output_tokens"] >= of_client.output, asked
        else:
            used = (event["status"], event["tokens"], event["output_tokens"])
            assert used == (200, of_client.prompt, of_client.output), asked
    assert {found[asked.id]["status"] for asked in requests if asked.leaves} == {499}
    counted = sum(found[asked.id]["output_tokens"] for asked in requests)
    assert counted == server.metric("vllm:generation_tokens_total") - computed


def test_errors_have_their_status_and_openais_envelope(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="use 'smollm2'"):
        client.chat.completions.create(**greedy() | {"model": "another"})
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
        client.completions.create(model="smollm2", prompt="word " * 3000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**greedy(stream=True) | {"temperature": -1})
    with pytest.raises(openai.NotFoundError, match="keeps no responses; POST to /v1/chat/completions"):
        client.responses.retrieve("resp_1")


IMAGE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
REMOVED = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "geheim"}}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("responses", {"input": "word " * 3000}, "context_length_exceeded"),
        ("responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
        (
            "responses",
            {"input": "a", "tools": [{"type": "custom", "name": "a", "format": {"type": "grammar"}}]},
            "gram",
        ),
        ("messages", {"messages": [{"role": "user", "content": "word " * 3000}]}, "context_length_exceeded"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": IMAGE}]}]}, "multimodal"),
        ("messages", {"messages": [{"role": "system", "content": [REMOVED]}]}, "not declared"),
        ("messages", {"messages": QUESTION, "max_tokens": None}, "max_tokens"),
        ("messages/count_tokens", {"messages": [{"role": "geheim", "content": "a"}]}, "role"),
    ],
)
def test_what_vllm_rejects_has_the_shape_of_the_api(
    server: ServerProcess, path: str, body: dict[str, Any], said: str
) -> None:
    limit = {"max_tokens": 4} if path == "messages" else {}
    response = httpx.post(f"{server.url}/v1/{path}", json={"model": "smollm2", **limit, **body}, timeout=60)
    document = response.json()
    assert (response.status_code, document["error"]["type"]) == (400, "invalid_request_error")
    assert said in str(document["error"])
    assert document.get("type") == (None if path == "responses" else "error")
    assert "geheim" not in server.log.read_text()


def test_official_clients_of_agents(server: ServerProcess) -> None:
    claude = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    options: dict[str, Any] = {"model": "smollm2", "max_tokens": 16, "messages": QUESTION}
    message = claude.messages.create(**options, extra_body={"temperature": 0})
    with claude.messages.stream(**options, extra_body={"temperature": 0}) as stream:
        assert stream.get_final_message().content[0].text == message.content[0].text
    assert "Paris" in message.content[0].text
    counted = claude.messages.count_tokens(model="smollm2", messages=QUESTION)
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    forced: Any = {
        "tools": [TOOLS["messages"] | {"strict": True}],
        "tool_choice": {"type": "tool", "name": "weather"},
        "max_tokens": 200,
    }
    with claude.messages.stream(**options | forced, extra_body={"temperature": 0}) as stream:
        called = stream.get_final_message()
    assert (called.stop_reason, called.content[0].type) == ("tool_use", "tool_use")
    assert set(called.content[0].input) == {"city"}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    response = client.responses.create(model="smollm2", input=QUESTION, temperature=0)
    with client.responses.stream(model="smollm2", input=QUESTION, temperature=0) as events:
        assert events.get_final_response().output_text == response.output_text
    assert "Paris" in response.output_text


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


@pytest.mark.parametrize(
    ("style", "names"),
    [
        # The others: images, which the model does not read, a request without a model, which the edge accepts, and a
        # system prompt whose answer often fills the context.
        ("openai-chat", "basic-response multi-turn tool-calling streaming-response streaming-usage"),
        # vLLM leaves out optional fields of whole messages, which Anthropic's document requires.
        ("anthropic", "streaming-response streaming-usage error-handling"),
    ],
)
def test_llm_comply(server: ServerProcess, style: str, names: str) -> None:
    command = shutil.which("llm-comply", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("llm-comply is not installed")
    options = ["--base-url", f"{server.url}/v1", "--api-key", "unused", "--model", "smollm2", "--format", style]
    # vLLM sends optional fields as null, where OpenAI's document has no null.
    prefix = {"openai-chat": "chat", "anthropic": "anth"}[style]
    options += ["--filter", ",".join(f"{prefix}-{name}" for name in names.split()), "--ignore", "None is not"]
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
            "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *command, cwd=tmp_path, timeout=600, code=0
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
    claude = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    long: dict[str, Any] = {"model": "smollm2", "stream": True, "extra_body": {"temperature": 1, "ignore_eos": True}}
    streams: list[Any] = [
        client.chat.completions.create(max_tokens=1500, messages=QUESTION, **long),
        client.responses.create(max_output_tokens=1500, input=QUESTION, **long),
        claude.messages.create(max_tokens=1500, messages=QUESTION, **long),
    ]
    for stream in streams:
        next(iter(stream))
    group = str(server.engine_pid())
    engines = execute("pgrep", "-g", group, "-f", "^VLLM::EngineCore", code=0)
    os.kill(int(engines.stdout), signal.SIGKILL)
    for stream in streams:
        with pytest.raises((openai.APIError, anthropic.APIError), match="engine was lost"):
            list(stream)
    until(lambda: server.readiness()[0] == 503, 30)
    until(lambda: server.readiness()[0] == 200, 250)
    assert "Paris" in client.chat.completions.create(**greedy()).choices[0].message.content
    assert "starting it again" in server.log.read_text()
