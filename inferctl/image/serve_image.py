"""Runs an image as a container in the foreground, for `inferctl serve --image`."""

from __future__ import annotations

import json
import math
import signal
import stat
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core import outputs
from inferctl.core.errors import EXIT_INTERRUPTED, NotReadyError, UsageError
from inferctl.image import failures
from inferctl.image.docker import Container, DockerEngine
from inferctl.image.records import ContainerOptions, ImageInfo
from inferctl.image.render import CACHE_PATH, KEYS_PATH, NAMES_LABEL
from inferctl.image.running_container import exit_error, free_port, mounts_of, wait_ready
from inferctl.models.model import IMAGE_FOLDER, ModelFolder
from inferctl.models.weights_folders import WeightsFolder, find, weights_folders

# Returns the local folder of weights.
Fetch = Callable[[WeightsFolder], ModelFolder]
# The volume that keeps the weights that containers download.
_CACHE_VOLUME = "inferctl-models"
# Added to the drain time of the server, before the engine kills it.
_STOP_GRACE_SECONDS = 5


@dataclass(frozen=True)
class Address:
    """The address of the container. Port 0 selects a free port. `network`: None for the engine's bridge, or `host`."""

    host: str
    port: int
    network: str | None = None


@dataclass(frozen=True)
class ServeOptions:
    """The options of `run_server`. `spec`: has the weights to mount, None if not specified.

    `replaces_model`: whether the command line specifies the model. `keys`: the key file to mount. `drain_seconds`:
    maximum duration of a stop, including the grace period. `arguments`: options of `inferctl serve` for the server in
    the container.
    """

    address: Address
    spec: Spec | None = None
    replaces_model: bool = False
    keys: Path | None = None
    drain_seconds: float = 30.0
    arguments: tuple[str, ...] = ()


def run_server(
    reference: str,
    serve_options: ServeOptions,
    log: Callable[[str], None],
    announce: Path | None = None,
    fetch: Fetch = find,
) -> int:
    """Run the image `reference` until it ends and return its exit code. SIGINT and SIGTERM drain it.

    The image is pulled if the engine does not have it. It gets the GPUs if the engine supports that. Local weights are
    mounted if the image has none.

    `fetch` returns the folder of the weights to mount. `log` is called with each line of the container log.
    `announce`: file to which `{"url", "pid"}` is written when the server is ready. Raises `NotReadyError` without an
    engine, an image or a free port, `UsageError` for missing weights.
    """
    if announce is not None:
        outputs.retract(announce)
    engine = DockerEngine.connect()
    image = get_or_pull(engine, reference, log)
    check_inferctl_image(image, reference)
    if serve_options.keys is not None:
        check_readable(serve_options.keys)
    folders = weights(image, serve_options.spec, fetch, replaces_model=serve_options.replaces_model)
    address = serve_options.address
    if not address.port:  # the server names it
        address = replace(address, port=free_port())
    container, address = start(engine, image, folders, address, log, serve_options.arguments, serve_options.keys)
    with container:
        timeout = int(serve_options.drain_seconds) + _STOP_GRACE_SECONDS
        return _run_to_end(container, address, log, announce, timeout)


def start(
    engine: DockerEngine,
    image: ImageInfo,
    folders: Mapping[str, Path],
    address: Address,
    log: Callable[[str], None],
    arguments: tuple[str, ...] = (),
    keys: Path | None = None,
    environment: Mapping[str, str] = {},
) -> tuple[Container, Address]:
    """Start a container and return it with its address: on the network of the host if the engine has no bridge.

    `folders`: of the weights to mount, by path. `environment` is added to that of `options`.
    """
    gpu = engine.info().gpu and "NVIDIA_VISIBLE_DEVICES" in image.environment

    def started() -> Container:
        found = options(image, folders, address, gpu, arguments, keys)
        return engine.start(image.id, replace(found, environment={**(found.environment or {}), **environment}))

    try:
        return started(), address
    except failures.NoBridgeError as error:
        log(f"{error.message}; using the host's network")
    address = replace(address, network="host")
    return started(), address


def get_or_pull(engine: DockerEngine, reference: str, log: Callable[[str], None]) -> ImageInfo:
    """Return the image `reference`, pulled if the engine does not have it. Raises `NotReadyError` if the pull fails."""
    image = engine.image(reference)
    if image is None:
        log(f"pulling {reference}")
        engine.pull(reference)
        image = engine.image(reference)
    if image is None:
        raise UsageError(f"image {reference} not found", "build it with `inferctl build`")
    return image


def check_inferctl_image(image: ImageInfo, reference: str) -> None:
    """Raise `UsageError` for an image that inferctl did not build, because its server is unknown."""
    if "io.inferctl.version" not in image.labels:
        raise UsageError(
            f"{reference} was not built by inferctl: it has no label `io.inferctl.version`",
            "build an image with `inferctl build`, or run this one with `docker run`",
        )


def check_readable(keys: Path) -> None:
    """Raise `UsageError` if the user of a container cannot read the key file."""
    file = keys.resolve()
    try:
        modes = file.parent.stat().st_mode & stat.S_IXOTH, file.stat().st_mode & stat.S_IROTH
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the key file {keys} cannot be read: {reason}", "write one with `inferctl keys`") from None
    if not all(modes):
        raise UsageError(
            f"the user of the container cannot read the key file {keys}",
            f"run `chmod o+x {file.parent}; chmod o+r {file}`: the file has hashes of keys, and no key",
        )


