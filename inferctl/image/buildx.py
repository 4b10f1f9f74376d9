"""`docker buildx build` as a child process: what the builder at hand can do, the command line, and the build as a stream of events."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferctl.errors import InferctlError, NotReadyError, UsageError
from inferctl.image.events import BuildEvent
from inferctl.image.rawjson import Reader
from inferctl.image.reference import host_of

_INSTALL = (
    "install Docker with buildx: `apt-get install docker.io docker-buildx`, or https://docs.docker.com/engine/install/"
)
# How long buildx gets to cancel the build and end after a signal, seconds.
_STOP_SECONDS = 10.0
# Versions of buildx that brought what is used here (docker/buildx release notes).
_RAWJSON_SINCE = (0, 13, 0)
_CHECK_SINCE = (0, 15, 0)


@dataclass(frozen=True)
class Builder:
    """The builder that buildx would use: its version, driver, platforms, and whether its engine stores images in containerd."""

    version: tuple[int, int, int]
    name: str
    driver: str
    platforms: tuple[str, ...]
    containerd_store: bool

    @property
    def exports(self) -> bool:
        """Whether it can export caches, OCI archives, attestations and several platforms: all but the classic engine's own builder can."""
        return self.driver != "docker" or self.containerd_store

    @property
    def checks(self) -> bool:
        """Whether `docker buildx build --check` is there."""
        return self.version >= _CHECK_SINCE

    def describe(self) -> str:
        """One line for people."""
        store = "containerd image store" if self.containerd_store else "classic image store"
        return f"buildx {'.'.join(map(str, self.version))}, builder {self.name}, driver {self.driver}" + (
            f", {store}" if self.driver == "docker" else ""
        )


@dataclass(frozen=True)
class BuildRequest:
    """One `docker buildx build`. `secrets`: id -> file. `outputs`: values of --output; none means: load into the engine, without a tag."""

    context: Path
    contexts: Mapping[str, str] = field(default_factory=dict)
    build_args: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    platforms: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    network: str | None = None
    provenance: bool = False
    sbom: bool = False
    builder: str | None = None
    no_cache: bool = False
    pull: bool = False


class BuildFailedError(Exception):
    """buildx ended with an error. `text`: its plain lines; `step`, `log`: the step that failed first and what it wrote last."""

    def __init__(self, text: str, step: str | None, log: list[str]) -> None:
        super().__init__(text)
        self.text, self.step, self.log = text, step, log


def detect(containerd_store: bool, name: str | None = None) -> Builder:
    """The builder `name`, or the one in use.

    Raises `NotReadyError` without a docker command or buildx, or with one too old for live progress.
    """
    said = _docker("buildx", "version")
    found = re.search(r"v?(\d+)\.(\d+)\.(\d+)", said)
    version = (int(found.group(1)), int(found.group(2)), int(found.group(3))) if found else (0, 0, 0)
    if version < _RAWJSON_SINCE:
        raise NotReadyError(f"buildx {'.'.join(map(str, version))} is too old: 0.13 or newer is needed", _INSTALL)
    return read_inspection(_docker("buildx", "inspect", *([name] if name else [])), version, containerd_store)


