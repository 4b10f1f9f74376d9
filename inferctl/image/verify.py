"""The contract test of a built image, before anyone can pull it: it starts as it will run, and its vectors are those of its weights.

A server can answer 200 with nothing but NaN (text-embeddings-inference PR 896: fp16 on a T4), so readiness proves little.
"""

from __future__ import annotations

import array
import base64
import http.client
import json
import math
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from inferctl import settings
from inferctl.errors import InferctlError, NotReadyError
from inferctl.image import failures
from inferctl.image.docker import Container, Engine
from inferctl.image.events import Note
from inferctl.image.records import ContainerOptions, ImageInfo
from inferctl.model import ModelFolder

# Least cosine between a served vector and the fp32 reference. fp32 on the same weights differs by the order of sums only;
# fp16 and bf16 keep 11 and 8 bits of the mantissa, which costs up to about 5e-4 over a transformer's layers; int8 quantises
# the weights themselves, and 0.99 is where retrieval rankings start to change.
TOLERANCE: Mapping[str, float] = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
READY_SECONDS = 300.0
_REFERENCE_SECONDS = 600.0
_REQUEST_SECONDS = 120.0
_POLL_SECONDS = 0.2
_LOG_LINES = 20
MODEL_PATH, CACHE_PATH = "/model", "/model-cache"
_NO_VERIFY = "see the log above; `--no-verify` builds without this test"

# Short and long, several scripts, code and digits: padding, truncation and the tokenizer's odd corners all get a turn.
TEXTS: tuple[str, ...] = (
    "hello",
    "The quick brown fox jumps over the lazy dog.",
    "How many replicas does a service need at 200 requests a second?",
    "Die Straßenbahn fährt heute wegen Bauarbeiten nicht über die Brücke.",
    "東京の天気は晴れ、気温は二十五度です。",
    "def mean(values):\n    return sum(values) / len(values)",
    "1234567890 -- 3.14159e+00; A/B? 50 % off!",
    " ".join(
        ["A container image is a list of layers, each a set of files, and a configuration that says what to run."] * 5
    ),
)


@dataclass(frozen=True)
class VerifyOptions:
    """How to start the image. `model`: folder to mount at /model, None when the image brings or fetches its weights.

    `network`: None for the engine's bridge, or `host`. `compare`: whether the image can compute the fp32 reference of its weights.
    """

    model: Path | None
    network: str | None = None
    gpu: bool = False
    ready_seconds: float = READY_SECONDS
    compare: bool = True


@dataclass(frozen=True)
class Verified:
    """What was found. Cosines are against the fp32 reference, None when there was nothing to compare with."""

    precision: str
    level: str
    device: str
    dimensions: int
    texts: int
    cosine_min: float | None
    tolerance: float | None
    ready_seconds: float
    model_sha256: str | None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def verify(engine: Engine, image: ImageInfo, options: VerifyOptions) -> Generator[Note, None, Verified]:
    """Start the image, embed eight texts over HTTP, compare with the reference; yields notes, removes its containers.

    Raises `InferctlError` (exit code 1) that says which part of the contract is broken, with the end of the container's log.
    """
    started = time.monotonic()
    port = settings.listening_port(image.environment)
    container_options, here = serving(image, options, port)
    try:
        running = engine.start(image.id, container_options)
    except failures.NoBridgeError as error:
        yield Note(f"{error.message}; verifying on the host's network")
        container_options, here = serving(image, replace(options, network="host"), port)
        running = engine.start(image.id, container_options)
    with running as container:
        address = ("127.0.0.1", here or _published(container, port))
        _wait_ready(container, address, started, options.ready_seconds)
        ready = time.monotonic() - started
        yield Note(f"ready after {ready:.1f} s")
        info = fetch(container, address, "/info")
        precision = str(info["precision"]["effective"])
        facts = (
            precision,
            str(info["precision"].get("level", "")),
            str(info["device"].get("name") or info["device"]["kind"]),
        )
        vectors = _embed(container, address, str(info["name"]))
    # The server is gone before the reference loads the weights again, so that memory is needed once.
    dimensions = int(info["model"]["dimensions"])
    longest = (info.get("limits") or {}).get("max_input_tokens")
    reference = _reference(engine, image, options, longest) if options.compare else None
    if reference is not None and reference["model_sha256"] != info["model"].get("sha256"):
        _broken(
            f"the server has other weights ({info['model'].get('sha256')}) than the image ({reference['model_sha256']})"
        )
    expected = [decode(text) for text in reference["embeddings"]] if reference is not None else None
    tolerance = TOLERANCE.get(precision, TOLERANCE["int8"]) if expected is not None else None
    lowest = judge(vectors, expected, dimensions, tolerance)
    return Verified(*facts, dimensions, len(vectors), lowest, tolerance, ready, info["model"].get("sha256"))


