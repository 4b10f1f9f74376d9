"""Recognizes error messages of builders, engines and registries and returns errors with a hint."""

from __future__ import annotations

import errno
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.image_name import host_of, normalized, split

_NO_LOGIN = re.compile(
    r"no basic auth credentials|unauthorized|authentication required|authorization failed|pull access denied"
    r"|insufficient_scope|requested access to the resource is denied|\bdenied\b(?!:? permission)"
    r"|(?:status|code)[^\n]{0,40}\b40[13]\b|403 Forbidden|401 Unauthorized|HTTP 40[13] response",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_UNREACHABLE = re.compile(
    r"dial tcp[^\n]*|no such host|connection refused|i/o timeout|TLS handshake timeout|network is unreachable"
    r"|certificate signed by unknown authority|server gave HTTP response to HTTPS client",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"manifest unknown|not found|does not exist|NAME_UNKNOWN|MANIFEST_UNKNOWN", re.IGNORECASE)
# Messages of the two image stores for an image that the registry does not have. The HTML page of a proxy may also
# contain "not found", so the pattern is strict.
_MISSING = re.compile(r"manifest unknown|name unknown|MANIFEST_UNKNOWN|NAME_UNKNOWN|: not found$")
_METADATA = re.compile(r"failed to resolve source metadata for (\S+?): ")
_BRIDGE = re.compile(
    r"failed to create endpoint|failed to set up container networking|operation not supported[^\n]*veth"
    r"|adding interface veth",
    re.IGNORECASE,
)
# What a step says that failed -> the error, and a hint with the groups of the pattern.
_STEPS: tuple[tuple[re.Pattern[str], type[InferctlError], str], ...] = (
    (
        re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|SSLCertVerificationError"),
        NotReadyError,
        "for a private certificate authority, `--ca FILE` must have its bundle",
    ),
    (
        re.compile(
            r"Failed to establish a new connection|Temporary failure in name resolution|Name or service not known"
            r"|Could not resolve|NewConnectionError|Network is unreachable|Could not connect to"
            r"|Temporary failure resolving"
        ),
        NotReadyError,
        "the build cannot reach the package index: it uses the network of the host with `--network host`, your own "
        "index with `--pip-conf FILE`, and no index with image.wheels",
    ),
    (
        re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES|Hashes are required"),
        InferctlError,
        "the index or wheel folder has other files than the lock: resolve the locks again with `inferctl lock`",
    ),
    (
        re.compile(
            r"(?:No matching distribution found for|Could not find a version that satisfies the requirement) (\S+)"
        ),
        InferctlError,
        "the index or wheel folder has no {} for this Python and platform: resolve the locks again with "
        "`inferctl lock`",
    ),
    (
        re.compile(r"exit code: 137|signal: killed|cannot allocate memory", re.IGNORECASE),
        NotReadyError,
        "the step ran out of memory: give the builder more memory",
    ),
)
_PORT = re.compile(r"port is already allocated|address already in use|Bind for \S+ failed", re.IGNORECASE)
_TRANSIENT = re.compile(
    r"timeout|timed out|deadline exceeded|connection reset|broken pipe|\bEOF\b|connection refused|\b50[0234]\b"
    r"|too many requests|\b429\b|blob upload unknown|upload invalid|TLS handshake|temporar|unexpected http status"
    r"|http: server closed|connection broken|without a digest|invalid chunk",
    re.IGNORECASE,
)
# How registries reject a manifest with an unknown media type: Distribution and Harbor, ECR, Artifactory and Nexus.
_REJECTED_FORMAT = re.compile(
    r"manifest[ _]invalid|unsupported|unknown media ?type|invalid media ?type|\b(?:400 Bad|405 Method|415 Unsupp)",
    re.IGNORECASE,
)
# What a client says about a web page in place of a response of a registry. With an error status it can be a proxy's.
_WEB_PAGE = re.compile(
    r"(?<!response body: )invalid character '<'"
    r"|unexpected (?:HTTP status|status from [A-Z]+ request to \S+): [23]\d\d",
    re.IGNORECASE,
)
# gRPC of the builder accepts 4 MB, with all labels.
_LARGE_LABELS = re.compile(r"received message larger than max", re.IGNORECASE)
# The Docker Engine before 23 and containerd before 1.5 read a zstd layer as a damaged archive.
_UNREADABLE_LAYER = re.compile(r"invalid tar header|no processor for media-type", re.IGNORECASE)
# What stands against a push -> a hint with the host of the registry.
_PUSHES = (
    (_DISK_FULL, "free disk space of the registry or the engine"),
    (
        re.compile(r"does not exist locally|no such image", re.IGNORECASE),
        "build it with `inferctl build`; `docker images` lists the images",
    ),
    (
        re.compile("server gave HTTP response to HTTPS client"),
        'the registry uses plain HTTP: add "{host}" to "insecure-registries" in daemon.json of the engine, or set up '
        "TLS for the registry",
    ),
    (_NO_LOGIN, "run `docker login {host}` with an account that has write access"),
)


class MissingImageError(NotReadyError):
    """The registry responded and does not have the image."""


class NoBridgeError(NotReadyError):
    """The engine cannot connect a container to its bridge network."""


def transient(message: str) -> bool:
    """Return whether a retry of the push may succeed."""
    permanent = (_NO_LOGIN, _DISK_FULL, _WEB_PAGE)
    return bool(_TRANSIENT.search(message)) and not any(each.search(message) for each in permanent)


def rejects_zstd(message: str) -> bool:
    """Return whether a registry may have rejected a push because of the media type of zstd layers."""
    return bool(_REJECTED_FORMAT.search(message)) and not (transient(message) or _NO_LOGIN.search(message))


def unreachable(message: str) -> bool:
    """Return whether `message` is about a registry that could not be reached, and not an error from the registry."""
    return bool(_UNREACHABLE.search(message)) or transient(message)


def disk_full() -> NotReadyError:
    """Return the error for a full disk."""
    return NotReadyError(
        "the disk is full",
        "free disk space: `docker builder prune` removes the build cache, `docker image prune` removes old images",
    )


@contextmanager
def raising_disk_full() -> Iterator[None]:
    """Convert an `OSError` for a full disk to `disk_full()`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full() from None
        raise


def without_registry(reference: str) -> str | None:
    """Return the hint for a name without a registry, which is one of Docker Hub; None if it has one."""
    if normalized(reference) == reference or reference.partition("/")[0].endswith("docker.io"):
        return None
    return f"name the registry, as in registry.example.com/{reference}, or check that docker.io is up and reachable"


def web_page(message: str, reference: str) -> NotReadyError | None:
    """Return the error for a web page in place of a registry, None if `message` is about something else."""
    if not _WEB_PAGE.search(message):
        return None
    host = host_of(reference)
    return NotReadyError(
        f"{host} did not respond to the request for {reference} as a registry does: {message}",
        f"check the name {host}, and whether a login page or a proxy responds in its place",
    )


def engine_error(message: str, action: str) -> NotReadyError:
    """Return the error for an engine that failed to do `action` with `message`."""
    if _DISK_FULL.search(message):
        return disk_full()
    return NotReadyError(
        f"the engine could not {action}: {message}", "check the log of the engine with `journalctl -u docker`"
    )


def no_bridge(message: str) -> NoBridgeError | None:
    """Return the error for an engine without a working bridge network, None if `message` is about something else."""
    if not _BRIDGE.search(message):
        return None
    return NoBridgeError(
        f"the engine cannot connect a container to its bridge network: {last_line(message)}",
        "pass `--network host` to use the network of the host",
    )


def port_in_use(message: str, port: int) -> NotReadyError | None:
    """Return the error for a port that is in use, None if `message` is about something else."""
    if not _PORT.search(message):
        return None
    return NotReadyError(
        f"port {port} is already in use", "pass another `--port`, or 0 for a free one; `ss -ltnp` shows the process"
    )


def build_error(text: str, step: str | None = None, log: list[str] | None = None) -> InferctlError:
    """Return the error for a failed build.

    `text`: output of the builder. `step` and `log`: the failed step and its last log lines.
    """
    message = "\n".join([text, *(log or [])])
    if _DISK_FULL.search(message):
        return disk_full()
    if found := _METADATA.search(text):
        return _source_error(found.group(1), text)
    if error := no_bridge(message):
        return error
    output = "\n".join(f"  | {line}" for line in (log or [])[-12:])
    summary = f"the build failed in {_short(step)}" if step else f"the build failed: {last_line(text)}"
    detail = f"{summary}\n{output}" if output else summary if not step else f"{summary}: {last_line(text)}"
    for pattern, kind, hint in _STEPS:
        if found := pattern.search(message):
            return kind(detail, hint.format(*found.groups()))
    return InferctlError(
        detail,
        "write the build context with `inferctl render --output DIR` and run `docker buildx build DIR`",
    )


def _source_error(reference: str, text: str) -> InferctlError:
    """Return the error for a base image or SBOM scanner that the builder could not read."""
    host = host_of(reference)
    what = f"the base image {reference}"
    hint = "mirror the base to your own registry and set image.base_image"
    if "buildkit-syft-scanner" in reference:
        what, hint = f"the SBOM scanner {reference}", "pass `--no-sbom`"
    last = last_line(text)
    if found := _UNREACHABLE.search(last):
        return NotReadyError(
            f"cannot read {what}: registry {host} is unreachable ({found.group().strip()})",
            f"check the network and proxy of the builder, or {hint}",
        )
    if _NO_LOGIN.search(last):
        return NotReadyError(
            f"cannot read {what}: {host} denied access: {last.rpartition(': ')[2]}",
            f"run `docker login {host}` and check the name: registries also deny access to a name that does not exist",
        )
    if _NOT_FOUND.search(last):
        return NotReadyError(
            f"{what} not found",
            f"check the name and tag (NVIDIA deletes tags six months after their end of life), or {hint}",
        )
    return NotReadyError(f"cannot read {what}: {last}", hint)


def _short(step: str) -> str:
    """Return the name of a step, shortened to 100 characters and without mount options."""
    words = re.sub(r"--mount=\S+", "", step).split()
    return textwrap.shorten(" ".join(words), 100, placeholder=" ...")


def push_error(message: str, reference: str) -> InferctlError:
    """Return the error for a failed push of `reference` with `message` from the engine or the builder."""
    host, failed = host_of(reference), f"pushing {reference} failed: {message}"
    for pattern, hint in _PUSHES:
        if pattern.search(message):
            return NotReadyError(failed, hint.format(host=host))
    if error := web_page(message, reference):
        return error
    if unreachable(message):
        reach = f"check that {host} is up, reachable and not full, then push again"
        return NotReadyError(failed, without_registry(reference) or reach)
    return InferctlError(failed, f"run `docker push {reference}` for the output of the engine")


def pull_error(message: str, reference: str) -> InferctlError:
    """Return the error for a failed pull of `reference`.

    It is a `MissingImageError` only if the registry reports that it does not have the image.
    """
    host = host_of(reference)
    # The name of the image may contain one of the searched words.
    text = message.strip().replace(reference, "").replace(split(reference)[0], "")
    if _DISK_FULL.search(message):
        return disk_full()
    if _NO_LOGIN.search(text):
        return NotReadyError(
            f"{host} denied access to {reference}: {message}", f"run `docker login {host}` and check the name"
        )
    if _UNREADABLE_LAYER.search(text):
        return NotReadyError(
            f"the engine cannot read the layers of {reference}: {message}",
            "zstd layers need Docker Engine 23 or newer: update it",
        )
    if _LARGE_LABELS.search(text):
        return InferctlError(
            f"the labels of {reference} are too large for the builder: {message}",
            "use another image, or build or push it again with smaller labels",
        )
    if error := web_page(message, reference):
        return error
    if _MISSING.search(text) and not unreachable(text):
        return MissingImageError(f"image {reference} not found in {host}", "check the name, tag and digest")
    hint = without_registry(reference) or f"check that {host} is up and reachable"
    return NotReadyError(f"pulling {reference} failed: {message}", hint)


def last_line(text: str) -> str:
    """Return the last line that is marked as an error, or the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:"))]
    return re.sub(r"^(?:ERROR|error): (?:failed to solve: )?", "", (errors or lines or [""])[-1]).strip()
