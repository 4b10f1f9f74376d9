"""The Docker Engine through its SDK: what it is, images, containers, pushes. The only file that imports `docker`.

Builds do not go through here: the SDK knows the classic builder only (`inferctl.image.buildx` does them).
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from inferctl.image.records import (
    CDI_ALL_GPUS,
    ContainerOptions,
    EngineInfo,
    ImageInfo,
    LayerInfo,
    State,
    read_engine,
    read_image,
)
from inferctl.image.reference import familiar, normalized, split

_TIMEOUT_SECONDS = 60
# A registry may take minutes over the last blob of a layer without a word; only then is a push taken for stalled.
_PUSH_SILENCE_SECONDS = 600
_BROKEN = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Whatever the engine's answer to `what` fails with becomes a `NotReadyError`."""
    try:
        yield
    except docker.errors.APIError as error:
        raise failures.of_engine(_words(error), what) from None
    except _BROKEN as error:
        raise _unreachable(error, None) from None


class Container:
    """One container; always `remove()` it, or use it as a context manager."""

    def __init__(self, api: docker.APIClient, identity: str) -> None:
        self._api = api
        self.id = identity

    def __enter__(self) -> Container:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.remove()
        except NotReadyError:
            # An engine that died is why there is an error already.
            if error is None:
                raise

    def state(self) -> State:
        """What the container does now."""
        with _asking("inspect a container"):
            found = self._api.inspect_container(self.id)["State"]
        running = bool(found["Running"])
        code = None if running else int(found["ExitCode"])
        return State(running, code, bool(found.get("OOMKilled")), str(found.get("Error") or ""))

    def host_port(self, port: int) -> int:
        """The port here that leads to `port` inside. Raises `NotReadyError` when none does (any more)."""
        with _asking("inspect a container"):
            bound = (self._api.inspect_container(self.id)["NetworkSettings"]["Ports"] or {}).get(f"{port}/tcp")
        if not bound:
            raise NotReadyError(f"the container does not publish port {port}", "it may have ended: see its log")
        return int(bound[0]["HostPort"])

    def log(self, lines: int = 30) -> str:
        """The last `lines` lines of stdout and stderr."""
        with _asking("give a container's log"):
            return bytes(self._api.logs(self.id, tail=lines)).decode("utf-8", "replace").strip()

    def follow(self) -> Iterator[str]:
        """The lines of stdout and stderr as they come, until the container ends."""
        partial = b""
        with _asking("follow a container's log"):
            for chunk in self._api.logs(self.id, stream=True, follow=True):
                *lines, partial = (partial + bytes(chunk)).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
        if partial:
            yield partial.decode("utf-8", "replace")

    def wait(self, seconds: float) -> int | None:
        """Exit code once the container ended, None when it still runs after `seconds`."""
        with _asking("wait for a container"):
            try:
                return int(self._api.wait(self.id, timeout=math.ceil(seconds))["StatusCode"])
            except requests.ReadTimeout:
                return None
            except requests.ConnectionError as error:
                # The engine sends the head of its answer at once and the code at the end: that is how requests tells a time-out in between.
                if any(isinstance(cause, urllib3.exceptions.ReadTimeoutError) for cause in error.args):
                    return None
                raise

    def stop(self, seconds: int) -> None:
        """SIGTERM, then SIGKILL after `seconds`."""
        with _asking("stop a container"), suppress(docker.errors.NotFound):
            self._api.stop(self.id, timeout=seconds)

    def remove(self) -> None:
        """Kill and remove; no error when it is gone already."""
        with _asking("remove a container"), suppress(docker.errors.NotFound):
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
        with _asking("describe itself"):
            return read_engine(self._api.info(), self._api.version())

    def image(self, reference: str) -> ImageInfo | None:
        """The image `reference` (a name or an id), None when the engine has none."""
        with _asking(f"inspect the image {reference}"):
            try:
                return read_image(cast("Any", self._api).inspect_image(reference))
            except docker.errors.NotFound:
                return None

    def history(self, reference: str) -> list[LayerInfo]:
        """The rows that made the image, first instruction first."""
        with _asking(f"give the history of {reference}"):
            rows = cast("Any", self._api).history(reference)
        return [
            LayerInfo(str(row.get("CreatedBy") or row.get("Comment") or ""), int(row.get("Size") or 0))
            for row in rows[::-1]
        ]

    def save(self, reference: str) -> Iterator[bytes]:
        """The image as a tar stream, as `docker save` writes it."""
        with _asking(f"save the image {reference}"):
            yield from cast("Iterator[bytes]", self._api.get_image(reference))

    def tag(self, image: str, reference: str) -> None:
        """Give the image `image` the name `reference`."""
        repository, tag = split(reference)
        with _asking(f"give an image the name {reference}"):
            self._api.tag(image, repository, tag, force=True)

    def untag(self, reference: str) -> None:
        """Take the name `reference` away; the image goes with its last name. Cleaning up: it never fails."""
        with suppress(*_BROKEN):
            self._api.remove_image(reference, noprune=True)

    def discard(self, image: str) -> None:
        """Remove an image that has no name; one that is named or in use stays. Cleaning up: it never fails."""
        with suppress(NotReadyError, *_BROKEN):
            found = self.image(image)
            if found and not found.tags:
                self._api.remove_image(image)

    def push(self, reference: str, attempts: int = ATTEMPTS) -> Generator[PushEvent, None, Pushed]:
        """Push `reference` with the docker command's own credentials; see `inferctl.image.push.push`."""
        # With its registry: the SDK finds no login for `registry-1.docker.io`, another name of Docker Hub.
        repository, tag = split(normalized(reference))
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
        except docker.errors.APIError as error:
            container.remove()
            message = _words(error)
            if problem := failures.port_taken(message, options.host_port) or failures.no_bridge(message):
                raise problem from None
            raise InferctlError(
                f"the container did not start: {message}", "`docker run` on the image shows more"
            ) from None
        except _BROKEN as error:
            with suppress(NotReadyError):
                container.remove()
            raise _unreachable(error, None) from None
        except BaseException:
            container.remove()
            raise
        return container

    def create(self, image: str, options: ContainerOptions) -> Container:
        """Like `start`, without starting it."""
        mounts = [
            docker.types.Mount(path, here, type="bind", read_only=True) for path, here in (options.mounts or {}).items()
        ]
        mounts += [docker.types.Mount(path, volume, type="volume") for path, volume in (options.volumes or {}).items()]
        published = options.port if options.network is None else None
        host_config = self._api.create_host_config(
            mounts=mounts,
            port_bindings={f"{published}/tcp": (options.host, options.host_port or None)} if published else None,
            network_mode=options.network,
            read_only=True,
            mem_limit=options.memory_bytes,
            # Compiled kernels (Triton, torch.compile) are loaded from there: it must allow that.
            tmpfs={"/tmp": "rw,exec,nosuid,nodev,mode=1777"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            device_requests=[_gpus(self.info())] if options.gpu else None,
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
        except docker.errors.APIError as error:
            raise failures.of_engine(_words(error), "make a container") from None
        except _BROKEN as error:
            raise _unreachable(error, None) from None
        return Container(self._api, str(made["Id"]))

    def pull(self, reference: str) -> str:
        """Pull an image by name or digest and return its `name@digest`.

        Raises `MissingImageError` when the registry has no such image, `NotReadyError` for any other failure.
        """
        repository, tag = split(reference)
        try:
            for line in self._api.pull(repository, tag, stream=True, decode=True):
                if problem := line.get("error"):
                    raise failures.of_pull(str(problem), reference)
        except _BROKEN as error:
            raise failures.of_pull(_words(error), reference) from None
        image = self.image(reference)
        digests = image.digests if image else ()
        return next((one for one in digests if familiar(one).partition("@")[0] == familiar(repository)), reference)

    def converse(
        self, image: str, options: ContainerOptions, stdin: bytes, seconds: float
    ) -> tuple[int | None, bytes, str]:
        """Run a container to its end with `stdin`; exit code (None: it took longer), stdout, and the end of stderr."""
        with self.create(image, options) as container, _asking("run a container"):
            attached = self._api.attach_socket(container.id, params={"stdin": 1, "stream": 1})
            self._api.start(container.id)
            raw = getattr(attached, "_sock", attached)
            # A container that ended before it read: its exit code says why.
            with suppress(OSError):
                raw.sendall(stdin)
                raw.shutdown(socket.SHUT_WR)
            code = container.wait(seconds)
            # The socket belongs to a response. Python 3.13 reports a response whose socket is closed before it.
            getattr(attached, "_response", attached).close()
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


def _gpus(info: EngineInfo) -> docker.types.DeviceRequest:
    """All NVIDIA GPUs: through the NVIDIA runtime, or by their device specifications where there is no such runtime."""
    if "nvidia" in info.runtimes or not info.cdi_gpu:
        return docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
    return docker.types.DeviceRequest(driver="cdi", device_ids=[CDI_ALL_GPUS])


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