def serving(image: ImageInfo, options: VerifyOptions, port: int) -> tuple[ContainerOptions, int | None]:
    """How the image is started; and its port here when that is known before (on the host's network, where a free one is taken)."""
    mounts = mounts_of(options.model) if options.model else {}
    labels = {"io.inferctl.role": "verify"}
    if options.network != "host":
        return ContainerOptions(mounts=mounts, port=port, gpu=options.gpu, labels=labels, scratch=_scratch(image)), None
    free = free_port()
    return ContainerOptions(
        command=(*image.command, "--host", "127.0.0.1", "--port", str(free)),
        environment={"INFERCTL_SERVE_PORT": str(free)},
        mounts=mounts,
        network="host",
        gpu=options.gpu,
        labels=labels,
        scratch=_scratch(image),
    ), free


def mounts_of(folder: Path) -> dict[str, str]:
    """Mounts (path in the container -> path here) that put `folder` at /model.

    A snapshot in a hub cache is links to files outside of it: those that decide what the model computes are mounted one by one.
    """
    folder = folder.resolve()
    files = ModelFolder(folder).files()
    if not any(path.is_symlink() for path in files):
        return {MODEL_PATH: str(folder)}
    return {f"{MODEL_PATH}/{path.relative_to(folder).as_posix()}": str(path.resolve()) for path in files}


def judge(
    vectors: Sequence[Sequence[float]],
    expected: Sequence[Sequence[float]] | None,
    dimensions: int,
    tolerance: float | None,
) -> float | None:
    """Lowest cosine of `vectors` to `expected`. Raises `InferctlError` for a wrong size, NaN or infinity, or one below `tolerance`."""
    for index, vector in enumerate(vectors):
        if len(vector) != dimensions:
            _broken(f"text {index + 1} got a vector of {len(vector)} numbers, the model has {dimensions} dimensions")
        if odd := sum(not math.isfinite(x) for x in vector):
            _broken(f"text {index + 1} got a vector with {odd} of {dimensions} numbers NaN or infinite")
        if not any(vector):
            _broken(f"text {index + 1} got a vector of zeros")
    if expected is None or tolerance is None:
        return None
    if len(vectors) != len(expected) or any(len(v) != len(e) for v, e in zip(vectors, expected, strict=False)):
        _broken("the fp32 reference has other shapes than the served vectors")
    cosines = [_cosine(v, e) for v, e in zip(vectors, expected, strict=True)]
    lowest = min(cosines)
    if lowest < tolerance:
        _broken(
            f"text {cosines.index(lowest) + 1} is too far from the fp32 reference of the same weights: "
            f"cosine {lowest:.5f}, at least {tolerance} is wanted"
        )
    return lowest


def decode(text: str) -> list[float]:
    """Base64 of little-endian float32 -> numbers."""
    numbers = array.array("f", base64.b64decode(text))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def explain_exit(container: Container, hint: str = _NO_VERIFY) -> InferctlError | None:
    """Why a container that should be serving is not running, None when it is. `hint`: for reasons that only its log tells."""
    state = container.state()
    if state.running:
        return None
    log = container.log(_LOG_LINES)
    if state.out_of_memory or (state.exit_code == 137 and "illed" in log):
        return NotReadyError(
            _with_log("the container ran out of memory (OOM-killed)", log),
            "give the engine more memory, or take a smaller model",
        )
    if f"Permission denied: '{MODEL_PATH}" in log:
        return NotReadyError(
            _with_log("the container may not read its weights: it runs as a user of its own, not as you", log),
            "let everyone read the mounted folder: `chmod -R a+rX DIR`",
        )
    known = {
        1: "it failed",
        2: "its configuration is wrong",
        3: "something it needs is not ready",
        137: "it was killed",
        139: "it crashed",
    }
    what = f"the container ended with exit code {state.exit_code}"
    if state.exit_code in known:
        what += f" ({known[state.exit_code]})"
    return InferctlError(_with_log(what, log or state.error), hint)