def read_inspection(text: str, version: tuple[int, int, int], containerd_store: bool) -> Builder:
    """The `Builder` out of what `docker buildx inspect` prints."""

    def value(key: str) -> str:
        found = re.search(rf"^{key}:[ \t]*(.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    platforms = tuple(p.strip(" *") for p in value("Platforms").split(",") if p.strip(" *"))
    return Builder(version, value("Name") or "default", value("Driver") or "docker", platforms, containerd_store)


def refuse(builder: Builder, request: BuildRequest) -> None:
    """Raise `NotReadyError` for what `builder` cannot do, before anything is built."""
    create = "`docker buildx create --use --driver docker-container` makes a builder that can; or turn on the engine's containerd image store"
    why = f"the builder {builder.name} (driver {builder.driver}, classic image store)"
    external = [c for c in request.cache_to if "type=inline" not in c]
    if not builder.exports and external:
        raise NotReadyError(f"{why} cannot export a build cache to {external[0]}", create)
    if not builder.exports and any("type=oci" in o for o in request.outputs):
        raise NotReadyError(f"{why} cannot write an OCI archive", create)
    if not builder.exports and len(request.platforms) > 1:
        raise NotReadyError(f"{why} cannot build several platforms at once", create)
    for platform in request.platforms:
        if builder.platforms and not any(
            known == platform or known.startswith(f"{platform}/") for known in builder.platforms
        ):
            raise NotReadyError(
                f"the builder {builder.name} cannot build for {platform}, only for {', '.join(builder.platforms)}",
                "a builder on such a machine, or QEMU: https://docs.docker.com/build/building/multi-platform/",
            )
    for name, file in request.secrets.items():
        if not file.is_file():
            raise UsageError(f"the file {file} for the build secret {name} is not there", "check the path")
    for name, folder in request.contexts.items():
        if not Path(folder).is_dir():
            what = "weights are" if name == "model" else f"folder for {name} is"
            raise UsageError(
                f"the {what} missing: there is no folder {folder}",
                "check the path: a relative path in a spec starts at the folder of the spec",
            )
        if name == "wheels" and not any(Path(folder).glob("*.whl")):
            raise UsageError(f"image.wheels: {folder} has no wheels", "`pip download --dest DIR ...` fills a folder")


def command(request: BuildRequest, metadata: Path) -> list[str]:
    """The command line, deterministic."""
    made = [
        "docker",
        "buildx",
        "build",
        "--progress=rawjson",
        f"--metadata-file={metadata}",
        "--file",
        str(request.context / "Dockerfile"),
    ]
    for name, folder in sorted(request.contexts.items()):
        made += ["--build-context", f"{name}={Path(folder).resolve()}"]
    for name, file in sorted(request.secrets.items()):
        made += ["--secret", f"id={name},src={Path(file).resolve()}"]
    for name, value in sorted(request.build_args.items()):
        made += ["--build-arg", f"{name}={value}"]
    made += ["--builder", request.builder] if request.builder else []
    made += ["--no-cache"] if request.no_cache else []
    made += ["--pull"] if request.pull else []
    if request.platforms:
        made += ["--platform", ",".join(request.platforms)]
    for target in request.cache_to:
        made += ["--cache-to", cache_to(target)]
    for source in request.cache_from:
        made += ["--cache-from", source if "type=" in source else f"type=registry,ref={source}"]
    if request.network:
        made += ["--network", request.network]
        # A builder in a container needs the entitlement as well; the engine's own takes it as given.
        made += ["--allow", "network.host"] if request.network == "host" else []
    made.append(f"--provenance={'mode=max' if request.provenance else 'false'}")
    made.append(f"--sbom={'true' if request.sbom else 'false'}")
    for output in request.outputs:
        made += ["--output", output]
    return [*made, *(() if request.outputs else ("--load",)), str(request.context)]


def cache_to(target: str) -> str:
    """`registry/name:tag` in full: a registry cache of every stage (mode max). Values with `type=` pass as they are."""
    return target if "type=" in target else f"type=registry,ref={target},mode=max"


def exportable(builder: Builder, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The cache targets without those that `builder` cannot write and whose `ignore-error=true` allows to skip."""
    return tuple(
        target
        for target in targets
        if builder.exports or "type=inline" in target or "ignore-error=true" not in target.split(",")
    )


def run(request: BuildRequest) -> Generator[BuildEvent, None, dict[str, Any]]:
    """Build; yields events and returns buildx's metadata. Raises `BuildFailedError`.

    The child runs in a process group of its own, so that one Ctrl-C reaches it once; closing this generator stops it.
    """
    with tempfile.TemporaryDirectory(prefix="inferctl-") as folder:
        metadata = Path(folder) / "metadata.json"
        reader = Reader()
        child = _start(command(request, metadata))
        try:
            assert child.stderr is not None
            for line in child.stderr:
                yield from reader.feed(line)
            yield from reader.finish()
            code = child.wait()
        except BaseException:
            _stop(child)
            raise
        if code:
            step, log = reader.failed_step() or (None, [])
            raise BuildFailedError(
                "\n".join(reader.tail) or f"docker buildx build ended with exit code {code}", step, log
            )
        found = json.loads(metadata.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise InferctlError("buildx wrote no metadata", "a newer buildx may help: `docker buildx version`")
        return found


def check(request: BuildRequest) -> list[str]:
    """What the builder's own linter says about the Dockerfile, one warning a line. Only where `Builder.checks`."""
    chosen = ["--builder", request.builder] if request.builder else []
    made = ["docker", "buildx", "build", *chosen, "--check", "--file", str(request.context / "Dockerfile")]
    for name, folder in sorted(request.contexts.items()):
        made += ["--build-context", f"{name}={Path(folder).resolve()}"]
    done = subprocess.run([*made, str(request.context)], capture_output=True, text=True, check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("WARNING:", "ERROR:"))]


def manifest(reference: str, platform: str) -> dict[str, Any]:
    """The image manifest of `reference` in its registry, for `platform` when it is an index. Layers have compressed sizes, bytes."""
    found = _raw_manifest(reference)
    if "manifests" in found:
        wanted = platform.split("/")
        for entry in found["manifests"]:
            offered = entry.get("platform") or {}
            if [offered.get("os"), offered.get("architecture")] == wanted[:2]:
                name = reference.partition("@")[0]
                return _raw_manifest(f"{name}@{entry['digest']}")
        raise InferctlError(f"{reference} has no image for {platform}", "build it with `--platform`")
    return found


def _raw_manifest(reference: str) -> dict[str, Any]:
    try:
        found = json.loads(_docker("buildx", "imagetools", "inspect", "--raw", reference))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InferctlError(f"the registry's manifest of {reference} is no JSON object", "see the registry's log")
    return found


@dataclass(frozen=True)
class RemoteImage:
    """An image in its registry. `digest` is that of what the name refers to: an index, if there is one.

    `compressed_bytes` (all layers) and `environment` are those of one platform.
    """

    digest: str
    compressed_bytes: int
    environment: Mapping[str, str]


def digest(reference: str) -> str:
    """The digest (`sha256:...`) that `reference` has in its registry now.

    Raises `UsageError` if the registry has no such image, `NotReadyError` if it cannot be asked.
    """
    return str(_imagetools(reference, "{{json .Manifest}}")["digest"])


def remote_image(reference: str, platform: str) -> RemoteImage:
    """What the registry says about `reference` on `platform`, without a pull. Raises like `digest`."""
    found = _imagetools(reference, "{{json .Manifest}}")
    name = reference.partition("@")[0]
    if "manifests" in found:
        wanted = platform.split("/")
        of_platform = [
            entry["digest"]
            for entry in found["manifests"]
            if [(entry.get("platform") or {}).get(key) for key in ("os", "architecture")] == wanted[:2]
        ]
        if not of_platform:
            raise UsageError(f"{reference} has no image for {platform}", "name another platform or image")
        reference = f"{name}@{of_platform[0]}"
    layers = manifest(reference, platform)["layers"]
    config = _imagetools(reference, "{{json .Image}}").get("config") or {}
    variables = (variable.partition("=") for variable in config.get("Env") or ())
    return RemoteImage(
        str(found["digest"]),
        sum(int(layer["size"]) for layer in layers),
        {key: value for key, _, value in variables},
    )


def _imagetools(reference: str, template: str) -> dict[str, Any]:
    """What `docker buildx imagetools inspect` says about `reference`, in the form of `template`."""
    try:
        found = json.loads(_docker("buildx", "imagetools", "inspect", "--format", template, reference))
    except ValueError:
        found = None
    except NotReadyError as error:
        said = error.message.rpartition("ERROR: ")[2]
        if said == error.message:  # no answer of a registry: docker or buildx is missing
            raise
        if said.endswith(": not found"):
            hint = "check the name and the tag; registries delete old tags"
            raise UsageError(f"{reference} does not exist in its registry", hint) from None
        hint = f"check the network, or `docker login {host_of(reference)}`"
        raise NotReadyError(f"the registry of {reference} cannot be asked: {said}", hint) from None
    if not isinstance(found, dict):
        raise InferctlError(f"the registry's description of {reference} is no JSON object", "see the registry's log")
    return found


def _docker(*arguments: str) -> str:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotReadyError("there is no docker command", _INSTALL) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        if "is not a docker command" in said or "unknown command" in said:
            raise NotReadyError("docker has no buildx", _INSTALL)
        raise NotReadyError(
            f"`docker {' '.join(arguments[:3])}` failed: {said}", "`inferctl doctor` says what this machine can do"
        )
    return done.stdout


def _start(made: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            made,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NotReadyError("there is no docker command", _INSTALL) from None


def _stop(child: subprocess.Popen[str]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_SECONDS)
            break
    if child.stderr is not None:
        child.stderr.close()
