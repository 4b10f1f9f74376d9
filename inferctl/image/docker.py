"""The Docker Engine through its SDK: what it is, images, containers, pushes. The only file that imports `docker`.

Builds do not go through here: the SDK knows the classic builder only (`inferctl.image.buildx` does them).
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import docker
import docker.errors
import docker.types
import requests
import urllib3.exceptions

from inferctl.errors import InferctlError, NotReadyError
from inferctl.image import failures
from inferctl.image.events import PushEvent
from inferctl.image.push import ATTEMPTS, Pushed, push

_TIMEOUT_SECONDS = 60
# A registry may take minutes over the last blob of a layer without a word; only then is a push taken for stalled.
_PUSH_SILENCE_SECONDS = 600
_BROKEN = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)


@dataclass(frozen=True)
class EngineInfo:
    """The engine at hand. `platform` as in `linux/amd64`; `gpu`: containers can be given NVIDIA GPUs."""

    version: str
    api_version: str
    platform: str
    storage_driver: str
    containerd_store: bool
    root_dir: str
    runtimes: tuple[str, ...]
    gpu: bool
    memory_bytes: int
    cpus: int


@dataclass(frozen=True)
class ImageInfo:
    """An image in the engine. `layers` are diff ids, bottom first; `size` is uncompressed bytes."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    size: int
    platform: str
    user: str
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    labels: Mapping[str, str]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class LayerInfo:
    """One row of an image's history: the instruction that made it and its uncompressed bytes."""

    created_by: str
    size: int


@dataclass(frozen=True)
class ContainerOptions:
    """How a container runs. `mounts`: path in the container -> path here, read-only. `volumes`: path -> named volume.

    `scratch`: paths in memory besides /tmp. `network`: `host`, `none`, or None for the engine's bridge.

    `port`: the port inside that is published at `host`:`host_port` (0 takes a free one); not with `network`.
    """

    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    environment: Mapping[str, str] | None = None
    mounts: Mapping[str, str] | None = None
    volumes: Mapping[str, str] | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    host_port: int = 0
    network: str | None = None
    gpu: bool = False
    stdin: bool = False
    labels: Mapping[str, str] | None = None
    scratch: tuple[str, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True)
class State:
    """State of a container; `exit_code` is None while it runs."""

    running: bool
    exit_code: int | None
    out_of_memory: bool
    error: str


class Container:
    """One container; always `remove()` it, or use it as a context manager."""

    def __init__(self, api: docker.APIClient, identity: str) -> None:
        self._api = api
        self.id = identity

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state(self) -> State:
        """What the container does now."""
        found = self._api.inspect_container(self.id)["State"]
        running = bool(found["Running"])
        code = None if running else int(found["ExitCode"])
        return State(running, code, bool(found.get("OOMKilled")), str(found.get("Error") or ""))

    def host_port(self, port: int) -> int:
        """The port here that leads to `port` inside. Raises `NotReadyError` when none does (any more)."""
        bound = (self._api.inspect_container(self.id)["NetworkSettings"]["Ports"] or {}).get(f"{port}/tcp")
        if not bound:
            raise NotReadyError(f"the container does not publish port {port}", "it may have ended: see its log")
        return int(bound[0]["HostPort"])

    def log(self, lines: int = 30) -> str:
        """The last `lines` lines of stdout and stderr."""
        return bytes(self._api.logs(self.id, tail=lines)).decode("utf-8", "replace").strip()

    def follow(self) -> Iterator[str]:
        """The lines of stdout and stderr as they come, until the container ends."""
        partial = b""
        for chunk in self._api.logs(self.id, stream=True, follow=True):
            *lines, partial = (partial + bytes(chunk)).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in lines)
        if partial:
            yield partial.decode("utf-8", "replace")

    def wait(self, seconds: float) -> int | None:
        """Exit code once the container ended, None when it still runs after `seconds`."""
        try:
            return int(self._api.wait(self.id, timeout=math.ceil(seconds))["StatusCode"])
        except (requests.Timeout, requests.ConnectionError):
            return None

    def stop(self, seconds: int) -> None:
        """SIGTERM, then SIGKILL after `seconds`."""
        with suppress(docker.errors.NotFound):
            self._api.stop(self.id, timeout=seconds)

    def remove(self) -> None:
        """Kill and remove; no error when it is gone already."""
        with suppress(docker.errors.NotFound):
            self._api.remove_container(self.id, force=True, v=True)


