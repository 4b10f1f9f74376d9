"""Runs `docker buildx` as a child process: features of the builder, builds as a stream of events, registry queries."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, cast

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.core.partials import partial_folder
from inferctl.image import failures
from inferctl.image.compression import Compression
from inferctl.image.events import BuildEvent, StepFinished
from inferctl.image.image_name import host_of
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
# buildx waits forever for the manifest of an image.
_REGISTRY_S = 60.0
# Without progress for this time, a step gets a note: BuildKit waits forever for a registry that sends nothing.
_QUIET_S = 30.0
# The first version of buildx with `--progress=rawjson` (docker/buildx release notes).
_RAWJSON_SINCE = (0, 13, 0)
# The first Docker Engine that reads zstd layers (https://docs.docker.com/engine/release-notes/23.0/).
_ZSTD_ENGINE_SINCE = 23


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
        """Whether it can export caches, OCI archives and attestations and build several platforms.

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

    `outputs`: values of --output. Without one, the image is loaded into the engine, without a tag. `compression`: None
    for a builder that does not compress layers.
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
    platforms: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    target: str | None = None
    network: str | None = None
    provenance: bool = False
    sbom: bool = False
    builder: str | None = None
    no_cache: bool = False
    pull: bool = False
    compression: Compression | None = None


class BuildFailedError(Exception):
    """buildx failed. `text`: its plain lines. `step` and `log`: the first failed step and its last log lines."""

    def __init__(self, text: str, step: str | None, log: list[str]) -> None:
        super().__init__(text)
        self.text, self.step, self.log = text, step, log


def detect(containerd_store: bool, name: str | None = None) -> Builder:
    """Return the builder `name`, or the selected one.

    Raises `UsageError` if there is no builder `name`. Raises `NotReadyError` without a docker command or buildx, or if
    buildx is too old for live progress.
    """
    output = _docker("buildx", "version")
    found = re.search(r"v?(\d+)\.(\d+)\.(\d+)", output)
    version = (int(found.group(1)), int(found.group(2)), int(found.group(3))) if found else (0, 0, 0)
    if version < _RAWJSON_SINCE:
        raise NotReadyError(f"buildx {'.'.join(map(str, version))} is too old: 0.13 or newer is required", _INSTALL)
    try:
        inspection = _docker("buildx", "inspect", *([name] if name else []))
    except NotReadyError as error:
        if name and "no builder" in error.message:
            raise UsageError(f"builder {name!r} not found", "pass one of `docker buildx ls`") from None
        raise
    return read_inspection(inspection, version, containerd_store)


