"""What builders, engines and registries say when they fail, recognised and turned into an error with a hint."""

from __future__ import annotations

import errno
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from inferctl.errors import InferctlError, NotReadyError
from inferctl.image.reference import host_of, split

_NO_LOGIN = re.compile(
    r"no basic auth credentials|unauthorized|authentication required|authorization failed|pull access denied|insufficient_scope"
    r"|requested access to the resource is denied|\bdenied\b(?!:? permission)|(?:status|code)[^\n]{0,40}\b40[13]\b|403 Forbidden|401 Unauthorized",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_UNREACHABLE = re.compile(
    r"dial tcp[^\n]*|no such host|connection refused|i/o timeout|TLS handshake timeout|network is unreachable|certificate signed by unknown authority"
    r"|server gave HTTP response to HTTPS client",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"manifest unknown|not found|does not exist|NAME_UNKNOWN|MANIFEST_UNKNOWN", re.IGNORECASE)
# How the two image stores report that the registry has no such image. The HTML page of a proxy may say "not found" too.
_MISSING = re.compile(r"manifest unknown|name unknown|MANIFEST_UNKNOWN|NAME_UNKNOWN|: not found$")
_METADATA = re.compile(r"failed to resolve source metadata for (\S+?): ")
_BRIDGE = re.compile(
    r"failed to create endpoint|failed to set up container networking|operation not supported[^\n]*veth|adding interface veth",
    re.IGNORECASE,
)
_PACKAGE_NETWORK = re.compile(
    r"Failed to establish a new connection|Temporary failure in name resolution|Name or service not known|Could not resolve|NewConnectionError"
    r"|Network is unreachable|Could not connect to|Temporary failure resolving",
)
_PACKAGE_TRUST = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|SSLCertVerificationError")
_PACKAGE_HASH = re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES|Hashes are required")
_PACKAGE_MISSING = re.compile(
    r"(?:No matching distribution found for|Could not find a version that satisfies the requirement) (\S+)"
)
_KILLED = re.compile(r"exit code: 137|signal: killed|cannot allocate memory", re.IGNORECASE)
_PORT = re.compile(r"port is already allocated|address already in use|Bind for \S+ failed", re.IGNORECASE)
_TRANSIENT = re.compile(
    r"timeout|timed out|connection reset|broken pipe|\bEOF\b|connection refused|\b50[0234]\b|too many requests|\b429\b|blob upload unknown"
    r"|upload invalid|TLS handshake|temporar|unexpected http status|http: server closed|connection broken|without a digest|invalid chunk",
    re.IGNORECASE,
)


class MissingImageError(NotReadyError):
    """The registry responded and has no such image."""


class NoBridgeError(NotReadyError):
    """The engine cannot connect a container to its bridge network."""


def transient(message: str) -> bool:
    """Whether trying the same push again may help."""
    return bool(_TRANSIENT.search(message)) and not (_NO_LOGIN.search(message) or _DISK_FULL.search(message))


def unreachable(message: str) -> bool:
    """Whether `message` says that a registry could not be asked, rather than what it answered."""
    return bool(_UNREACHABLE.search(message)) or transient(message)


def disk_full() -> NotReadyError:
    """The error for a full disk, wherever it happened."""
    return NotReadyError(
        "the disk is full",
        "`docker system df` shows what takes the room; `docker builder prune` frees the build cache, `docker image prune` old images",
    )


@contextmanager
def telling_disk_full() -> Iterator[None]:
    """A write to a full disk in the body becomes `disk_full()`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full() from None
        raise


def of_engine(message: str, what: str) -> NotReadyError:
    """The error of an engine that could not do `what`; `message` is what it said."""
    if _DISK_FULL.search(message):
        return disk_full()
    return NotReadyError(f"the engine could not {what}: {message}", "`journalctl -u docker` shows the engine's own log")


def no_bridge(message: str) -> NoBridgeError | None:
    """The error for an engine without a working bridge network, None when `message` says something else."""
    if not _BRIDGE.search(message):
        return None
    return NoBridgeError(
        f"the engine cannot connect a container to its bridge network: {last_line(message)}",
        "`--network host` uses the host's network instead",
    )


def port_taken(message: str, port: int) -> NotReadyError | None:
    """The error for a taken port, None when `message` says something else."""
    if not _PORT.search(message):
        return None
    return NotReadyError(
        f"port {port} is taken", "choose another with `--port`, or 0 for a free one; `ss -ltnp` shows who has it"
    )


def of_build(text: str, step: str | None = None, log: list[str] | None = None) -> InferctlError:
    """The error of a failed build. `text`: the builder's own words; `step`, `log`: the step that failed and what it wrote last."""
    said = "\n".join([text, *(log or [])])
    if _DISK_FULL.search(said):
        return disk_full()
    if found := _METADATA.search(text):
        return _of_source(found.group(1), text)
    if error := no_bridge(said):
        return error
    output = "\n".join(f"  | {line}" for line in (log or [])[-12:])
    where = f"the build failed in {_short(step)}" if step else f"the build failed: {last_line(text)}"
    detail = f"{where}\n{output}" if output else where if not step else f"{where}: {last_line(text)}"
    if _PACKAGE_TRUST.search(said):
        return NotReadyError(detail, "a private certificate authority is in the way: pass its bundle with `--ca FILE`")
    if _PACKAGE_NETWORK.search(said):
        return NotReadyError(
            detail,
            "the build cannot reach the package index: try `--network host`, `--pip-conf FILE` for your own index, or image.wheels for none",
        )
    if _PACKAGE_HASH.search(said):
        return InferctlError(
            detail, "the index or wheel folder holds other files than the lock: `inferctl lock` resolves the locks anew"
        )
    if found := _PACKAGE_MISSING.search(said):
        return InferctlError(
            detail,
            f"the index or wheel folder has no {found.group(1)} for this Python and platform: `inferctl lock` resolves the locks anew",
        )
    if _KILLED.search(said):
        return NotReadyError(detail, "the step ran out of memory: give the builder more")
    return InferctlError(
        detail,
        "`inferctl render` prints the Dockerfile; `docker buildx build` on `inferctl render --output DIR` runs it by hand",
    )


def _of_source(reference: str, text: str) -> InferctlError:
    host = host_of(reference)
    what = f"the base image {reference}"
    hint = "mirror the base to your own registry and set image.base_image (`inferctl catalog bases` lists them)"
    if "buildkit-syft-scanner" in reference:
        what, hint = f"the SBOM scanner {reference}", "`--no-sbom` builds without an SBOM"
    elif "docker/dockerfile" in reference:
        what, hint = (
            f"the Dockerfile frontend {reference}",
            "remove image.frontend from the spec: the builder has its own",
        )
    last = last_line(text)
    if found := _UNREACHABLE.search(last):
        return NotReadyError(
            f"{what}: its registry {host} cannot be reached ({found.group().strip()})",
            f"check the network and proxy of the builder, or {hint}",
        )
    if _NO_LOGIN.search(last):
        return NotReadyError(
            f"{what}: {host} refused to give it: {_after_last_colon(last)}",
            f"`docker login {host}`, and check the name: registries answer the same for a name that does not exist",
        )
    if _NOT_FOUND.search(last):
        return NotReadyError(
            f"{what} was not found",
            f"check the name and tag (NVIDIA deletes tags six months after their end of life), or {hint}",
        )
    return NotReadyError(f"{what} could not be read: {last}", hint)


def _short(step: str) -> str:
    """The name of a step without the many lines that its command may have."""
    words = re.sub(r"--mount=\S+", "", step).split()
    return textwrap.shorten(" ".join(words), 100, placeholder=" ...")


def of_push(message: str, reference: str) -> InferctlError:
    """The error of a failed push of `reference`; `message` is what the engine or the builder said."""
    host = host_of(reference)
    if _DISK_FULL.search(message):
        return NotReadyError(
            f"pushing {reference} failed: {message}",
            "the registry's disk (or the engine's) is full: free some room there",
        )
    if re.search(r"does not exist locally|no such image", message, re.IGNORECASE):
        return NotReadyError(
            f"there is no image {reference} in the engine",
            "`docker images` lists what is there; `inferctl build` makes one",
        )
    if "server gave HTTP response to HTTPS client" in message:
        return NotReadyError(
            f"pushing {reference} failed: {host} speaks plain HTTP",
            f'add "{host}" to "insecure-registries" in the engine\'s daemon.json, or give the registry a certificate',
        )
    if _NO_LOGIN.search(message):
        return NotReadyError(
            f"pushing {reference} failed: {message}", f"`docker login {host}` with an account that may write there"
        )
    if _UNREACHABLE.search(message) or transient(message):
        return NotReadyError(
            f"pushing {reference} failed: {message}",
            f"check that {host} is up and reachable; `inferctl push {reference}` tries again",
        )
    return InferctlError(
        f"pushing {reference} failed: {message}", f"`docker push {reference}` shows the engine's own words"
    )


def of_pull(message: str, reference: str) -> InferctlError:
    """The error of a failed pull of `reference`: `MissingImageError` only if the registry says that it has none."""
    host = host_of(reference)
    # A name may contain any of the words that follow.
    said = message.strip().replace(reference, "").replace(split(reference)[0], "")
    if _DISK_FULL.search(message):
        return disk_full()
    if _NO_LOGIN.search(said):
        return NotReadyError(
            f"{host} refused to give {reference}: {message}", f"`docker login {host}`, and check the name"
        )
    if _MISSING.search(said) and not unreachable(said):
        return MissingImageError(f"image {reference} not found in {host}", "check the name, tag and digest")
    return NotReadyError(f"pulling {reference} failed: {message}", f"check that {host} is up and reachable")


def last_line(text: str) -> str:
    """The line that says what went wrong: the last one marked as an error, or the last one."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:"))]
    return re.sub(r"^(?:ERROR|error): (?:failed to solve: )?", "", (errors or lines or [""])[-1]).strip()


def _after_last_colon(text: str) -> str:
    return text.rsplit(": ", 1)[-1]
