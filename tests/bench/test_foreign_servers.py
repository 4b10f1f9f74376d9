"""Tests of servers other than inferctl, in their default configuration: vLLM, infinity and text-embeddings-inference.

Paths, pages and shapes of the responses are those of their documentation (of infinity 0.0.78: as recorded from it).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferctl import cli
from inferctl.bench.load import http_json, target
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from tests.http_servers import Handler, serving
from tests.processes import inferctl

KEY = "sk-7f3a9c-secret"
VECTOR = [0.6, 0.8]
MODEL = "BAAI/bge-small-en-v1.5"
Body = dict[str, Any]
Answer = tuple[int, Any, dict[str, str]]


def openai(body: Body, one_format: bool = False) -> Answer:
    """Return the response of POST /v1/embeddings. `one_format`: as an older server that ignores encoding_format."""
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    packed = base64.b64encode(struct.pack("<2f", *VECTOR)).decode()
    in_base64 = body.get("encoding_format") == "base64" and not one_format
    rows = [
        {"object": "embedding", "index": number, "embedding": packed if in_base64 else VECTOR}
        for number in range(len(texts))
    ]
    usage = {"prompt_tokens": 7 * len(texts), "total_tokens": 7 * len(texts)}
    return 200, {"object": "list", "data": rows, "model": body.get("model"), "usage": usage}, {}


def vllm(path: str, body: Body | None) -> Answer:
    if path == "/v1/models":
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "root": MODEL, "max_model_len": 512}
        return 200, {"object": "list", "data": [model]}, {}
    if path == "/v1/embeddings" and body:
        if body["model"] != MODEL:
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}, {}
        return openai(body)
    return 404, {"detail": "Not Found"}, {}


def infinity(path: str, body: Body | None) -> Answer:
    if path == "/models":
        model = {"id": MODEL, "stats": {"batch_size": 32}, "object": "model", "owned_by": "infinity", "created": 1}
        return 200, {"data": [{**model, "backend": "torch", "capabilities": ["embed"]}], "object": "list"}, {}
    return openai(body) if path == "/embeddings" and body else (404, {"detail": "Not Found"}, {})


def tei(path: str, body: Body | None, routes: tuple[str, ...] = ("/embed", "/embeddings", "/v1/embeddings")) -> Answer:
    if path == "/info":
        limits = {"max_concurrent_requests": 512, "max_input_length": 512, "max_batch_tokens": 16384}
        kind = {"model_type": {"embedding": {"pooling": "cls"}}, "version": "1.7.1"}
        return 200, {"model_id": MODEL, "model_sha": None, "model_dtype": "float16", **limits, **kind}, {}
    if path not in routes or not body:
        return 404, {}, {}
    if path != "/embed":
        return openai(body, one_format=True)
    return 200, [VECTOR for _ in body["inputs"]], {"x-compute-tokens": str(7 * len(body["inputs"]))}


def only_embed(path: str, body: Body | None) -> Answer:
    return tei(path, body, ("/embed",))


def strict(path: str, body: Body | None) -> Answer:
    """Respond as a server that rejects unknown keys."""
    if body and "encoding_format" in body:
        return 422, {"detail": "encoding_format: extra inputs are not permitted"}, {}
    return vllm(path, body)


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(vllm, authorization=...)` starts a server that requires headers, and returns its URL."""
    with contextlib.ExitStack() as stack:

        def start(respond: Callable[[str, Body | None], Answer], **required: str) -> str:
            class Foreign(Handler):
                protocol_version = "HTTP/1.1"
                wbufsize = -1
                disable_nagle_algorithm = True

                def do_GET(self, body: Body | None = None) -> None:
                    status, value, headers = respond(self.path, body)
                    if any(self.headers.get(name) != each for name, each in required.items()):
                        status, value, headers = 401, {"error": f"Unauthorized: {self.headers}"}, {}
                    self.reply(status, json.dumps(value).encode(), **headers)
                    self.wfile.flush()

                def do_POST(self) -> None:
                    self.do_GET(json.loads(self.body()))

            return f"http://127.0.0.1:{stack.enter_context(serving(Foreign))}"

        yield start


