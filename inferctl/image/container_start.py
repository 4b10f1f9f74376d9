"""Measures how long a container takes to its first response, with an image store that lacks the image and one with it.

A start with an empty store removes the image from the Docker Engine and pulls it again. What the pull wrote is in
memory when the container reads it, so the disk of a node that starts a container later can be slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferctl.config import settings
from inferctl.core.errors import NotReadyError, UsageError
from inferctl.image import registry, serve_image
from inferctl.image.docker import DockerEngine
from inferctl.image.image_name import familiar, split
from inferctl.image.records import READY_SECONDS, ImageInfo
from inferctl.image.running_container import exit_error, free_port, wait_ready
from inferctl.image.serve_image import Address

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Pull:
    """A pull. `downloaded_s`: until the last layer was on this machine. `kept`: layers that the engine had."""

    seconds: float
    downloaded_s: float
    layers: int
    kept: int


@dataclass(frozen=True)
class ContainerStart:
    """A start, in seconds. `pull` is None if the engine had the image. `response_s`: from the start of the container
    until its first response.
    """

    pull: Pull | None
    container_s: float
    response_s: float

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return (self.pull.seconds if self.pull else 0.0) + self.container_s + self.response_s


@dataclass(frozen=True)
class RegistryImage:
    """The image in its registry: `name@digest`, bytes of its layers there, and how they are compressed.

    `tags`: further names of the image in the engine, of the same repository.
    """

    reference: str
    compressed: int
    method: str
    tags: tuple[str, ...] = ()


def in_registry(image: ImageInfo, reference: str) -> RegistryImage:
    """Return what the registry has of an image of the engine.

    Raises `UsageError` if it lacks the image, or has another one: to remove it from the engine would lose it.
    """
    digest = registry.digest(reference)
    name = split(reference)[0]
    names = [each for each in image.tags if familiar(each) != familiar(reference)]
    others = [each for each in names if _repository(each) != familiar(name)]
    tagged = {familiar(name), *map(_repository, others)}  # their digests go with the last tag
    if others := [*others, *(each for each in image.digests if _repository(each) not in tagged)]:
        raise UsageError(
            f"the image has other names in the engine, which keep it: {', '.join(others)}",
            f"remove them with `docker image rm {' '.join(others)}`",
        )
    if not any(familiar(each) == f"{familiar(name)}@{digest}" for each in image.digests):
        raise UsageError(
            f"the registry has another image as {reference} than the engine",
            f"run `docker pull {reference}`, or push the image of the engine with `docker push {reference}`",
        )
    layers = registry.manifest(f"{name}@{digest}", image.platform)["layers"]
    zstd = any(str(layer["mediaType"]).endswith("zstd") for layer in layers)
    return RegistryImage(
        f"{name}@{digest}", sum(int(layer["size"]) for layer in layers), "zstd" if zstd else "gzip", tuple(names)
    )


def _repository(reference: str) -> str:
    return familiar(split(reference)[0])


def measure(
    engine: DockerEngine,
    reference: str,
    found: RegistryImage | None,
    model: Path | None,
    rounds: int,
    respond: Callable[[str], None],
    on_step: Callable[[str], None],
) -> Iterator[ContainerStart]:
    """Yield the starts of each round: one with an empty store if the image was `found` in a registry, then a warm one.

    `model`: the weights to mount, as `serve_image.start` takes them. `respond` sends a request to a URL, and returns
    after a valid response. `on_step` is called with what begins. Raises `InferctlError` if the container ends, or does
    not respond, or if the image changes in the engine or in the registry.
    """
    first = engine.image(reference)
    for number in range(1, rounds + 1):
        for pulls in (True, False) if found else (False,):
            store = "empty" if pulls else "warm"
            step = f"round {number} of {rounds}, {store} store"
            pulled = None
            if pulls and found:
                on_step(f"{step}: pulling")
                try:
                    pulled = _pull(engine, reference, found.tags)
                finally:
                    for tag in found.tags if engine.image(reference) else ():
                        engine.tag(reference, tag)
            on_step(f"{step}: starting")
            image = engine.image(reference)
            if image is None or first is None or image.id != first.id:
                raise NotReadyError(f"{reference} is another image now", "check what changes it, and measure again")
            yield replace(_start(engine, image, model, respond, on_step), pull=pulled)


def _pull(engine: DockerEngine, reference: str, tags: Sequence[str]) -> Pull:
    for name in (*tags, reference):
        if engine.image(name) is not None:  # with the last tag of a repository, its digests go too
            engine.remove_image(name)
    began = time.perf_counter()
    downloaded, layers, kept = began, set(), set()

    def follow(line: Mapping[str, Any]) -> None:
        nonlocal downloaded
        status, layer = line.get("status"), line.get("id")
        if status in ("Pulling fs layer", "Already exists"):
            layers.add(layer)
        if status == "Already exists":
            kept.add(layer)
        if status == "Download complete":
            downloaded = time.perf_counter()

    engine.pull(reference, follow)
    return Pull(time.perf_counter() - began, downloaded - began, len(layers), len(kept))


def _start(
    engine: DockerEngine,
    image: ImageInfo,
    model: Path | None,
    respond: Callable[[str], None],
    log: Callable[[str], None],
) -> ContainerStart:
    began = time.perf_counter()
    address = Address("127.0.0.1", free_port())
    # Without the keys of the image, which the request has not.
    container, address = serve_image.start(engine, image, model, address, log, environment=settings.OPEN_ACCESS)
    with container:
        started = time.perf_counter()
        if not wait_ready(container, (address.host, address.port), READY_SECONDS, _POLL_SECONDS):
            raise exit_error(container, "run it with `inferctl serve --image`") or NotReadyError(
                f"the server was not ready within {READY_SECONDS:.0f} s", "run it with `inferctl serve --image`"
            )
        respond(f"http://{address.host}:{address.port}")
        return ContainerStart(None, started - began, time.perf_counter() - started)
