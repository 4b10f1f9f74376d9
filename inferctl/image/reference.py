"""Names of images, taken apart."""

from __future__ import annotations


def split(reference: str) -> tuple[str, str]:
    """`localhost:5000/a/b:c` -> (`localhost:5000/a/b`, `c`); a digest stands in for the tag, which is `latest` when absent."""
    name, at, digest = reference.partition("@")
    if at:
        return split(name)[0], digest
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "latest")


def host_of(reference: str) -> str:
    """The registry of an image reference: `localhost:5000/a/b:c` -> `localhost:5000`, `a/b` -> `docker.io`."""
    first, slash, _ = reference.partition("/")
    return first if slash and (first == "localhost" or "." in first or ":" in first) else "docker.io"