@pytest.mark.parametrize(
    ("respond", "path", "encoding"),
    [
        (vllm, "/v1/embeddings", "base64"),
        (infinity, "/embeddings", "base64"),
        (tei, "/v1/embeddings", "base64"),
        (only_embed, "/embed", "float"),
        (strict, "/v1/embeddings", "float"),
    ],
)
def test_path_and_model_are_detected(serve: Serve, respond: Any, path: str, encoding: str) -> None:
    found = target.connect(serve(respond))
    assert found.info["api"] == {"path": path, "model": MODEL, "encoding_format": encoding}
    assert [pytest.approx(vector) for vector in found.embed(["a", "b"])] == [VECTOR, VECTOR]


def test_a_model_without_a_chat_template_is_measured_by_its_completions(serve: Serve) -> None:
    def respond(path: str, body: Body | None) -> Answer:
        if path == "/info":
            return 200, {"task": "generate", "name": MODEL}, {}
        if path == "/v1/chat/completions" and body:
            return 400, {"error": {"message": "you must provide a chat template", "code": 400}}, {}
        return 403, {"error": {"message": f"reached {path}"}}, {}

    with pytest.raises(NotReadyError, match="reached /v1/completions"):
        target.connect(serve(respond))
    with pytest.raises(NotReadyError, match="no endpoint for generation"):
        target.connect(serve(respond) + "/v1/chat/completions")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/embed"])
def test_a_path_in_the_url_is_used(serve: Serve, path: str) -> None:
    assert target.connect(serve(tei) + path).endpoint_url.endswith(path)


def test_the_precision_of_text_embeddings_inference_is_read(serve: Serve) -> None:
    info = target.connect(serve(tei)).info
    assert info["precision"]["effective"] == "fp16"
    assert info["model"] == {"source": MODEL}
    assert info["limits"] == {"max_input_tokens": 512}


def test_the_name_of_the_model_can_be_passed(serve: Serve) -> None:
    url = serve(lambda path, body: (404, {}, {}) if path == "/v1/models" else vllm(path, body))
    with pytest.raises(NotReadyError, match="names a model") as caught:
        target.connect(url)
    assert "--served-model" in (caught.value.hint or "")
    assert target.connect(url, access=http_json.ServerAccess(model=MODEL)).model == MODEL
    with pytest.raises(NotReadyError, match="does not exist"):
        target.connect(url, access=http_json.ServerAccess(model="other"))


def test_a_server_that_loads_its_model_is_not_ready(serve: Serve) -> None:
    url = serve(lambda path, body: (503, {"error": "loading"}, {}) if body else vllm(path, body))
    with pytest.raises(NotReadyError, match="returned 503") as caught:
        target.connect(url)
    assert "/health" in (caught.value.hint or "")


@pytest.mark.parametrize("respond", [vllm, infinity, tei])
def test_a_missing_or_wrong_key_is_reported_without_showing_it(serve: Serve, respond: Any) -> None:
    url = serve(respond, authorization="Bearer another")
    for access in (http_json.ServerAccess(), http_json.ServerAccess({"Authorization": f"Bearer {KEY}"})):
        with pytest.raises(NotReadyError, match="returned 401") as caught:
            target.connect(url, access=access)
        assert ("--api-key-env" in (caught.value.hint or "")) == (not access.headers)
        assert KEY not in f"{caught.value.message} {access!r}"


