"""`inferctl serve --image`: the image as a container, as it will run elsewhere, in the foreground."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inferctl.errors import UsageError
from inferctl.image import failures
from inferctl.image.docker import Container, ContainerOptions, Engine, ImageInfo
from inferctl.image.verify import CACHE_PATH, explain_exit, free_port, mounts_of, request

if TYPE_CHECKING:
    from inferctl.spec import Spec

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


def run_server(
    reference: str, spec: Spec, say: Callable[[str], None], announce: Path | None = None, network: str | None = None
) -> int:
    """Run the image `reference` until it ends, or until SIGINT or SIGTERM, which drain it; returns its exit code.

    The image is pulled when the engine has none; a GPU is passed through when the engine can; local weights of `spec` are mounted
    when the image brings none. `say` gets every line of its log. `announce`: file that gets `{"url", "pid"}` once it is ready.
    Raises `NotReadyError` for no engine, no image or a taken port, `UsageError` for missing weights.
    """
    engine = Engine.connect()
    image = engine.image(reference)
    if image is None:
        say(f"pulling {reference}")
        engine.pull(reference)
        image = engine.image(reference)
    if image is None:
        raise UsageError(f"there is no image {reference}", "`inferctl build` makes one")
    model = weights(image, spec)
    gpu = engine.info().gpu and "NVIDIA_VISIBLE_DEVICES" in image.environment
    where = Address(spec.serve.host, spec.serve.port, network)
    try:
        container = engine.start(image.id, options(image, model, where, gpu))
    except failures.NoBridgeError as error:
        say(f"{error.message}; using the host's network")
        where = replace(where, network="host", port=where.port or free_port())
        container = engine.start(image.id, options(image, model, where, gpu))
    with container:
        return _attend(container, image, where, say, announce, int(spec.serve.drain_seconds) + _STOP_GRACE_SECONDS)


def weights(image: ImageInfo, spec: Spec) -> Path | None:
    """The folder to mount at /model, None when the image brings or fetches its weights."""
    if image.labels.get("io.inferctl.model.weights", spec.model.weights) != "mount":
        return None
    from inferctl import model

    return model.find(spec.model.source, spec.model.revision).path


def options(image: ImageInfo, model: Path | None, where: Address, gpu: bool) -> ContainerOptions:
    """How the container runs."""
    inside = listening_port(image)
    on_host = where.network == "host"
    port = where.port if on_host else inside
    address = ("--host", where.host, "--port", str(port)) if on_host else ()
    return ContainerOptions(
        command=(*image.command, *address, "--image-reference", image.digests[0] if image.digests else image.id),
        environment={"INFERCTL_SERVE_PORT": str(port)},
        mounts=mounts_of(model) if model else {},
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
    return int(image.environment.get("INFERCTL_SERVE_PORT", "8080"))


def _attend(
    container: Container,
    image: ImageInfo,
    where: Address,
    say: Callable[[str], None],
    announce: Path | None,
    grace: int,
) -> int:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    reader = threading.Thread(target=_relay, args=(container, say), daemon=True)
    reader.start()
    try:
        port = where.port if where.network == "host" else container.host_port(listening_port(image))
        url = f"http://{where.host}:{port}"
        say(f"the container {container.id[:12]} is at {url}")
        if announce is not None and _ready(container, (where.host if where.host != "0.0.0.0" else "127.0.0.1", port)):
            partial = announce.with_name(f".{announce.name}.{os.getpid()}")
            partial.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")
            partial.replace(announce)
        while (code := container.wait(3600.0)) is None:
            pass
    except KeyboardInterrupt:
        say("stopping the container")
        container.stop(grace)
        code = container.wait(float(grace)) or 0
    finally:
        signal.signal(signal.SIGTERM, before)
    reader.join(timeout=2.0)
    if code and (error := explain_exit(container)):
        raise error
    return code


def _relay(container: Container, say: Callable[[str], None]) -> None:
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
