"""Verifies a built image before it is tagged: the image starts as in production, and its output matches its weights.

A ready server may return 200 with only NaN (text-embeddings-inference PR 896: fp16 on a T4), so its vectors, rerank
scores or next tokens are compared with an fp32 reference.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from inferctl.config import settings
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.image import failures, library, next_tokens
from inferctl.image.docker import Container, DockerEngine
from inferctl.image.events import Note
from inferctl.image.library import LibraryComparison
from inferctl.image.next_tokens import Prompt
from inferctl.image.output_checks import (
    QUERY,
    TEXTS,
    check_scores,
    check_vectors,
    fail,
    limit,
)
from inferctl.image.records import READY_SECONDS, ContainerOptions, ImageInfo
from inferctl.image.render import CACHE_PATH
from inferctl.image.running_container import LOG_LINES, exit_error, free_port, mounts_of, request, wait_ready, with_log
from inferctl.models import divergence, output_vectors
from inferctl.models.model import IMAGE_FOLDER
from inferctl.models.reference_process import LIBRARIES

# SmolLM2 has a perplexity of 14 for the texts. With the token ids of another tokenizer, it has 100,000 and more.
_CHANCE = 1000.0
_REFERENCE_SECONDS = 600.0
_REQUEST_SECONDS = 120.0
T = TypeVar("T")


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify`. `model`: folder to mount at /model, None if the image contains or downloads its weights.

    `network`: None for the engine's bridge, or `host`. `compare`: whether to compute the fp32 reference and compare.
    `library_model`: the folder that sentence-transformers loads to be compared, too; None for no such comparison.
    `requires_library`: whether it is an error, instead of a note, if the library cannot load the folder.
    """

    model: Path | None
    network: str | None = None
    gpu: bool = False
    ready_seconds: float = READY_SECONDS
    compare: bool = True
    library_model: Path | None = None
    requires_library: bool = False


@dataclass(frozen=True)
class Verified:
    """The result of a verification.

    `dimensions`: of the vectors, None for other tasks. `cosine_min`: the lowest cosine of the vectors to the fp32
    reference.
    `score_difference`: the largest difference of scores, relative to the largest score (at least 1). `kl`:
    the mean KL divergence of the next tokens in nats, a lower bound. `top_1`: the share of equal most likely tokens.
    They are None without a reference and for other tasks. `tolerance` is the limit, for generation that of `kl`.
    `library`: the comparison with sentence-transformers, None without one.
    """

    precision: str
    level: str
    device: str
    dimensions: int | None
    texts: int
    cosine_min: float | None
    tolerance: float | None
    ready_seconds: float
    model_sha256: str | None
    task: str = "embed"
    score_difference: float | None = None
    kl: float | None = None
    top_1: float | None = None
    tokens: int | None = None
    library: LibraryComparison | None = None

    def document(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self)


