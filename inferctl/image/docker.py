"""Connects to the Docker Engine through its SDK: facts, images, containers. Only this file imports `docker`.

`buildx.py` does the builds, because the SDK supports the classic builder only, and `push.py` the pushes.
"""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import docker
import docker.errors
import docker.types
import requests
import urllib3.exceptions

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image import failures
from inferctl.image.image_name import familiar, split
from inferctl.image.records import (
    CDI_ALL_GPUS,
    ContainerOptions,
    ContainerState,
    DockerInfo,
    ImageInfo,
    read_engine,
    read_image,
)

_TIMEOUT_SECONDS = 60
# Size of /dev/shm, of which only used bytes take memory. vLLM reserves 160 MiB and 240 MiB per GPU if it uses several
# GPUs or a CPU, and does not start in the 64 MiB that the engine gives by default.
_SHARED_MEMORY_BYTES = 4 * 1024**3
_ENGINE_ERRORS = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError)
# Number of the system, what is wrong (with the address of the engine, if one was given), and a hint.
_UNREACHABLE = (
    (
        errno.EACCES,
        "permission denied for the Docker Engine{}",
        "run `sudo usermod -aG docker $USER` and log in again, or use rootless Docker",
    ),
    (
        errno.ENOENT,
        "Docker Engine not found: its socket{} does not exist",
        "install Docker (`apt-get install docker.io docker-buildx`), start it (`systemctl start docker`), or set "
        "DOCKER_HOST",
    ),
    (
        errno.ECONNREFUSED,
        "the Docker Engine{} is down: connection refused",
        "start it with `systemctl start docker` and check `journalctl -u docker`, or set DOCKER_HOST",
    ),
)


@contextmanager
def _translate_errors(action: str) -> Iterator[None]:
    """Convert an error of the engine during `action` to a `NotReadyError`."""
    try:
        yield
    except docker.errors.APIError as error:
        raise failures.engine_error(_message(error), action) from None
    except _ENGINE_ERRORS as error:
        raise _unreachable(error, None) from None


class Container:
    """A container. Call `remove()`, or use it as a context manager."""

    def __init__(self, api: docker.APIClient, identity: str) -> None:
        self._api = api
        self.id = identity

    def __enter__(self) -> Container:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.remove()
        except NotReadyError:
            # Keep the first error: an engine that crashed causes both.
            if error is None:
                raise

    def state(self) -> ContainerState:
        """Return the current state."""
        with _translate_errors("inspect a container"):
            found = self._api.inspect_container(self.id)["State"]
        running = bool(found["Running"])
        code = None if running else int(found["ExitCode"])
        return ContainerState(running, code, bool(found.get("OOMKilled")), str(found.get("Error") or ""))

    def log(self, lines: int = 30) -> str:
        """Return the last `lines` lines of stdout and stderr."""
        with _translate_errors("read the log of a container"):
            return bytes(self._api.logs(self.id, tail=lines)).decode("utf-8", "replace").strip()

    def follow(self) -> Iterator[str]:
        """Yield the lines of stdout and stderr until the container ends."""
        partial = b""
        with _translate_errors("follow the log of a container"):
            for chunk in self._api.logs(self.id, stream=True, follow=True):
                *lines, partial = (partial + bytes(chunk)).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
        if partial:
            yield partial.decode("utf-8", "replace")

    def wait(self, seconds: float) -> int | None:
        """Wait until the container ends and return its exit code; None if it still runs after `seconds`."""
        with _translate_errors("wait for a container"):
            try:
                return int(self._api.wait(self.id, timeout=math.ceil(seconds))["StatusCode"])
            except requests.ReadTimeout:
                return None
            except requests.ConnectionError as error:
                # The engine sends the response header at once and the code at the end. For a timeout between them,
                # requests raises ConnectionError.
                if any(isinstance(cause, urllib3.exceptions.ReadTimeoutError) for cause in error.args):
                    return None
                raise

    def stop(self, seconds: int) -> None:
        """Send SIGTERM, and SIGKILL after `seconds`."""
        with _translate_errors("stop a container"), suppress(docker.errors.NotFound):
            self._api.stop(self.id, timeout=seconds)

    def remove(self) -> None:
        """Kill and remove the container. It may already be removed."""
        with _translate_errors("remove a container"), suppress(docker.errors.NotFound):
            self._api.remove_container(self.id, force=True, v=True)