def folders_of(image: ImageInfo, default: str = "bake") -> list[WeightsFolder]:
    """Return where an image has the weights of its names, or expects them. The name of the only model is empty.

    `default`: how an image without a label has them. Raises `UsageError` for a label that is wrong.
    """
    kind = image.labels.get("io.inferctl.model.weights", default)
    only = json.dumps([{"name": "", "weights": kind, "path": IMAGE_FOLDER}])
    try:
        listed = json.loads(image.labels.get(NAMES_LABEL, only))
        unknown = {"source": "", "revision": None, "mount": "", "stage": ""}
        return [WeightsFolder(**{**unknown, **one}) for one in listed]
    except (ValueError, TypeError):
        raise UsageError(f"{image.id} has a wrong label {NAMES_LABEL}", "build the image again") from None


def weights(
    image: ImageInfo, spec: Spec | None, fetch: Fetch = find, *, replaces_model: bool = False
) -> dict[str, Path]:
    """Return the folders to mount by path; none if the image contains or downloads its weights.

    `spec`: names the weights, None if none is specified. `replaces_model`: whether the command line does.
    """
    # An image without the label gets weights only if the command line specifies a model.
    folders = folders_of(image, "mount" if replaces_model else "bake")
    mounted = {each.path: each.name for each in folders if each.weights == "mount"}
    if replaces_model and len(mounted) < len(folders):
        verb = "downloads" if any(each.weights == "download" for each in folders) else "contains"
        raise UsageError(f"this image {verb} its own weights: --model cannot replace them", "remove --model")
    if mounted and spec is None:
        raise UsageError("this image mounts its weights, and no model is specified", "pass `--model DIR`")
    # The only model may have another name in the image.
    named = {"" if each.path == IMAGE_FOLDER else each.name: each for each in weights_folders(spec)} if spec else {}
    keys = {path: "" if path == IMAGE_FOLDER else name for path, name in mounted.items()}
    if missing := sorted(set(keys.values()) - named.keys()):
        raise UsageError(
            f"this image mounts the weights of {missing[0]}, which the spec lacks", "pass its `--spec FILE`"
        )
    return {path: fetch(named[key]).path for path, key in keys.items()}


def options(
    image: ImageInfo,
    folders: Mapping[str, Path],
    address: Address,
    gpu: bool,
    arguments: tuple[str, ...] = (),
    keys: Path | None = None,
) -> ContainerOptions:
    """Return the options of the container. `arguments` come last, so that they override those of the image.

    `folders`: of the weights to mount, by path.
    """
    container_port = settings.listening_port(image.environment)
    on_host = address.network == "host"
    port = address.port if on_host else container_port
    # On the bridge, the server listens at all addresses of the container and cannot know where clients reach it.
    listen = (
        ("--host", address.host, "--port", str(port)) if on_host else ("--published", f"{address.host}:{address.port}")
    )
    reference = ("--image-reference", image.digests[0] if image.digests else image.id)
    environment = {"INFERCTL_SERVE_PORT": str(port)}
    mounts = mounts_of(folders)
    if keys is not None:
        mounts[KEYS_PATH] = str(keys.resolve().parent)
        environment["INFERCTL_ACCESS_KEYS"] = f"{KEYS_PATH}/{keys.resolve().name}"
    return ContainerOptions(
        command=(*image.command, *listen, *reference, *arguments),
        environment=environment,
        mounts=mounts,
        volumes={CACHE_PATH: _CACHE_VOLUME} if image.environment.get("HF_HOME") == CACHE_PATH else {},
        port=container_port,
        host=address.host,
        host_port=address.port,
        network=address.network,
        gpu=gpu,
        labels={"io.inferctl.role": "serve"},
    )


def _run_to_end(
    container: Container,
    address: Address,
    log: Callable[[str], None],
    announce: Path | None,
    stop_timeout: int,
) -> int:
    """Log the output of the container and announce the server; return the exit code. Ctrl-C stops the container."""
    reader = threading.Thread(target=_relay_log, args=(container, log), daemon=True)
    reader.start()
    try:
        log(f"container  {container.id[:12]}")  # the server in it prints the address
        local_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
        if announce is not None and wait_ready(container, (local_host, address.port), math.inf):
            host = f"[{local_host}]" if ":" in local_host else local_host
            outputs.announce(announce, f"http://{host}:{address.port}")
        while (code := container.wait(3600.0)) is None:
            pass
    except KeyboardInterrupt as stop:
        log("stopping the container")
        container.stop(stop_timeout)
        # As a server without a container does.
        after_stop = 0 if stop.args == (signal.SIGTERM,) else EXIT_INTERRUPTED
        code = container.wait(float(stop_timeout)) or after_stop
    reader.join(timeout=2.0)
    if code not in (0, EXIT_INTERRUPTED) and (error := exit_error(container, "see the log above")):
        raise error
    return code


def _relay_log(container: Container, log: Callable[[str], None]) -> None:
    # If the engine crashes, the thread that waits for the container reports it.
    with suppress(NotReadyError):
        for line in container.follow():
            log(line)
