"""Runs `docker buildx` as a child process: features of the builder, and builds as a stream of events."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, cast

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.core.partials import partial_folder
from inferctl.image import failures
from inferctl.image.events import BuildEvent, StepFinished
from inferctl.image.rawjson import Reader

_INSTALL = (
    "install Docker with buildx: `apt-get install docker.io docker-buildx`, or https://docs.docker.com/engine/install/"
)
_CREATE_BUILDER = (
    "create a builder with `docker buildx create --use --driver docker-container`,"
    " or enable the containerd image store of the engine"
)
# Time for buildx to cancel the build and exit after a signal.
_STOP_SECONDS = 10.0
# The first version of buildx with `--progress=rawjson` (docker/buildx release notes).
_RAWJSON_SINCE = (0, 13, 0)
# The first Docker Engine that reads zstd layers (https://docs.docker.com/engine/release-notes/23.0/).
_ZSTD_ENGINE_SINCE = 23
Compression = Literal["gzip", "zstd"]
# Fields of `--cache-to` and `--output`. BuildKit has four levels of zstd: 0-2, 3-6, 7-8 and 9-22
# (https://github.com/docker/docs/issues/23757). The third takes two thirds of the CPU time of gzip, the fourth twice as
# much as gzip. docs/build.md has the measurement.
_COMPRESSED: dict[Compression, str] = {
    "gzip": "compression=gzip",
    "zstd": "compression=zstd,compression-level=7",
}


@dataclass(frozen=True)
class Builder:
    """A builder. `version` is that of buildx. `containerd_store`: whether the engine stores images in containerd."""

    version: tuple[int, int, int]
    name: str
    driver: str
    platforms: tuple[str, ...]
    containerd_store: bool

    @property
    def exports(self) -> bool:
        """Whether it can export caches, attestations and compressed layers.

        Only the default builder of an engine with the classic image store cannot.
        """
        return self.driver != "docker" or self.containerd_store

    def describe(self) -> str:
        """Return the builder as one line of text."""
        store = "containerd image store" if self.containerd_store else "classic image store"
        return f"buildx {'.'.join(map(str, self.version))}, builder {self.name}, driver {self.driver}" + (
            f", {store}" if self.driver == "docker" else ""
        )


@dataclass(frozen=True)
class BuildRequest:
    """The options of one `docker buildx build`. `secrets`: id -> file.

    `outputs`: values of --output. Without one, the image is loaded into the engine, without a tag. `compression`: of
    new layers, None for a builder that does not compress. `force_compression`: also of those of the base and of the cache.
    `send` writes the context as a tar stream, in place of the folder `context`. `receive` reads what an output with
    `dest=-` writes. Both run in a thread, and an error that one raises ends the build.
    """

    context: Path = Path("-")
    send: Callable[[IO[bytes]], None] | None = None
    receive: Callable[[IO[bytes]], None] | None = None
    annotations: tuple[str, ...] = ()
    contexts: Mapping[str, str] = field(default_factory=dict)
    build_args: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    platform: str | None = None
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    target: str | None = None
    network: str | None = None
    provenance: bool = False
    sbom: bool = False
    no_cache: bool = False
    pull: bool = False
    compression: Compression | None = None
    force_compression: bool = False


class BuildFailedError(Exception):
    """buildx failed. `text`: its plain lines. `step` and `log`: the first failed step and its last log lines."""

    def __init__(self, text: str, step: str | None, log: list[str]) -> None:
        super().__init__(text)
        self.text, self.step, self.log = text, step, log


def detect(containerd_store: bool) -> Builder:
    """Return the selected builder: that of BUILDX_BUILDER or `docker buildx use`.

    Raises `NotReadyError` without a docker command or buildx, or if buildx is too old for live progress.
    """
    output = docker("buildx", "version")
    found = re.search(r"v?(\d+)\.(\d+)\.(\d+)", output)
    version = (int(found.group(1)), int(found.group(2)), int(found.group(3))) if found else (0, 0, 0)
    if version < _RAWJSON_SINCE:
        raise NotReadyError(f"buildx {'.'.join(map(str, version))} is too old: 0.13 or newer is required", _INSTALL)
    return read_inspection(docker("buildx", "inspect"), version, containerd_store)


def read_inspection(text: str, version: tuple[int, int, int], containerd_store: bool) -> Builder:
    """Parse the output of `docker buildx inspect`."""

    def value(key: str) -> str:
        found = re.search(rf"^{key}:[ \t]*(.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    platforms = tuple(p.strip(" *") for p in value("Platforms").split(",") if p.strip(" *"))
    return Builder(version, value("Name") or "default", value("Driver") or "docker", platforms, containerd_store)


def check_supported(builder: Builder, request: BuildRequest) -> None:
    """Raise an error if `builder` cannot do the build, or if a context or a wheel folder is missing.

    Raises `NotReadyError` for the builder and `UsageError` for a missing folder.
    """
    label = f"the builder {builder.name} (driver {builder.driver}, classic image store)"
    external_caches = [c for c in request.cache_to if "type=inline" not in c]
    if not builder.exports and external_caches:
        raise NotReadyError(f"{label} cannot export a build cache to {external_caches[0]}", _CREATE_BUILDER)
    known = builder.platforms
    if (wanted := request.platform) and known and not any(f"{each}/".startswith(f"{wanted}/") for each in known):
        raise NotReadyError(
            f"the builder {builder.name} cannot build for {wanted}; it builds for {', '.join(known)}",
            "use a builder on that platform, or QEMU: https://docs.docker.com/build/building/multi-platform/",
        )
    for name, folder in request.contexts.items():
        if not Path(folder).is_dir():
            what = "weights" if name.startswith("model") else name
            raise UsageError(
                f"{what} folder {folder} not found",
                "check the path: a relative path in a spec starts at the folder of the spec",
            )


def choose_compression(builder: Builder, engine_version: str) -> Compression | None:
    """Return the compression of new layers, None if the engine always compresses with gzip when it pushes."""
    if not builder.exports:
        return None
    major = re.match(r"\d+", engine_version)
    return "zstd" if major and int(major.group()) >= _ZSTD_ENGINE_SINCE else "gzip"


def command(request: BuildRequest, metadata: Path) -> list[str]:
    """Return the command line of a build. Equal requests give equal command lines."""
    arguments = [
        "docker",
        "buildx",
        "build",
        "--progress=rawjson",
        f"--metadata-file={metadata}",
    ]
    arguments += [] if request.send else ["--file", str(request.context / "Dockerfile")]
    for name, folder in sorted(request.contexts.items()):
        arguments += ["--build-context", f"{name}={Path(folder).resolve()}"]
    for name, file in sorted(request.secrets.items()):
        arguments += ["--secret", f"id={name},src={Path(file).resolve()}"]
    for name, value in sorted(request.build_args.items()):
        arguments += ["--build-arg", f"{name}={value}"]
    arguments += ["--no-cache"] if request.no_cache else []
    arguments += ["--pull"] if request.pull else []
    arguments += ["--platform", request.platform] if request.platform else []
    for target in request.cache_to:
        arguments += ["--cache-to", cache_to(target, request.compression)]
    for source in request.cache_from:
        arguments += ["--cache-from", source if "type=" in source else f"type=registry,ref={source}"]
    arguments += ["--target", request.target] if request.target else []
    if request.network:
        arguments += ["--network", request.network]
        # A builder in a container also requires the entitlement. The engine's builder grants it.
        arguments += ["--allow", "network.host"] if request.network == "host" else []
    arguments.append(f"--provenance={'mode=max' if request.provenance else 'false'}")
    arguments.append(f"--sbom={'true' if request.sbom else 'false'}")
    for annotation in request.annotations:
        arguments += ["--annotation", annotation]
    # `type=docker` is what `--load` means.
    loaded = ("type=docker",) if request.compression else ()
    for output in request.outputs or loaded:
        arguments += ["--output", f"{output}{_output_fields(request)}"]
    return [*arguments, *(() if request.outputs or loaded else ("--load",)), str(request.context)]


def _output_fields(request: BuildRequest) -> str:
    """Return the fields of an output for its compression.

    The media types are those of OCI: with those of Docker, CRI-O and older containerd cannot pull zstd layers, also not
    those of a base (https://github.com/triggerdotdev/trigger.dev/pull/4184).
    """
    if request.compression is None:
        return ""
    # Otherwise, layers of the base and of the cache keep theirs, so that images share them.
    force = ",force-compression=true" if request.force_compression else ""
    return f",{_COMPRESSED[request.compression]},oci-mediatypes=true{force}"


def cache_to(target: str, compression: Compression | None) -> str:
    """Expand `registry/name:tag` to a registry cache of all stages (mode max).

    A registry cache gets the compression of the image, unless it names one. Other values with `type=` are unchanged.
    """
    if "type=" not in target:
        target = f"type=registry,ref={target},mode=max"
    fields = target.split(",")
    if compression is None or "type=registry" not in fields or any(f.startswith("compression=") for f in fields):
        return target
    return f"{target},{_COMPRESSED[compression]}"


def exportable(builder: Builder, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cache targets without those with `ignore-error=true` if `builder` cannot export them."""
    return tuple(
        target
        for target in targets
        if builder.exports or "type=inline" in target or "ignore-error=true" not in target.split(",")
    )


def run(request: BuildRequest) -> Generator[BuildEvent, None, dict[str, Any]]:
    """Run a build: yield its events and return the metadata of buildx. Raises `BuildFailedError`.

    Closing the generator stops buildx.
    """
    with partial_folder(Path(tempfile.gettempdir()) / "inferctl-build", 0o700) as folder:
        metadata = folder / "metadata.json"
        reader = Reader()
        with child(
            command(request, metadata),
            stdin=subprocess.PIPE if request.send else subprocess.DEVNULL,
            stdout=subprocess.PIPE if request.receive else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as running:
            streams = ((request.send, running.stdin), (request.receive, running.stdout))
            threads = [_StreamThread(transfer, stream) for transfer, stream in streams if transfer and stream]
            assert running.stderr is not None
            for line in running.stderr:
                yield from reader.feed(line)
            yield from reader.finish()
            code = running.wait()
        for thread in threads:
            thread.join()
        errors = [thread.error for thread in threads if thread.error]
        # If buildx ends first, its own message is the reason, and that of a thread is a broken pipe.
        for error in errors:
            if isinstance(error, InferctlError) or not code:
                raise error
        if code:
            step, log = reader.failed_step() or (None, [])
            raise BuildFailedError(
                "\n".join(reader.tail) or f"docker buildx build ended with exit code {code}", step, log
            )
        found = json.loads(metadata.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise InferctlError(
                "buildx wrote no metadata", "install a newer buildx; `docker buildx version` shows the version"
            )
        return found


def build_once(request: BuildRequest) -> Generator[BuildEvent, None, tuple[list[StepFinished], dict[str, Any]]]:
    """Run one build: yield its events, return its finished steps and the metadata of buildx.

    Raises `InferctlError` with a hint if the build fails.
    """
    steps: list[StepFinished] = []
    with closing(run(request)) as running:
        try:
            while True:
                event = next(running)
                if isinstance(event, StepFinished):
                    steps.append(event)
                yield event
        except StopIteration as end:
            return steps, end.value
        except BuildFailedError as error:
            raise failures.build_error(error.text, error.step, error.log) from None


def docker(*arguments: str, timeout_s: float | None = None) -> str:
    """Return stdout of the docker command. Raises `NotReadyError` if it fails, is missing or lacks buildx."""
    try:
        process = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NotReadyError(
            f"the registry of {arguments[-1]} did not respond within {timeout_s:g} s", "check the network"
        ) from None
    except FileNotFoundError:
        raise NotReadyError("docker command not found", _INSTALL) from None
    if process.returncode:
        output = (process.stderr or process.stdout).strip()
        if "is not a docker command" in output or "unknown command" in output:
            raise NotReadyError("docker has no buildx plugin", _INSTALL)
        raise NotReadyError(
            f"`docker {' '.join(arguments[:3])}` failed: {output}", "run `inferctl doctor` to check this machine"
        )
    return process.stdout


class _StreamThread(threading.Thread):
    """Runs `transfer` on a pipe of buildx, closes the pipe, and keeps the error."""

    def __init__(self, transfer: Callable[[IO[bytes]], None], stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._transfer, self._stream = transfer, stream
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            # A tar stream is bytes; only stderr of buildx is text.
            self._transfer(cast("IO[bytes]", cast("TextIOWrapper", self._stream).buffer))
        except Exception as error:  # noqa: BLE001  # raised by `run`, in the thread that started the build
            self.error = error
        finally:
            with suppress(OSError):
                self._stream.close()


@contextmanager
def child(
    arguments: Sequence[str], *, stdin: int = subprocess.DEVNULL, stdout: int, stderr: int
) -> Iterator[subprocess.Popen[str]]:
    """Run the docker command, and stop it if the body raises. Raises `NotReadyError` if it is missing.

    It runs in its own process group, so that Ctrl-C does not signal it twice.
    """
    try:
        process = subprocess.Popen(
            arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NotReadyError("docker command not found", _INSTALL) from None
    try:
        yield process
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[str]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            break
    if process.stderr is not None:
        process.stderr.close()
