"""The parts of an image name, which code calls a reference: registry, name, tag, digest."""

from __future__ import annotations

import re

from inferctl.config.spec_types import IMAGE_REFERENCE
from inferctl.core.errors import UsageError

_HUB, _LIBRARY = "docker.io", "library"


def full_reference(text: str) -> str:
    """Return an image name with `:latest` if it has no tag or digest. Raises `UsageError` if it is no image name."""
    if not re.fullmatch(IMAGE_REFERENCE, text):
        raise UsageError(
            f"{text!r} is not an image name",
            "pass a name such as registry.example.com/team/name:tag, in lower case except the tag",
        )
    return text if "@" in text or ":" in text.rpartition("/")[2] else f"{text}:latest"


def split(reference: str) -> tuple[str, str]:
    """Split a reference: `localhost:5000/a/b:c` -> (`localhost:5000/a/b`, `c`).

    The second value is the digest if there is one, or else the tag, by default `latest`.
    """
    name, at, digest = reference.partition("@")
    if at:
        return split(name)[0], digest
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def host_of(reference: str) -> str:
    """Return the registry of a reference: `localhost:5000/a/b:c` -> `localhost:5000`, `a/b` -> `docker.io`."""
    return normalized(reference).partition("/")[0]


def normalized(reference: str) -> str:
    """Return the reference with its registry, as builders use it: `a/b:c` -> `docker.io/a/b:c`."""
    first, slash, rest = reference.partition("/")
    if not slash or not (first == "localhost" or "." in first or ":" in first):
        first, rest = _HUB, reference
    if first not in (_HUB, "index.docker.io", "registry-1.docker.io"):
        return reference
    return f"{_HUB}/{rest}" if "/" in rest else f"{_HUB}/{_LIBRARY}/{rest}"


def familiar(reference: str) -> str:
    """Return the reference as the engine lists it, without Docker Hub: `docker.io/library/a:b` -> `a:b`."""
    full = normalized(reference)
    return full.removeprefix(f"{_HUB}/").removeprefix(f"{_LIBRARY}/") if full.startswith(f"{_HUB}/") else full