def verify(engine: DockerEngine, image: ImageInfo, options: VerifyOptions) -> Generator[Note, None, Verified]:
    """Start the image, embed, score or continue eight texts over HTTP and compare with the reference. Yields notes.

    Raises `InferctlError` (exit code 1) with the failed check and the end of the container log, and `NotComparedError`
    if sentence-transformers is required and cannot load the model. Removes its containers.
    """
    started = time.monotonic()
    port = settings.listening_port(image.environment)
    container_options, host_port = server_options(image, options, port)
    try:
        running = engine.start(image.id, container_options)
    except failures.NoBridgeError as error:
        yield Note(f"{error.message}; verifying on the host's network")
        container_options, host_port = server_options(image, replace(options, network="host"), port)
        running = engine.start(image.id, container_options)
    with running as container:
        address = ("127.0.0.1", host_port or _published(container, port))
        _wait_ready(container, address, options.ready_seconds)
        ready = time.monotonic() - started
        yield Note(f"ready after {ready:.1f} s")
        info = fetch(container, address, "/info")
        precision = str(info["precision"]["effective"])
        facts = (
            precision,
            str(info["precision"].get("level", "")),
            str(info["device"].get("name") or info["device"]["kind"]),
        )
        task, name = str(info.get("task", "embed")), str(info["name"])
        rerank = task == "rerank"
        inputs: list[Any] = [[QUERY, text] for text in TEXTS] if rerank else list(TEXTS)
        # The texts use the prompts of the model in turn, first none.
        names = [None, *(info["model"].get("prompts") or {}).get("names", ())]
        selected = [names[number % len(names)] for number in range(len(TEXTS))]
        if task == "embed":
            inputs = [
                text if name is None else {"input": text, "prompt_name": name}
                for text, name in zip(TEXTS, selected, strict=True)
            ]
        prompts = _continue(container, address, name) if task == "generate" else []
        texts = library.TEXTS if options.library_model else TEXTS  # it starts with these
        scores: list[Any] = _score(container, address, name, texts) if rerank else []
        if task == "classify":
            scores = _classify(container, address, name, texts)
        trained = info["model"].get("trained_outputs", ["dense"]) if task == "embed" else []
        vocabulary = int(info["model"].get("vocabulary_size") or 0)
        vectors = {output: _embed(container, address, name, TEXTS, selected, output, vocabulary) for output in trained}
        plain = []
        if options.library_model and trained:
            plain = _embed(container, address, name, texts, [None] * len(texts), trained[0], vocabulary)
    # The server has stopped before the reference loads the weights, so that memory for one of them is sufficient.
    longest = (info.get("limits") or {}).get("max_input_tokens")
    if task == "generate":
        inputs.append(next_tokens.CHAT)
    reference = _reference(engine, image, options, inputs, longest, task) if options.compare else None
    if isinstance(reference, str):
        yield Note(f"not compared with fp32: {reference}")
        reference = None
    if reference is not None and reference["model_sha256"] != info["model"].get("sha256"):
        fail(
            f"the server has other weights ({info['model'].get('sha256')}) than the image ({reference['model_sha256']})"
        )
    sha256 = info["model"].get("sha256")
    if task == "generate":
        count = sum(len(prompt.scored.ids) for prompt in prompts if prompt.scored)
        verified = Verified(*facts, None, len(prompts), None, None, ready, sha256, task, tokens=count)
        if reference is None:
            return verified
        found = _checked(lambda: next_tokens.compare(prompts, reference["texts"], precision))
        if found.perplexity_fp32 > _CHANCE:
            yield Note(
                f"in fp32 too, the model hardly predicts the texts (perplexity {found.perplexity_fp32:,.0f}): check "
                "that the tokenizer belongs to the weights"
            )
        most = divergence.limits_of(precision).kl
        return replace(verified, kl=found.kl_mean, top_1=found.top_1, tokens=found.positions, tolerance=most)
    tolerance = limit(precision, facts[1], scores=task != "embed") if reference is not None else None
    if task != "embed":
        served = _flat(scores[: len(TEXTS)])
        wanted = _flat(reference["scores"]) if reference is not None else None
        largest = check_scores(served, wanted, tolerance, len(served) // len(TEXTS))
        verified = Verified(*facts, None, len(TEXTS), None, tolerance, ready, sha256, task, largest)
    else:
        dimensions = int(info["model"]["dimensions"])
        lowest = None
        for output, found_vectors in vectors.items():
            expected = _expected(reference, output, vocabulary) if reference is not None else None
            size = dimensions if output == "dense" else None
            found_cosine = check_vectors(found_vectors, expected, size, tolerance)
            lowest = found_cosine if lowest is None or found_cosine is None else min(lowest, found_cosine)
        verified = Verified(*facts, dimensions, len(TEXTS), lowest, tolerance, ready, sha256)
    if options.library_model is None:
        return verified
    yield Note(f"comparing with {LIBRARIES[task]}, from raw text")
    try:
        return replace(verified, library=library.compare(scores or plain, info, options.library_model))
    except library.NotComparedError as error:
        if options.requires_library:
            raise
        yield Note(error.message)
    return verified


def server_options(image: ImageInfo, options: VerifyOptions, port: int) -> tuple[ContainerOptions, int | None]:
    """Return the options of the container, and its host port on the host's network (None on the bridge)."""
    mounts = mounts_of(options.model) if options.model else {}
    labels = {"io.inferctl.role": "verify"}
    environment = settings.OPEN_ACCESS
    if options.network != "host":
        return ContainerOptions(
            environment=environment,
            mounts=mounts,
            port=port,
            gpu=options.gpu,
            labels=labels,
            scratch=_scratch(image),
        ), None
    free = free_port()
    return ContainerOptions(
        command=(*image.command, "--host", "127.0.0.1", "--port", str(free)),
        environment={**environment, "INFERCTL_SERVE_PORT": str(free)},
        mounts=mounts,
        network="host",
        gpu=options.gpu,
        labels=labels,
        scratch=_scratch(image),
    ), free


def _wait_ready(container: Container, address: tuple[str, int], seconds: float) -> None:
    if wait_ready(container, address, seconds):
        return
    if error := exit_error(container):
        raise InferctlError(f"verification failed: {error.message}", error.hint) from None
    fail(
        with_log(f"/readyz was not ready within {seconds:.0f} s", container.log(LOG_LINES)),
        "wait longer with `--ready-timeout SECONDS`",
    )


def _expected(reference: Mapping[str, Any], output: str, vocabulary: int) -> list[list[float]]:
    """Return an output of the reference as one vector for each text."""
    if output == "sparse":
        return [output_vectors.spread(ids, weights, vocabulary) for ids, weights in reference["sparse"]]
    return [output_vectors.decode(text) for text in reference["embeddings" if output == "dense" else "token_vectors"]]


def _embed(
    container: Container,
    address: tuple[str, int],
    model: str,
    texts: Sequence[str],
    prompts: Sequence[str | None],
    output: str,
    vocabulary: int,
) -> list[list[float]]:
    """Return an output of the texts as vectors, in order. `prompts`: the name for each. Equal ones share a request."""
    vectors: dict[int, list[float]] = {}
    for name in dict.fromkeys(prompts):
        numbers = [number for number, each in enumerate(prompts) if each == name]
        body = {"model": model, "input": [texts[number] for number in numbers], "encoding_format": "base64"}
        body |= {} if output == "dense" else {"outputs": [output]}
        response = fetch(container, address, "/v1/embeddings", body | ({} if name is None else {"prompt_name": name}))
        found = sorted(response["data"], key=lambda item: item["index"])
        if len(found) != len(numbers):
            fail(f"the server returned {len(found)} vectors for {len(numbers)} texts")
        vectors |= zip(numbers, (output_vectors.read(item, output, vocabulary) for item in found), strict=True)
    return [vectors[number] for number in range(len(texts))]


def _score(container: Container, address: tuple[str, int], model: str, texts: Sequence[str]) -> list[float]:
    body = {"model": model, "query": QUERY, "documents": texts}
    results = fetch(container, address, "/v1/rerank", body)["results"]
    found = {int(item["index"]): float(item["relevance_score"]) for item in results}
    if len(results) != len(texts) or len(found) != len(texts):
        fail(f"the server returned {len(found)} scores for {len(texts)} texts")
    return [found[index] for index in range(len(texts))]


def _flat(scores: Sequence[Any]) -> list[float]:
    """Return the scores of texts, of which each has one or a list, in one list."""
    return [score for each in scores for score in (each if isinstance(each, list) else [each])]


def _classify(container: Container, address: tuple[str, int], model: str, texts: Sequence[str]) -> list[list[float]]:
    """Return the scores of all labels for each text."""
    rows = fetch(container, address, "/classify", {"model": model, "input": texts})["data"]
    found = {int(row["index"]): [float(score) for score in row["probs"]] for row in rows}
    if len(rows) != len(texts) or set(found) != set(range(len(texts))):
        fail(f"the server returned scores for {len(found)} of {len(texts)} texts")
    return [found[index] for index in range(len(texts))]


def _continue(container: Container, address: tuple[str, int], model: str) -> list[Prompt]:
    return _checked(lambda: next_tokens.ask(lambda path, body: fetch(container, address, path, body), model, TEXTS))


def _checked(check: Callable[[], T]) -> T:
    try:
        return check()
    except InferctlError as error:
        fail(error.message.removeprefix("verification failed: "))


def _reference(
    engine: DockerEngine, image: ImageInfo, options: VerifyOptions, inputs: list[Any], longest: int | None, task: str
) -> dict[str, Any] | str:
    """Return the output of the fp32 reference, with inputs truncated to `longest` tokens as in the server.

    For generation, return the reason if the reference cannot read the weights.
    """
    python = image.entrypoint[0] if image.entrypoint and "python" in image.entrypoint[0] else "python3"
    container_options = ContainerOptions(
        entrypoint=(python, "-m", "inferctl.serve.reference"),
        command=(IMAGE_FOLDER, "--task", task, *(("--max-input-tokens", str(longest)) if longest else ())),
        mounts=mounts_of(options.model) if options.model else {},
        network="none",
        stdin=True,
        labels={"io.inferctl.role": "reference"},
    )
    code, out, err = engine.run_with_input(image.id, container_options, json.dumps(inputs).encode(), _REFERENCE_SECONDS)
    if code is None:
        fail(f"the fp32 reference took longer than {_REFERENCE_SECONDS:.0f} s")
    # transformers does not know all models of vLLM, nor the reference all quantized formats.
    if code == UsageError.exit_code and task == "generate":
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if lines else "the reference rejects the model"
    if code:
        fail(with_log(f"the fp32 reference ended with exit code {code}", err))
    try:
        return dict(json.loads(out))
    except ValueError:
        fail(with_log("the fp32 reference wrote no JSON", err))


def fetch(
    container: Container, address: tuple[str, int], path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON response to a GET, or to a POST of `body`. Raises `InferctlError` for any other response."""
    try:
        return dict(json.loads(request(address, "POST" if body else "GET", path, body, _REQUEST_SECONDS)))
    except urllib.error.HTTPError as error:
        text = error.read(4000).decode("utf-8", "replace")
        fail(with_log(f"{path} returned {error.code}: {text[:500]}", container.log(LOG_LINES)))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if ended := exit_error(container):
            fail(f"no response from {path}: {ended.message}")
        fail(with_log(f"no response from {path}: {error}", container.log(LOG_LINES)))


def _published(container: Container, port: int) -> int:
    try:
        return container.host_port(port)
    except NotReadyError:
        error = exit_error(container)
        if error is None:
            raise
        raise InferctlError(f"verification failed: {error.message}", error.hint) from None


def _scratch(image: ImageInfo) -> tuple[str, ...]:
    """Return the folders in memory for the image: the folder of downloaded weights if the image downloads them."""
    return (CACHE_PATH,) if image.environment.get("HF_HOME") == CACHE_PATH else ()