class DockerEngine:
    """A connection to a Docker Engine."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client
        self._api = client.api

    @classmethod
    def connect(cls, url: str | None = None) -> DockerEngine:
        """Connect to `url`, or by default to the engine of DOCKER_HOST or the docker context.

        Raises `NotReadyError` if the engine is missing or down, or if access is denied.
        """
        try:
            client = (
                docker.DockerClient(base_url=url, version="auto", timeout=_TIMEOUT_SECONDS)
                if url
                else docker.from_env(version="auto", timeout=_TIMEOUT_SECONDS)
            )
            client.ping()
        except _ENGINE_ERRORS as error:
            raise _unreachable(error, url) from None
        return cls(client)

    def info(self) -> DockerInfo:
        """Return the version and features of the engine."""
        with _translate_errors("report its features"):
            return read_engine(self._api.info(), self._api.version())

    def image(self, reference: str) -> ImageInfo | None:
        """Return the image `reference` (a name or an id), None if the engine does not have it."""
        with _translate_errors(f"inspect the image {reference}"):
            try:
                return read_image(cast("Any", self._api).inspect_image(reference))
            except docker.errors.NotFound:
                return None

    def size(self, reference: str) -> int:
        """Return the uncompressed bytes of an image: those of its layers. The containerd store reports others for it."""
        with _translate_errors(f"read the history of {reference}"):
            return sum(int(row.get("Size") or 0) for row in cast("Any", self._api).history(reference))

    def tag(self, image: str, reference: str) -> None:
        """Tag the image `image` as `reference`."""
        repository, tag = split(reference)
        with _translate_errors(f"tag an image as {reference}"):
            self._api.tag(image, repository, tag, force=True)

    def untag(self, reference: str) -> None:
        """Remove the name `reference`, and the image with its last name. Ignores errors, because it is cleanup."""
        with suppress(*_ENGINE_ERRORS):
            self._api.remove_image(reference, noprune=True)

    def discard(self, image: str) -> None:
        """Remove an untagged image that is not in use. Ignores errors, because it is cleanup."""
        with suppress(NotReadyError, *_ENGINE_ERRORS):
            found = self.image(image)
            if found and not found.tags:
                self._api.remove_image(image)

    def start(self, image: str, options: ContainerOptions) -> Container:
        """Create and start a container with a read-only root file system, /tmp in memory and no capabilities.

        Raises `NotReadyError` if the port is in use or the engine cannot connect the network. The container is removed.
        """
        container = self.create(image, options)
        try:
            self._api.start(container.id)
        except docker.errors.APIError as error:
            container.remove()
            message = _message(error)
            if problem := failures.port_in_use(message, options.host_port) or failures.no_bridge(message):
                raise problem from None
            raise InferctlError(
                f"the container did not start: {message}", "run `docker run` on the image for details"
            ) from None
        except _ENGINE_ERRORS as error:
            with suppress(NotReadyError):
                container.remove()
            raise _unreachable(error, None) from None
        except BaseException:
            container.remove()
            raise
        return container

    def create(self, image: str, options: ContainerOptions) -> Container:
        """Create a container with the same options as `start`, without starting it."""
        mounts: list[Any] = [
            docker.types.Mount(path, source, type="bind", read_only=True)
            for path, source in (options.mounts or {}).items()
        ]
        mounts += [docker.types.Mount(path, volume, type="volume") for path, volume in (options.volumes or {}).items()]
        published = options.port if options.network is None else None
        host_config = self._api.create_host_config(
            mounts=mounts,
            port_bindings={f"{published}/tcp": (options.host, options.host_port or None)} if published else None,
            network_mode=options.network,
            read_only=True,
            mem_limit=options.memory_bytes,
            shm_size=_SHARED_MEMORY_BYTES,
            # `exec`: Triton and torch.compile load compiled kernels from /tmp.
            tmpfs={"/tmp": "rw,exec,nosuid,nodev,mode=1777"},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            device_requests=[_gpus(self.info())] if options.gpu else None,
        )
        try:
            created = self._api.create_container(
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
                f"image {image} not found in the engine", "pull it with `docker pull`, or build it"
            ) from None
        except docker.errors.APIError as error:
            raise failures.engine_error(_message(error), "create a container") from None
        except _ENGINE_ERRORS as error:
            raise _unreachable(error, None) from None
        return Container(self._api, str(created["Id"]))

    def pull(self, reference: str) -> str:
        """Pull an image by name or digest and return its `name@digest`.

        Raises `MissingImageError` if the registry does not have the image, `NotReadyError` for any other failure.
        """
        repository, tag = split(reference)
        try:
            for line in self._api.pull(repository, tag, stream=True, decode=True):
                if problem := line.get("error"):
                    raise failures.pull_error(str(problem), reference)
        except _ENGINE_ERRORS as error:
            raise failures.pull_error(_message(error), reference) from None
        image = self.image(reference)
        digests = image.digests if image else ()
        matching = (digest for digest in digests if familiar(digest).partition("@")[0] == familiar(repository))
        return next(matching, reference)

    def run_with_input(
        self, image: str, options: ContainerOptions, stdin: bytes, seconds: float
    ) -> tuple[int | None, bytes, str]:
        """Run a container with `stdin`; return its exit code (None after a timeout), stdout, and the end of stderr."""
        with self.create(image, options) as container, _translate_errors("run a container"):
            attached = self._api.attach_socket(container.id, params={"stdin": 1, "stream": 1})
            self._api.start(container.id)
            raw = getattr(attached, "_sock", attached)
            # A container that exits before it reads stdin reports the reason by its exit code.
            with suppress(OSError):
                raw.sendall(stdin)
                raw.shutdown(socket.SHUT_WR)
            code = container.wait(seconds)
            # The socket belongs to a response. Python 3.13 warns if the socket is closed before the response.
            getattr(attached, "_response", attached).close()
            attached.close()
            out = bytes(self._api.logs(container.id, stdout=True, stderr=False))
            err = bytes(self._api.logs(container.id, stdout=False, stderr=True, tail=20))
        return code, out, err.decode("utf-8", "replace").strip()


def _gpus(info: DockerInfo) -> docker.types.DeviceRequest:
    """Return a request for all NVIDIA GPUs: through the NVIDIA runtime, or without it by their CDI specifications."""
    if "nvidia" in info.runtimes or not info.cdi_gpu:
        return docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])
    return docker.types.DeviceRequest(driver="cdi", device_ids=[CDI_ALL_GPUS])


def _message(error: BaseException) -> str:
    return str(getattr(error, "explanation", None) or error).strip()


def _unreachable(error: BaseException, url: str | None) -> NotReadyError:
    where = f" at {url}" if url else ""
    codes = set()
    pending: list[BaseException] = [error]
    while pending:
        cause = pending.pop()
        if isinstance(cause, OSError) and cause.errno:
            codes.add(cause.errno)
        pending += [a for a in cause.args if isinstance(a, BaseException)]
        pending += [c for c in (cause.__cause__, cause.__context__) if c is not None]
    for code, what, hint in _UNREACHABLE:
        if code in codes:
            return NotReadyError(what.format(where), hint)
    return NotReadyError(
        f"the Docker Engine{where} does not respond: {_message(error)}",
        "check DOCKER_HOST and `docker context ls`, and test with `docker version`",
    )