class Engine:
    """A connection to a Docker Engine that answered."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client
        self._api = client.api

    @classmethod
    def connect(cls, url: str | None = None) -> Engine:
        """Connect to `url`, or to where DOCKER_HOST and the docker command's context point.

        Raises `NotReadyError` that says whether the engine is absent, forbidden or down.
        """
        try:
            client = (
                docker.DockerClient(base_url=url, version="auto", timeout=_TIMEOUT_SECONDS)
                if url
                else docker.from_env(version="auto", timeout=_TIMEOUT_SECONDS)
            )
            client.ping()
        except _BROKEN as error:
            raise _unreachable(error, url) from None
        return cls(client)

    def info(self) -> EngineInfo:
        """Versions and abilities of the engine."""
        info, version = self._api.info(), self._api.version()
        status = dict(pair for pair in info.get("DriverStatus") or [] if len(pair) == 2)
        runtimes = tuple(sorted(info.get("Runtimes") or {}))
        return EngineInfo(
            version=str(version["Version"]),
            api_version=str(version["ApiVersion"]),
            platform=f"{version['Os']}/{version['Arch']}",
            storage_driver=str(info.get("Driver", "")),
            containerd_store=str(status.get("driver-type", "")).startswith("io.containerd.snapshotter"),
            root_dir=str(info.get("DockerRootDir", "")),
            runtimes=runtimes,
            gpu="nvidia" in runtimes or any("nvidia" in str(d) for d in info.get("CDISpecDirs") or []),
            memory_bytes=int(info.get("MemTotal") or 0),
            cpus=int(info.get("NCPU") or 0),
        )

    def image(self, reference: str) -> ImageInfo | None:
        """The image `reference` (a name or an id), None when the engine has none."""
        try:
            found = cast("Any", self._api).inspect_image(reference)
        except docker.errors.NotFound:
            return None
        config = found.get("Config") or {}
        return ImageInfo(
            id=str(found["Id"]),
            tags=tuple(found.get("RepoTags") or ()),
            digests=tuple(found.get("RepoDigests") or ()),
            size=int(found.get("Size") or 0),
            platform=f"{found.get('Os')}/{found.get('Architecture')}",
            user=str(config.get("User") or ""),
            environment=dict(item.partition("=")[::2] for item in config.get("Env") or []),
            entrypoint=tuple(config.get("Entrypoint") or ()),
            command=tuple(config.get("Cmd") or ()),
            labels=dict(config.get("Labels") or {}),
            layers=tuple((found.get("RootFS") or {}).get("Layers") or ()),
        )

    def history(self, reference: str) -> list[LayerInfo]:
        """The rows that made the image, first instruction first."""
        rows = cast("Any", self._api).history(reference)
        return [
            LayerInfo(str(row.get("CreatedBy") or row.get("Comment") or ""), int(row.get("Size") or 0))
            for row in rows[::-1]
        ]

    def save(self, reference: str) -> Iterator[bytes]:
        """The image as a tar stream, as `docker save` writes it."""
        return cast("Iterator[bytes]", self._api.get_image(reference))

    def tag(self, image: str, reference: str) -> None:
        """Give the image `image` the name `reference`."""
        repository, tag = _split(reference)
        self._api.tag(image, repository, tag, force=True)

    def untag(self, reference: str) -> None:
        """Take the name `reference` away; the image goes with its last name. No error when there is none."""
        with suppress(docker.errors.NotFound, docker.errors.APIError):
            self._api.remove_image(reference, noprune=True)

    def discard(self, image: str) -> None:
        """Remove an image that has no name; one that is named or in use stays."""
        found = self.image(image)
        if found and not found.tags:
            with suppress(docker.errors.APIError):
                self._api.remove_image(image)

    def push(self, reference: str, attempts: int = ATTEMPTS) -> Generator[PushEvent, None, Pushed]:
        """Push `reference` with the docker command's own credentials; see `inferctl.image.push.push`."""
        repository, tag = _split(reference)
        usual, self._api.timeout = self._api.timeout, _PUSH_SILENCE_SECONDS
        try:
            return (yield from push(lambda: _lines(self._api, repository, tag), reference, attempts))
        finally:
            self._api.timeout = usual

    def start(self, image: str, options: ContainerOptions) -> Container:
        """Create and start a container: not root, root file system read-only, /tmp in memory, no capabilities.

        Raises `NotReadyError` for a taken port or a network that the engine cannot make. Nothing stays behind then.
        """
        container = self.create(image, options)
        try:
            self._api.start(container.id)
        except _BROKEN as error:
            container.remove()
            message = _words(error)
            if problem := failures.port_taken(message, options.host_port) or failures.no_bridge(message):
                raise problem from None
            raise InferctlError(
                f"the container did not start: {message}", "`docker run` on the image shows more"
            ) from None
        except BaseException:
            container.remove()
            raise
        return container

    def create(self, image: str, options: ContainerOptions) -> Container:
        """Like `start`, without starting it."""
        binds: dict[str, Mapping[str, str]] = {
            folder: {"bind": path, "mode": "ro"} for path, folder in (options.mounts or {}).items()
        }
        binds |= {volume: {"bind": path, "mode": "rw"} for path, volume in (options.volumes or {}).items()}
        published = options.port if options.network is None else None
        host_config = self._api.create_host_config(
            binds=binds,
            port_bindings={f"{published}/tcp": (options.host, options.host_port or None)} if published else None,
            network_mode=options.network,
            read_only=True,
            mem_limit=options.memory_bytes,
            # Compiled kernels (Triton, torch.compile) are loaded from there: it must allow that.
            tmpfs={"/tmp": "rw,exec,nosuid,nodev,mode=1777"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            device_requests=[docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])] if options.gpu else None,
        )
        try:
            made = self._api.create_container(
                image,
                command=list(options.command) if options.command is not None else None,
                entrypoint=list(options.entrypoint) if options.entrypoint is not None else None,
                environment=dict(options.environment or {}),
                ports=[published] if published else None,
                stdin_open=options.stdin,
                labels=dict(options.labels or {}),
                host_config=host_config,
            )
        except docker.errors.NotFound:
            raise NotReadyError(
                f"there is no image {image} in the engine", "`docker pull` it, or build it first"
            ) from None
        except _BROKEN as error:
            raise InferctlError(f"the container could not be made: {_words(error)}", "see the engine's log") from None
        return Container(self._api, str(made["Id"]))

    def pull(self, reference: str) -> None:
        """Pull an image by name or digest. Raises `NotReadyError` when its registry does not give it."""
        repository, tag = _split(reference)
        try:
            for line in self._api.pull(repository, tag, stream=True, decode=True):
                if problem := line.get("error"):
                    raise failures.of_pull(str(problem), reference)
        except _BROKEN as error:
            raise failures.of_pull(_words(error), reference) from None

    def converse(
        self, image: str, options: ContainerOptions, stdin: bytes, seconds: float
    ) -> tuple[int | None, bytes, str]:
        """Run a container to its end with `stdin`; exit code (None: it took longer), stdout, and the end of stderr."""
        with self.create(image, options) as container:
            attached = self._api.attach_socket(container.id, params={"stdin": 1, "stream": 1})
            self._api.start(container.id)
            raw = getattr(attached, "_sock", attached)
            raw.sendall(stdin)
            raw.shutdown(socket.SHUT_WR)
            code = container.wait(seconds)
            attached.close()
            out = bytes(self._api.logs(container.id, stdout=True, stderr=False))
            err = bytes(self._api.logs(container.id, stdout=False, stderr=True, tail=20))
        return code, out, err.decode("utf-8", "replace").strip()


