"""Checks a built image for secrets in its environment, also those of its base, and for a root user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from inferctl.models.fit import Finding

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)(?:$|_)", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"://[^/\s:@\"']+:[^/\s@\"']+@"  # credentials in a URL
    r"|\bhf_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}|\bglpat-[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def check_built_image(environment: Mapping[str, str], user: str) -> list[Finding]:
    """Return the findings about a built image. `environment` and `user` are from its config."""
    secret_names = [
        name
        for name, value in environment.items()
        if value and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    ]
    return [*map(_secret, sorted(secret_names)), *_root(user)]


def _secret(name: str) -> Finding:
    why = "everyone who can pull the image can read it, also in its history"
    hint = "pass it as a build secret (`--pip-conf`, `--ca`, `--hf-token-file`) or when the container starts"
    return Finding("error", "secret-in-image", f"{name} is in the environment of the image", why, hint)


def _root(user: str) -> Iterator[Finding]:
    if user.partition(":")[0] in ("", "0", "root"):
        why = "an attacker who controls the server controls the container, and many clusters reject such images"
        yield Finding("error", "runs-as-root", "the image runs as root", why, "end the Dockerfile with a numeric USER")