def _wait_ready(container: Container, address: tuple[str, int], started: float, seconds: float) -> None:
    while True:
        if error := explain_exit(container):
            raise InferctlError(f"verification failed: {error.message}", error.hint) from None
        try:
            request(address, "GET", "/readyz", timeout=5.0)
        except (OSError, http.client.HTTPException):
            pass
        else:
            return
        if time.monotonic() - started > seconds:
            log = container.log(_LOG_LINES)
            _broken(
                _with_log(f"/readyz was not ready within {seconds:.0f} s", log),
                "`--ready-timeout SECONDS` waits longer",
            )
        time.sleep(_POLL_SECONDS)


def _embed(container: Container, address: tuple[str, int], model: str) -> list[list[float]]:
    body = {"model": model, "input": list(TEXTS), "encoding_format": "base64"}
    answer = fetch(container, address, "/v1/embeddings", body)
    found = sorted(answer["data"], key=lambda item: item["index"])
    if len(found) != len(TEXTS):
        _broken(f"{len(TEXTS)} texts got {len(found)} vectors")
    return [decode(item["embedding"]) for item in found]


def _reference(engine: Engine, image: ImageInfo, options: VerifyOptions, longest: int | None) -> dict[str, Any]:
    """The reference's answer, with inputs cut to `longest` tokens as the server cuts them."""
    python = image.entrypoint[0] if image.entrypoint and "python" in image.entrypoint[0] else "python3"
    running = ContainerOptions(
        entrypoint=(python, "-m", "inferctl.serve.reference"),
        command=(MODEL_PATH, *(("--max-input-tokens", str(longest)) if longest else ())),
        mounts=mounts_of(options.model) if options.model else {},
        network="none",
        stdin=True,
        labels={"io.inferctl.role": "reference"},
    )
    code, out, err = engine.converse(image.id, running, json.dumps(list(TEXTS)).encode(), _REFERENCE_SECONDS)
    if code is None:
        _broken(f"the fp32 reference took longer than {_REFERENCE_SECONDS:.0f} s")
    if code:
        _broken(_with_log(f"the fp32 reference ended with exit code {code}", err))
    try:
        return dict(json.loads(out))
    except ValueError:
        _broken(_with_log("the fp32 reference wrote no JSON", err))


def fetch(
    container: Container, address: tuple[str, int], path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    try:
        return dict(json.loads(request(address, "POST" if body else "GET", path, body, _REQUEST_SECONDS)))
    except urllib.error.HTTPError as error:
        said = error.read().decode("utf-8", "replace")
        _broken(_with_log(f"{path} answered {error.code}: {said[:500]}", container.log(_LOG_LINES)))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if ended := explain_exit(container):
            _broken(f"{path} did not answer: {ended.message}")
        _broken(_with_log(f"{path} did not answer: {error}", container.log(_LOG_LINES)))


def request(address: tuple[str, int], method: str, path: str, body: Any = None, timeout: float = 10.0) -> bytes:
    """One HTTP request to a container of ours. Raises `OSError` (`HTTPError` is one) or `HTTPException`."""
    asked = urllib.request.Request(
        f"http://{address[0]}:{address[1]}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={"content-type": "application/json"},
        method=method,
    )
    # A proxy for the outside world has no business between this process and its own container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked, timeout=timeout) as answer:
        return bytes(answer.read())


def _published(container: Container, port: int) -> int:
    try:
        return container.host_port(port)
    except NotReadyError:
        error = explain_exit(container)
        if error is None:
            raise
        raise InferctlError(f"verification failed: {error.message}", error.hint) from None


def _scratch(image: ImageInfo) -> tuple[str, ...]:
    """Folders in memory that the image wants to write to: where it downloads its weights to, if it does."""
    return (CACHE_PATH,) if image.environment.get("HF_HOME") == CACHE_PATH else ()


def free_port() -> int:
    """A TCP port that is free here now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    length = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def _with_log(what: str, log: str) -> str:
    lines = "\n".join(f"  | {line}" for line in log.splitlines()[-_LOG_LINES:])
    return f"{what}\n{lines}" if lines else f"{what}; its log is empty"


def _broken(what: str, hint: str = _NO_VERIFY) -> NoReturn:
    raise InferctlError(f"verification failed: {what}", hint)