def _lines(api: docker.APIClient, repository: str, tag: str | None) -> Iterator[Mapping[str, Any]]:
    """One push; a connection that breaks is told as an error line, like the failures that the engine itself reports."""
    try:
        yield from api.push(repository, tag, stream=True, decode=True)
    except _BROKEN as error:
        yield {
            "error": f"connection broken: {_words(error)}"
            if not isinstance(error, docker.errors.APIError)
            else _words(error)
        }


def _split(reference: str) -> tuple[str, str | None]:
    name, at, digest = reference.partition("@")
    if at:
        return name, digest
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def _words(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error).strip()


def _unreachable(error: BaseException, url: str | None) -> NotReadyError:
    where = f" at {url}" if url else ""
    codes = set()
    seen: list[BaseException] = [error]
    while seen:
        one = seen.pop()
        if isinstance(one, OSError) and one.errno:
            codes.add(one.errno)
        seen += [a for a in one.args if isinstance(a, BaseException)]
        seen += [c for c in (one.__cause__, one.__context__) if c is not None]
    if errno.EACCES in codes:
        return NotReadyError(
            f"no permission to use the Docker Engine{where}",
            "`sudo usermod -aG docker $USER` and log in again, or use rootless Docker",
        )
    if errno.ENOENT in codes:
        return NotReadyError(
            f"there is no Docker Engine here: its socket{where} does not exist",
            "install one (`apt-get install docker.io docker-buildx`) or start it (`systemctl start docker`); DOCKER_HOST names another",
        )
    if errno.ECONNREFUSED in codes:
        return NotReadyError(
            f"the Docker Engine{where} is down: it refused the connection",
            "`systemctl start docker`, and see `journalctl -u docker`; DOCKER_HOST names another engine",
        )
    return NotReadyError(
        f"the Docker Engine{where} does not answer: {_words(error)}",
        "check DOCKER_HOST and `docker context ls`; `docker version` should work",
    )
