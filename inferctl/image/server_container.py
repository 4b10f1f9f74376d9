"""Starts the server of an image in a container, with its weights and the GPUs of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inferctl.config import settings
from inferctl.config.spec import Spec
from inferctl.core.errors import UsageError
from inferctl.image import failures
from inferctl.image.docker import Container, DockerEngine
from inferctl.image.records import ContainerOptions, ImageInfo
from inferctl.image.render import CACHE_PATH, NAMES_LABEL
from inferctl.image.running_container import mounts_of
from inferctl.models.model import IMAGE_FOLDER, ModelFolder
from inferctl.models.weights_folders import WeightsFolder, find, weights_folders

# Returns the local folder of weights.
Fetch = Callable[[WeightsFolder], ModelFolder]
# The volume that keeps the weights that containers download.
_CACHE_VOLUME = "inferctl-models"


@dataclass(frozen=True)
class Address:
    """The address of the container. Port 0 selects a free port. `network`: None for the engine's bridge, or `host`."""

    host: str
    port: int
    network: str | None = None


def start(
    engine: DockerEngine,
    image: ImageInfo,
    folders: Mapping[str, Path],
    address: Address,
    log: Callable[[str], None],
    environment: Mapping[str, str] = {},
) -> tuple[Container, Address]:
    """Start a container and return it with its address: on the network of the host if the engine has no bridge.

    `folders`: of the weights to mount, by path. `environment` is added to that of the image.
    """
    gpu = engine.info().gpu and "NVIDIA_VISIBLE_DEVICES" in image.environment

    def started() -> Container:
        return engine.start(image.id, options(image, folders, address, gpu, environment))

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
    image: ImageInfo, folders: Mapping[str, Path], address: Address, gpu: bool, environment: Mapping[str, str] = {}
) -> ContainerOptions:
    """Return the options of the container. `folders`: of the weights to mount, by path."""
    container_port = settings.listening_port(image.environment)
    listen: tuple[str, ...] = ()
    if address.network == "host":  # on the bridge, the server listens at all addresses of the container
        listen = "--host", address.host, "--port", str(address.port)
    return ContainerOptions(
        command=(*image.command, *listen),
        environment={"INFERCTL_SERVE_PORT": listen[-1] if listen else str(container_port), **environment},
        mounts=mounts_of(folders),
        volumes={CACHE_PATH: _CACHE_VOLUME} if image.environment.get("HF_HOME") == CACHE_PATH else {},
        port=container_port,
        host=address.host,
        host_port=address.port,
        network=address.network,
        gpu=gpu,
        labels={"io.inferctl.role": "serve"},
    )