def read_inspection(text: str, version: tuple[int, int, int], containerd_store: bool) -> Builder:
    """Parse the output of `docker buildx inspect`."""

    def value(key: str) -> str:
        found = re.search(rf"^{key}:[ \t]*(.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    platforms = tuple(p.strip(" *") for p in value("Platforms").split(",") if p.strip(" *"))
    return Builder(version, value("Name") or "default", value("Driver") or "docker", platforms, containerd_store)


def check_supported(builder: Builder, request: BuildRequest) -> None:
    """Raise an error if `builder` cannot do the build, or if a secret, a context or a wheel folder is missing.

    Raises `NotReadyError` for the builder and `UsageError` for a missing file or folder.
    """
    label = f"the builder {builder.name} (driver {builder.driver}, classic image store)"
    external_caches = [c for c in request.cache_to if "type=inline" not in c]
    if not builder.exports and external_caches:
        raise NotReadyError(f"{label} cannot export a build cache to {external_caches[0]}", _CREATE_BUILDER)
    if not builder.exports and any("type=oci" in o for o in request.outputs):
        raise NotReadyError(f"{label} cannot write an OCI archive", _CREATE_BUILDER)
    if not builder.exports and len(request.platforms) > 1:
        raise NotReadyError(f"{label} cannot build several platforms at once", _CREATE_BUILDER)
    for platform in request.platforms:
        if builder.platforms and not any(
            known == platform or known.startswith(f"{platform}/") for known in builder.platforms
        ):
            raise NotReadyError(
                f"the builder {builder.name} cannot build for {platform}; it builds for {', '.join(builder.platforms)}",
                "use a builder on that platform, or QEMU: https://docs.docker.com/build/building/multi-platform/",
            )
    for name, file in request.secrets.items():
        if not file.is_file():
            raise UsageError(f"file {file} of the build secret {name} not found", "check the path")
    for name, folder in request.contexts.items():
        if not Path(folder).is_dir():
            what = "weights" if name == "model" else name
            raise UsageError(
                f"{what} folder {folder} not found",
                "check the path: a relative path in a spec starts at the folder of the spec",
            )
        if name == "wheels" and not any(Path(folder).glob("*.whl")):
            raise UsageError(
                f"image.wheels: {folder} has no wheels",
                "for each lock: `pip download --dest DIR --no-deps --require-hashes -r LOCK` (docs/build.md)",
            )


def choose_compression(
    setting: Literal["auto", "zstd", "gzip"], builder: Builder, engine_version: str
) -> Compression | None:
    """Return the compression for `image.compression`, None if the engine always compresses with gzip when it pushes.

    Raises `NotReadyError` if the builder cannot do it.
    """
    if not builder.exports:
        if setting == "zstd":
            raise NotReadyError(f"{builder.describe()} cannot push zstd layers", _CREATE_BUILDER)
        return None
    if setting == "auto":
        major = re.match(r"\d+", engine_version)
        return Compression("zstd" if major and int(major.group()) >= _ZSTD_ENGINE_SINCE else "gzip")
    return Compression(setting, every_layer=True)


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
    arguments += ["--builder", request.builder] if request.builder else []
    arguments += ["--no-cache"] if request.no_cache else []
    arguments += ["--pull"] if request.pull else []
    if request.platforms:
        arguments += ["--platform", ",".join(request.platforms)]
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
        arguments += ["--output", f"{output},{request.compression.fields}" if request.compression else output]
    return [*arguments, *(() if request.outputs or loaded else ("--load",)), str(request.context)]


def cache_to(target: str, compression: Compression | None) -> str:
    """Expand `registry/name:tag` to a registry cache of all stages (mode max).

    A registry cache gets the compression of the image, unless it names one. Other values with `type=` are unchanged.
    """
    if "type=" not in target:
        target = f"type=registry,ref={target},mode=max"
    fields = target.split(",")
    if compression is None or "type=registry" not in fields or any(f.startswith("compression=") for f in fields):
        return target
    return f"{target},{compression.cache_fields}"


def exportable(builder: Builder, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the cache targets without those with `ignore-error=true` if `builder` cannot export them."""
    return tuple(
        target
        for target in targets
        if builder.exports or "type=inline" in target or "ignore-error=true" not in target.split(",")
    )


def run(request: BuildRequest) -> Generator[BuildEvent, None, dict[str, Any]]:
    """Run a build: yield its events and return the metadata of buildx. Raises `BuildFailedError`.

    buildx runs in its own process group, so that Ctrl-C does not signal it twice. Closing the generator stops it.
    """
    with partial_folder(Path(tempfile.gettempdir()) / "inferctl-build", 0o700) as folder:
        metadata = folder / "metadata.json"
        reader = Reader()
        child = _start(command(request, metadata), request)
        streams = ((request.send, child.stdin), (request.receive, child.stdout))
        threads = [_StreamThread(transfer, stream) for transfer, stream in streams if transfer and stream]
        try:
            assert child.stderr is not None
            progress = noted = time.monotonic()
            for line in _lines(child.stderr):
                events = list(reader.feed(line)) if line else []
                yield from events
                now = time.monotonic()
                if events:
                    progress = noted = now
                elif now - noted >= _QUIET_S:
                    noted = now
                    yield reader.waiting(now - progress)
            yield from reader.finish()
            code = child.wait()
        except BaseException:
            _stop(child)
            raise
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


def manifest(reference: str, platform: str) -> dict[str, Any]:
    """Return the image manifest of `reference` in its registry, from an index for `platform`.

    The sizes of its layers are in compressed bytes.
    """
    found = _raw_manifest(reference)
    if (entry := _entry(found, platform)) is not None:
        found = _raw_manifest(f"{reference.partition('@')[0]}@{entry}")
    elif "manifests" in found:
        raise InferctlError(f"{reference} has no image for {platform}", f"build it with `--platform {platform}`")
    layers, config = found.get("layers"), found.get("config")
    if not isinstance(layers, list) or not isinstance(config, dict) or not all(map(_is_layer, [*layers, config])):
        raise InferctlError(
            f"the manifest of {reference} is not one of an image: it has no valid list of layers",
            "check the name: a Helm chart or a signature is no image",
        )
    return found


def _is_layer(found: Any) -> bool:
    return isinstance(found, dict) and type(found.get("size")) is int and isinstance(found.get("digest"), str)


def _entry(index: Mapping[str, Any], platform: str) -> str | None:
    """Return the digest of the image for `platform` in an index, None without one."""
    entries = index.get("manifests")
    for entry in entries if isinstance(entries, list) else []:
        offered = entry.get("platform") if isinstance(entry, dict) else None
        if isinstance(offered, dict) and [offered.get("os"), offered.get("architecture")] == platform.split("/")[:2]:
            return str(entry.get("digest"))
    return None


def _raw_manifest(reference: str) -> dict[str, Any]:
    try:
        found = json.loads(_docker("buildx", "imagetools", "inspect", "--raw", reference, timeout_s=_REGISTRY_S))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InferctlError(
            f"the registry returned no JSON object as the manifest of {reference}", "check the log of the registry"
        )
    return found


@dataclass(frozen=True)
class RemoteImage:
    """An image in a registry. `digest` is that of the index, if there is one.

    `layers` (digest and bytes in the registry), `environment` and `labels` are those of one platform.
    """

    digest: str
    layers: tuple[tuple[str, int], ...]
    environment: Mapping[str, str]
    labels: Mapping[str, str]

    @property
    def compressed_bytes(self) -> int:
        """The bytes of all layers in the registry."""
        return sum(size for _, size in self.layers)


def digest(reference: str) -> str:
    """Return the current digest (`sha256:...`) of `reference` in its registry.

    Raises `UsageError` if the registry does not have the image, `NotReadyError` if the registry cannot be reached.
    """
    return str(_imagetools(reference, "{{json .Manifest}}")["digest"])


def remote_image(reference: str, platform: str) -> RemoteImage:
    """Return facts of `reference` on `platform` from its registry, without a pull. Raises the errors of `digest`."""
    found = _imagetools(reference, "{{json .Manifest}}")
    if "manifests" in found:
        if (entry := _entry(found, platform)) is None:
            raise UsageError(f"{reference} has no image for {platform}", "pass another platform or image")
        reference = f"{reference.partition('@')[0]}@{entry}"
    layers = manifest(reference, platform)["layers"]
    config = _imagetools(reference, "{{json .Image}}").get("config") or {}
    variables = (variable.partition("=") for variable in config.get("Env") or ())
    return RemoteImage(
        str(found["digest"]),
        tuple((str(layer["digest"]), int(layer["size"])) for layer in layers),
        {key: value for key, _, value in variables},
        dict(config.get("Labels") or {}),
    )


def _imagetools(reference: str, template: str) -> dict[str, Any]:
    """Return the JSON output of `docker buildx imagetools inspect` for `reference`, formatted with `template`."""
    try:
        inspection = _docker("buildx", "imagetools", "inspect", "--format", template, reference, timeout_s=_REGISTRY_S)
        found = json.loads(inspection)
    except ValueError:
        found = None
    except NotReadyError as error:
        message = error.message.rpartition("ERROR: ")[2]
        if message == error.message:  # docker or buildx is missing
            raise
        if message.endswith(": not found"):
            hint = "check the name and the tag; the registry may have deleted an old tag"
            raise UsageError(f"image {reference} not found in its registry", hint) from None
        if page := failures.web_page(message, reference):
            raise page from None
        login = f"check the network, or run `docker login {host_of(reference)}`"
        hint = failures.without_registry(reference) or login
        raise NotReadyError(f"cannot query the registry of {reference}: {message}", hint) from None
    if not isinstance(found, dict):
        raise InferctlError(f"the registry returned no JSON object for {reference}", "check the log of the registry")
    return found


def _docker(*arguments: str, timeout_s: float | None = None) -> str:
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


def _lines(stream: IO[str]) -> Iterator[str | None]:
    """Yield the lines of `stream`, and None after each second without one."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with suppress(OSError, ValueError):  # `_stop` closes it
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield None
        else:
            if line is None:
                return
            yield line


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


def _start(arguments: list[str], request: BuildRequest) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if request.send else subprocess.DEVNULL,
            stdout=subprocess.PIPE if request.receive else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NotReadyError("docker command not found", _INSTALL) from None


def _stop(child: subprocess.Popen[str]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_SECONDS)
            break
    if child.stderr is not None:
        child.stderr.close()
