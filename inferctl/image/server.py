"""`inferctl serve --image`: the image as a container, as it will run elsewhere, in the foreground."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from inferctl import hub, model, outputs, settings
from inferctl.errors import NotReadyError, UsageError
from inferctl.image import failures
from inferctl.image.docker import Container, Engine
from inferctl.image.records import ContainerOptions, ImageInfo
from inferctl.image.verify import CACHE_PATH, explain_exit, free_port, mounts_of, request

# Weights that a container downloads outlive it there.
_CACHE_VOLUME = "inferctl-models"
# The server drains for up to 30 s by default; it gets a little more.
_STOP_GRACE_SECONDS = 5
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Address:
    """Where the container will be reached. `port` 0 takes a free one; `network`: None for the engine's bridge, or `host`."""

    host: str
    port: int
    network: str | None = None


@dataclass(frozen=True)
class ServeOptions:
    """How an image is served. `model`: where weights to mount are (a folder or a hub id), None when nothing says so.

    `replaces_model`: that was asked for on the command line. `drain_seconds`: what a stop may take, grace included. `arguments`: options of `inferctl serve` for the server inside.
    """

    address: Address
    model: str | None = None
    revision: str | None = None
    replaces_model: bool = False
    drain_seconds: float = 30.0
    arguments: tuple[str, ...] = ()


def run_server(
    reference: str,
    wanted: ServeOptions,
    say: Callable[[str], None],
    announce: Path | None = None,
    fetch: hub.Fetch = model.find,
) -> int:
    """Run the image `reference` until it ends, or until SIGINT or SIGTERM, which drain it; returns its exit code.

    The image is pulled when the engine has none; a GPU is passed through when the engine can; local weights are mounted
    when the image brings none. `fetch` brings those of a hub model. `say` gets every line of its log. `announce`: file
    that gets `{"url", "pid"}` once it is ready.
    Raises `NotReadyError` for no engine, no image or a taken port, `UsageError` for missing weights.
    """
    if announce is not None:
        outputs.retract(announce)
    engine = Engine.connect()
    image = obtain(engine, reference, say)
    of_inferctl(image, reference)
    folder = weights(image, wanted, fetch)
    gpu = engine.info().gpu and "NVIDIA_VISIBLE_DEVICES" in image.environment
    where = wanted.address
    try:
        container = engine.start(image.id, options(image, folder, where, gpu, wanted.arguments))
    except failures.NoBridgeError as error:
        say(f"{error.message}; using the host's network")
        where = replace(where, network="host", port=where.port or free_port())
        container = engine.start(image.id, options(image, folder, where, gpu, wanted.arguments))
    with container:
        return _attend(container, image, where, say, announce, int(wanted.drain_seconds) + _STOP_GRACE_SECONDS)


def obtain(engine: Engine, reference: str, say: Callable[[str], None]) -> ImageInfo:
    """The image `reference`, pulled if absent. Raises `NotReadyError` if its registry does not provide it."""
    image = engine.image(reference)
    if image is None:
        say(f"pulling {reference}")
        engine.pull(reference)
        image = engine.image(reference)
    if image is None:
        raise UsageError(f"image {reference} not found", "`inferctl build` builds one")
    return image


def of_inferctl(image: ImageInfo, reference: str) -> None:
    """Raise `UsageError` for an image that inferctl did not build: its server is not known."""
    if "io.inferctl.version" not in image.labels:
        raise UsageError(
            f"{reference} was not built by inferctl: it has no label `io.inferctl.version`",
            "`inferctl build` builds an image that inferctl can run and verify; use `docker run` for another one",
        )


def weights(image: ImageInfo, wanted: ServeOptions, fetch: hub.Fetch = model.find) -> Path | None:
    """The folder to mount at /model, None when the image brings or fetches its weights."""
    # Only an image of ours says what it does with weights; another one gets them when that is asked for.
    kind = image.labels.get("io.inferctl.model.weights", "mount" if wanted.replaces_model else "bake")
    if kind != "mount":
        if wanted.replaces_model:
            how = "fetches its own weights" if kind == "download" else "brings its own weights"
            raise UsageError(f"this image {how}: --model cannot replace them", "leave --model out")
        return None
    if wanted.model is None:
        raise UsageError("this image mounts its weights, and nothing says where they are", "give `--model DIR`")
    return fetch(wanted.model, wanted.revision).path


def options(
    image: ImageInfo, folder: Path | None, where: Address, gpu: bool, arguments: tuple[str, ...] = ()
) -> ContainerOptions:
    """How the container runs. `arguments` come last, so that they win over the image's own."""
    inside = listening_port(image)
    on_host = where.network == "host"
    port = where.port if on_host else inside
    address = ("--host", where.host, "--port", str(port)) if on_host else ()
    reference = ("--image-reference", image.digests[0] if image.digests else image.id)
    return ContainerOptions(
        command=(*image.command, *address, *reference, *arguments),
        environment={"INFERCTL_SERVE_PORT": str(port)},
        mounts=mounts_of(folder) if folder else {},
        volumes={CACHE_PATH: _CACHE_VOLUME} if image.environment.get("HF_HOME") == CACHE_PATH else {},
        port=inside,
        host=where.host,
        host_port=where.port,
        network=where.network,
        gpu=gpu,
        labels={"io.inferctl.role": "serve"},
    )


def listening_port(image: ImageInfo) -> int:
    """The port that the server in the image listens on."""
    return settings.listening_port(image.environment)


def _attend(
    container: Container,
    image: ImageInfo,
    where: Address,
    say: Callable[[str], None],
    announce: Path | None,
    grace: int,
) -> int:
    reader = threading.Thread(target=_relay, args=(container, say), daemon=True)
    reader.start()
    try:
        port = where.port if where.network == "host" else container.host_port(listening_port(image))
        url = f"http://{where.host}:{port}"
        say(f"the container {container.id[:12]} is at {url}")
        near = "127.0.0.1" if where.host == "0.0.0.0" else where.host
        if announce is not None and _ready(container, (near, port)):
            outputs.announce(announce, url)
        while (code := container.wait(3600.0)) is None:
            pass
    except KeyboardInterrupt:
        say("stopping the container")
        container.stop(grace)
        code = container.wait(float(grace)) or 0
    reader.join(timeout=2.0)
    if code and (error := explain_exit(container, "see the log above")):
        raise error
    return code


def _relay(container: Container, say: Callable[[str], None]) -> None:
    # An engine that died is told by whoever waits for the container.
    with suppress(NotReadyError):
        for line in container.follow():
            say(line)


def _ready(container: Container, address: tuple[str, int]) -> bool:
    """Wait until the server is ready (True) or its container has ended (False)."""
    while container.state().running:
        try:
            request(address, "GET", "/readyz", timeout=5.0)
        except (OSError, http.client.HTTPException):
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False
