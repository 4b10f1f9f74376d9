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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from inferctl.config import settings
from inferctl.core.errors import InferctlError, UsageError
from inferctl.image import library, next_tokens, serve_image
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
from inferctl.image.running_container import LOG_LINES, exit_error, free_port, mounts_of, request, wait_ready, with_log
from inferctl.image.serve_image import Address
from inferctl.models import adapter_effect, divergence, output_vectors
from inferctl.models.reference_process import LIBRARIES
from inferctl.models.weights_folders import WeightsFolder

# SmolLM2 has a perplexity of 14 for the texts. With the token ids of another tokenizer, it has 100,000 and more.
_CHANCE = 1000.0
_REFERENCE_SECONDS = 600.0
_REQUEST_SECONDS = 120.0
T = TypeVar("T")
# Posts a body to a path of the server and returns the response.
_Send: TypeAlias = Callable[[str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify`. `mounts`: the folders of the weights to mount, by their path in the container.

    `network`: None for the engine's bridge, or `host`. `library_models`: the folders that a library loads to be
    compared, too, by the name of the model (empty if it is the only one). `requires_library`: whether it is an error,
    instead of a note, if it cannot load the folder.
    """

    mounts: Mapping[str, Path] = field(default_factory=dict)
    network: str | None = None
    ready_seconds: float = READY_SECONDS
    library_models: Mapping[str, Path] = field(default_factory=dict)
    requires_library: bool = False


@dataclass(frozen=True)
class Verified:
    """The result of the verification of a model, which requests use by its `name`.

    `dimensions`: of the vectors, None for other tasks. `cosine_min`: the lowest cosine of the vectors to the fp32
    reference.
    `score_difference`: the largest difference of scores, relative to the largest score (at least 1). `kl`:
    the mean KL divergence of the next tokens in nats, a lower bound. `top_1`: the share of equal most likely tokens.
    They are None without a reference and for other tasks. `tolerance` is the limit, for generation that of `kl`.
    `library`: the comparison with sentence-transformers, None without one. `adapters`: as in `GET /info`: the server
    compared them with fp32 before it was ready.
    """

    precision: str
    level: str
    device: str
    texts: int
    ready_seconds: float
    model_sha256: str | None
    task: str
    dimensions: int | None = None
    cosine_min: float | None = None
    tolerance: float | None = None
    score_difference: float | None = None
    kl: float | None = None
    top_1: float | None = None
    tokens: int | None = None
    library: LibraryComparison | None = None
    adapters: Sequence[Mapping[str, Any]] = ()
    name: str = ""


def document(results: Sequence[Verified]) -> dict[str, Any] | None:
    """Return the results of an image as JSON data: those of the only model, or a list; None without any."""
    found = [asdict(each) for each in results]
    return found[0] if len(found) == 1 else {"models": found} if found else None


@dataclass(frozen=True)
class _Served:
    """What the server of an image returned for the texts of a model, before it was stopped.

    `folder`: where the image has the weights. `inputs`: what the reference computes. `scores`: of rerank and classify,
    one or a list for each text. `vectors`: of each output that an embedding model was trained for. `prompts`: what a
    generation server predicted. `plain`: the first output of the texts of the library, without prompts.
    """

    info: Mapping[str, Any]
    folder: WeightsFolder
    ready_seconds: float
    inputs: list[Any]
    scores: Sequence[Any] = ()
    vectors: Mapping[str, list[list[float]]] = field(default_factory=dict)
    prompts: Sequence[Prompt] = ()
    plain: Sequence[Any] = ()

    @property
    def task(self) -> str:
        return str(self.info.get("task", "embed"))

    @property
    def sha256(self) -> str | None:
        return cast("str | None", self.info["model"].get("sha256"))

    @property
    def vocabulary(self) -> int:
        return int(self.info["model"].get("vocabulary_size") or 0)

    def verified(self, **results: Any) -> Verified:
        """Return the result of the verification, without what only some tasks have."""
        precision, device = self.info["precision"], self.info["device"]
        found = Verified(
            precision=str(precision["effective"]),
            level=str(precision.get("level", "")),
            device=str(device.get("name") or device["kind"]),
            texts=len(TEXTS),
            ready_seconds=self.ready_seconds,
            model_sha256=self.sha256,
            task=self.task,
            name=str(self.info["name"]),
        )
        return replace(found, **results)


def verify(engine: DockerEngine, image: ImageInfo, options: VerifyOptions) -> Generator[Note, None, list[Verified]]:
    """Start the image, embed, score or continue eight texts over HTTP and compare with the reference. Yields notes.

    Returns the result of each model. Raises `InferctlError` (exit code 1) with the failed check and the end of the
    container log, and `NotComparedError` if sentence-transformers is required and cannot load the model. Removes its
    containers.
    """
    found = []
    # The server has stopped before a reference loads the weights, so that memory for one of them is sufficient.
    for served in (yield from _serve(engine, image, options)):
        if served.folder.name:
            yield Note(f"checking {served.folder.name}")
        found.append((yield from _compare(engine, image, options, served)))
    return found


def _compare(
    engine: DockerEngine, image: ImageInfo, options: VerifyOptions, served: _Served
) -> Generator[Note, None, Verified]:
    reference = _reference(engine, image, options, served) if served.folder.weights != "download" else None
    if isinstance(reference, str):
        yield Note(f"not compared with fp32: {reference}")
        reference = None
    if reference is not None and reference["model_sha256"] != served.sha256:
        fail(f"the server has other weights ({served.sha256}) than the image ({reference['model_sha256']})")
    if served.task == "generate":
        return (yield from _compare_tokens(served, reference))
    verified = _compare_vectors(served, reference) if served.task == "embed" else _compare_scores(served, reference)
    folder = options.library_models.get(served.folder.name)
    if folder is None:
        return verified
    yield Note(f"comparing with {LIBRARIES[served.task]}, from raw text")
    try:
        compared = library.compare(served.scores or served.plain, served.info, folder)
        return replace(verified, library=compared)
    except library.NotComparedError as error:
        if options.requires_library:
            raise
        yield Note(error.message)
    return verified


def _serve(engine: DockerEngine, image: ImageInfo, options: VerifyOptions) -> Generator[Note, None, list[_Served]]:
    """Start the image, and return what its server returns for the texts of each model. Removes the container."""
    started = time.monotonic()
    notes: list[str] = []
    address = Address("127.0.0.1", free_port(), options.network)
    container, address = serve_image.start(
        engine, image, options.mounts, address, notes.append, environment=settings.OPEN_ACCESS
    )
    with container:
        yield from map(Note, notes)
        _wait_ready(container, address, options.ready_seconds)
        ready = time.monotonic() - started
        yield Note(f"ready after {ready:.1f} s")
        info, found = _fetch(container, address, "/info"), []
        infos = {each["name"]: each for each in info.get("models", ())}
        for folder in serve_image.folders_of(image):
            if folder.base is None:
                library_texts = folder.name in options.library_models
                served = _Served(infos.get(folder.name, info), folder, ready, list(TEXTS))
                found.append(_ask(partial(_fetch, container, address), served, library_texts=library_texts))
        return found


def _ask(fetch: Callable[..., dict[str, Any]], found: _Served, *, library_texts: bool) -> _Served:
    """Return `found` with what the server returns for the texts of one model."""
    name, texts = str(found.info["name"]), library.TEXTS if library_texts else TEXTS  # it starts with these

    def send(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return fetch(path, {"model": name, **body})

    match found.task:
        case "generate":
            prompts = _checked(lambda: next_tokens.ask(send, name, TEXTS))
            return replace(found, prompts=prompts, inputs=[*TEXTS, next_tokens.CHAT])
        case "rerank":
            return replace(found, scores=_score(send, texts), inputs=[[QUERY, text] for text in TEXTS])
        case "classify":
            return replace(found, scores=_classify(send, texts))
    # The texts use the prompts of the model in turn, first none.
    names = [None, *(found.info["model"].get("prompts") or {}).get("names", ())]
    selected = [names[number % len(names)] for number in range(len(TEXTS))]
    pairs = list(zip(TEXTS, selected, strict=True))
    trained = found.info["model"].get("trained_outputs", ["dense"])
    vectors = {output: _embed(send, pairs, output, found.vocabulary) for output in trained}
    plain = []
    if library_texts and trained:
        plain = _embed(send, [(text, None) for text in texts], trained[0], found.vocabulary)
    inputs = [text if prompt is None else {"input": text, "prompt_name": prompt} for text, prompt in pairs]
    return replace(found, vectors=vectors, plain=plain, inputs=inputs)


def _compare_tokens(served: _Served, reference: Mapping[str, Any] | None) -> Generator[Note, None, Verified]:
    count = sum(len(prompt.scored.ids) for prompt in served.prompts if prompt.scored)
    adapters = served.info.get("adapters", ())
    for each in adapters:
        yield Note(f"adapter {each['name']}: {adapter_effect.line(each['next_tokens'])}")
    verified = served.verified(texts=len(served.prompts), tokens=count, adapters=adapters)
    if reference is None:
        return verified
    found = _checked(lambda: next_tokens.compare(served.prompts, reference["texts"], verified.precision))
    if found.perplexity_fp32 > _CHANCE:
        yield Note(
            f"in fp32 too, the model hardly predicts the texts (perplexity {found.perplexity_fp32:,.0f}): check "
            "that the tokenizer belongs to the weights"
        )
    most = divergence.limits_of(verified.precision).kl
    return replace(verified, kl=found.kl_mean, top_1=found.top_1, tokens=found.positions, tolerance=most)


def _compare_scores(served: _Served, reference: Mapping[str, Any] | None) -> Verified:
    verified = served.verified()
    scores, wanted, tolerance = _flat(served.scores[: len(TEXTS)]), None, None
    if reference is not None:
        wanted, tolerance = _flat(reference["scores"]), limit(verified.precision, verified.level, scores=True)
    largest = check_scores(scores, wanted, tolerance, len(scores) // len(TEXTS))
    return replace(verified, score_difference=largest, tolerance=tolerance)


def _compare_vectors(served: _Served, reference: Mapping[str, Any] | None) -> Verified:
    verified = served.verified(dimensions=int(served.info["model"]["dimensions"]))
    tolerance = limit(verified.precision, verified.level, scores=False) if reference is not None else None
    lowest = []
    for output, vectors in served.vectors.items():
        expected = _expected(reference, output, served.vocabulary) if reference is not None else None
        lowest.append(check_vectors(vectors, expected, verified.dimensions if output == "dense" else None, tolerance))
    cosine_min = min((each for each in lowest if each is not None), default=None)
    return replace(verified, cosine_min=cosine_min, tolerance=tolerance)


def _wait_ready(container: Container, address: Address, seconds: float) -> None:
    if wait_ready(container, (address.host, address.port), seconds):
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


def _embed(send: _Send, texts: Sequence[tuple[str, str | None]], output: str, vocabulary: int) -> list[list[float]]:
    """Return an output of the texts as vectors, in order. Each has the name of its prompt. Equal ones share a request."""
    vectors: dict[int, list[float]] = {}
    for name in dict.fromkeys(prompt for _, prompt in texts):
        numbers = [number for number, (_, prompt) in enumerate(texts) if prompt == name]
        body: dict[str, Any] = {"input": [texts[number][0] for number in numbers], "encoding_format": "base64"}
        body |= {} if output == "dense" else {"outputs": [output]}
        response = send("/v1/embeddings", body | ({} if name is None else {"prompt_name": name}))
        found = sorted(response["data"], key=lambda item: item["index"])
        if len(found) != len(numbers):
            fail(f"the server returned {len(found)} vectors for {len(numbers)} texts")
        vectors |= zip(numbers, (output_vectors.read(item, output, vocabulary) for item in found), strict=True)
    return [vectors[number] for number in range(len(texts))]


def _score(send: _Send, texts: Sequence[str]) -> list[float]:
    results = send("/v1/rerank", {"query": QUERY, "documents": texts})["results"]
    found = {int(item["index"]): float(item["relevance_score"]) for item in results}
    if len(results) != len(texts) or len(found) != len(texts):
        fail(f"the server returned {len(found)} scores for {len(texts)} texts")
    return [found[index] for index in range(len(texts))]


def _flat(scores: Sequence[Any]) -> list[float]:
    """Return the scores of texts, of which each has one or a list, in one list."""
    return [score for each in scores for score in (each if isinstance(each, list) else [each])]


def _classify(send: _Send, texts: Sequence[str]) -> list[list[float]]:
    """Return the scores of all labels for each text."""
    rows = send("/classify", {"input": texts})["data"]
    found = {int(row["index"]): [float(score) for score in row["probs"]] for row in rows}
    if len(rows) != len(texts) or set(found) != set(range(len(texts))):
        fail(f"the server returned scores for {len(found)} of {len(texts)} texts")
    return [found[index] for index in range(len(texts))]


def _checked(check: Callable[[], T]) -> T:
    try:
        return check()
    except InferctlError as error:
        fail(error.message.removeprefix("verification failed: "))


def _reference(engine: DockerEngine, image: ImageInfo, options: VerifyOptions, served: _Served) -> dict[str, Any] | str:
    """Return the output of the fp32 reference, with inputs truncated to as many tokens as in the server.

    For generation, return the reason if the reference cannot read the weights.
    """
    longest = (served.info.get("limits") or {}).get("max_input_tokens")
    python = image.entrypoint[0] if image.entrypoint and "python" in image.entrypoint[0] else "python3"
    container_options = ContainerOptions(
        entrypoint=(python, "-m", "inferctl.serve.reference"),
        command=(served.folder.path, "--task", served.task, *(("--max-input-tokens", str(longest)) if longest else ())),
        mounts=mounts_of(options.mounts),
        network="none",
        stdin=True,
        labels={"io.inferctl.role": "reference"},
    )
    code, out, err = engine.run_with_input(
        image.id, container_options, json.dumps(served.inputs).encode(), _REFERENCE_SECONDS
    )
    if code is None:
        fail(f"the fp32 reference took longer than {_REFERENCE_SECONDS:.0f} s")
    # transformers does not know all models of vLLM, nor the reference all quantized formats.
    if code == UsageError.exit_code and served.task == "generate":
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if lines else "the reference rejects the model"
    if code:
        fail(with_log(f"the fp32 reference ended with exit code {code}", err))
    try:
        return dict(json.loads(out))
    except ValueError:
        fail(with_log("the fp32 reference wrote no JSON", err))


def _fetch(container: Container, address: Address, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON response to a GET, or to a POST of `body`. Raises `InferctlError` for any other response."""
    try:
        return dict(
            json.loads(request((address.host, address.port), "POST" if body else "GET", path, body, _REQUEST_SECONDS))
        )
    except urllib.error.HTTPError as error:
        text = error.read(4000).decode("utf-8", "replace")
        fail(with_log(f"{path} returned {error.code}: {text[:500]}", container.log(LOG_LINES)))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if ended := exit_error(container):
            fail(f"no response from {path}: {ended.message}")
        fail(with_log(f"no response from {path}: {error}", container.log(LOG_LINES)))