@pytest.mark.parametrize("pause_s", [0, 0.02])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_response_without_end_is_an_error(method: str, pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast, it fills the memory. Slowly, each read succeeds in time."""
    monkeypatch.setattr(http_json, "_MAX_RESPONSE_BYTES", 16 << 20)
    sent = 0

    class Endless(Handler):
        def respond(self) -> None:
            nonlocal sent
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    sent += self.wfile.write(bytes(1 if pause_s else 1 << 16))
                    time.sleep(pause_s)

        do_GET = do_POST = respond

    with serving(Endless) as port:
        timeout_s = 0.3 if pause_s else 60
        with pytest.raises(InferctlError, match="did not end within" if pause_s else "has more than"):
            if method == "GET":
                http_json.get(f"http://127.0.0.1:{port}/info", timeout_s, http_json.ServerAccess())
            else:
                http_json.send(f"http://127.0.0.1:{port}/info", timeout_s, {}, http_json.ServerAccess())
    assert sent < 100 << 20


@pytest.mark.parametrize("send", [http_json.get, lambda url, s, access: http_json.send(url, s, {}, access)])
@pytest.mark.parametrize(
    ("start", "rest", "fails"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"x", "did not end within"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "did not end within"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n", "did not end within"),
        (b"HTTP/1.1 500 X\r\nContent-Length: 300\r\n\r\n", b"x", "returned 500"),
    ],
    ids=["header", "continue", "trailers", "error"],
)
def test_no_part_of_a_response_takes_longer(start: bytes, rest: bytes, fails: str, send: Callable[..., bytes]) -> None:
    class Slow(Handler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(start)
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(rest)
                    time.sleep(0.02)

    started = time.monotonic()
    with serving(Slow) as port, pytest.raises(InferctlError, match=fails):
        send(f"http://127.0.0.1:{port}/info", 0.3, http_json.ServerAccess())
    assert time.monotonic() - started < 4


def test_a_key_in_a_response_is_masked_in_errors(serve: Serve) -> None:
    url = serve(lambda path, body: (403, {"error": f"bad key {KEY}"}, {}) if body else vllm(path, body))
    with pytest.raises(NotReadyError, match=r"bad key \*\*\*"):
        target.connect(url, access=http_json.ServerAccess({"X-Key": KEY}))


def bench(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--plan", folder / "plan.yaml", "--output", "out", "--json")
    (folder / "plan.yaml").write_text(
        "name: short\ncorpus: short\nquality: null\n"
        "load: {mode: closed, users: 2, duration_s: 1, warmup_s: 1, window_s: 0.2}\n"
    )
    return inferctl("bench", *options, *arguments, cwd=folder, env={**os.environ, **variables})


def test_servers_that_require_headers_are_measured_and_no_file_or_command_line_has_the_key(
    serve: Serve, tmp_path: Path
) -> None:
    key = f"sk-{uuid.uuid4().hex}"  # no other process has it
    seen: set[str] = set()
    count = itertools.count()

    def watched(path: str, body: Body | None) -> Answer:
        for line in Path("/proc").glob("[0-9]*/cmdline") if next(count) % 10 == 0 else ():
            with contextlib.suppress(OSError):
                seen.add(line.read_bytes().decode(errors="replace"))
        return vllm(path, body)

    servers = {"vllm": vllm, "infinity": infinity, "tei": only_embed, "watched": watched}
    required = {"authorization": f"Bearer {key}", "x-team": "search"}
    urls = [part for name, each in servers.items() for part in ("--url", f"{name}={serve(each, **required)}")]
    done = bench(tmp_path, *urls, "--header", "X-Team: search", "--api-key-env", "PEER_KEY", PEER_KEY=key)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["configuration"] for row in rows] == list(servers)
    for row in rows:
        assert row["requests_per_s"] > 0 and row["failed"] == 0
        assert row["tokens_per_s"] == pytest.approx(7 * row["requests_per_s"], rel=0.01)
        receipt = json.loads(Path(row["receipt"]).read_text())
        assert receipt["server"]["api"]["path"] in target.PATHS["embed"]
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.name == "load.json" for file in written)
    assert [file for file in written if key.encode() in file.read_bytes()] == []
    assert key not in done.stdout + done.stderr
    assert any("locust" in line for line in seen)
    assert not [line for line in seen if key in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--header", "no colon"), "not 'NAME: VALUE'"),
        (("--header", f"X: {KEY}\r\nHost: b"), "characters that are not allowed"),
        (("--header", "Content-Length: 3"), "the load generator sets the header Content-Length"),
        (("--api-key-env", "NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE is not set"),
        (("--api-key-env", "PATH", "--header", "Authorization: x"), "both"),
    ],
)
def test_invalid_headers_are_usage_errors(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.run(["bench", "--url", "peer=http://127.0.0.1:9", *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert KEY not in told


def test_an_invalid_url_with_a_path_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        target.connect("http://user@host/embed")
