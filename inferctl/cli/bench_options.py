"""Options of `inferctl bench`: parse and check the text of each one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from inferctl.bench.load.http_json import ServerAccess
from inferctl.bench.plan.overrides import Overrides
from inferctl.core.errors import UsageError

MAX_NAME_LENGTH = 40


@dataclass(frozen=True)
class AccessOptions:
    """The options that say how to reach the servers of `--url`."""

    headers: list[str] = field(default_factory=list, repr=False)
    api_key_env: str | None = None
    served_model: str | None = None

    def access(self) -> ServerAccess:
        """Return the headers and the model name of requests. Raises `UsageError` for a bad header or key."""

        headers = dict(_parse_header(text) for text in self.headers)
        if self.api_key_env is not None:
            if not (key := os.environ.get(self.api_key_env, "")):
                raise UsageError(
                    f"the environment variable {self.api_key_env} is not set (`--api-key-env`)",
                    f"set it to the key: `export {self.api_key_env}=...`",
                )
            if not key.isascii() or not key.isprintable():
                raise UsageError(
                    f"the key in {self.api_key_env} has characters that are not allowed in a header",
                    "remove line breaks and non-ASCII characters from the variable",
                )
            if any(name.lower() == "authorization" for name in headers):
                raise UsageError("`--api-key-env` and `--header` both set Authorization", "remove one of them")
            headers["Authorization"] = f"Bearer {key}"
        return ServerAccess(headers, self.served_model)


def _no_overrides() -> Overrides:
    return {}


@dataclass(frozen=True)
class BenchOptions:
    """The options of a new benchmark. None and empty values mean that the option is absent."""

    spec_file: Path | None = None
    models: list[str] = field(default_factory=list)
    plan: str | None = None
    precisions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    overrides: Overrides = field(default_factory=_no_overrides)
    slo_p99_ms: float | None = None
    output: Path = Path("bench-results")
    access: AccessOptions = field(default_factory=AccessOptions)
    profile: bool = False
    retrieval: Path | None = None
    rerank: str | None = None
    dimensions: list[int] = field(default_factory=list)


def parse_seconds(text: str) -> float:
    """Return the seconds of `300`, `90s`, `5m` or `1.5h`. Raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or not float(match[1]):
        raise UsageError(f"`--budget {text}` is not a time", "pass seconds, or a time such as 90s, 5m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_lengths(text: str | None) -> dict[str, int | str]:
    """Return the keys of `load.generation` for `--lengths`: `128,64`, a distribution or a CSV file."""
    if text is None:
        return {}
    if match := re.fullmatch(r"(\d+),(\d+)", text):
        return {"input_tokens": int(match[1]), "output_tokens": int(match[2])}
    from inferctl.bench.plan import prompts  # needs numpy, which other commands with these options do not

    prompts.read_lengths(text)
    return {"lengths": text}


def parse_names(text: str | None) -> dict[str, float] | str | None:
    """Return `load.names` for `--names`: `a,b=2`, where a name without a number has the share 1, or a distribution."""
    if text is None or re.fullmatch(r"uniform|zipf(:\d+(\.\d+)?)?", text):
        return text
    pairs = [part.strip().partition("=") for part in text.split(",")]
    try:
        return {name: float(share or 1) for name, _, share in pairs}
    except ValueError:
        raise UsageError(f"--names {text!r} is not a list of names", "pass `a=2,b=1`, uniform or zipf:1.2") from None


def parse_target(text: str) -> tuple[str, str]:
    """Return name and address of `--url NAME=URL`. Raises `UsageError`."""
    name, separator, address = text.partition("=")
    if (
        not separator
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        or not address.startswith(("http://", "https://"))
    ):
        raise UsageError(
            f"--url {text!r} is not NAME=URL", "pass a name and an address: `--url t4=http://10.0.0.7:8080`"
        )
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError(
            f"the server name {name!r} has {len(name)} characters, the limit is {MAX_NAME_LENGTH}", "use a shorter name"
        )
    return name, address


def _parse_header(text: str) -> tuple[str, str]:
    """Return name and value of `--header 'Name: value'`. Raises `UsageError` without the value, which can be secret."""
    name, separator, value = (part.strip() for part in text.partition(":"))
    if not separator or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value:
        raise UsageError("--header is not 'NAME: VALUE'", "pass a name and a value: `--header 'X-Team: search'`")
    if not value.isascii() or not value.isprintable():
        raise UsageError(f"the value of the header {name} has characters that are not allowed", "use plain ASCII")
    if name.lower() in ("content-length", "transfer-encoding", "connection", "content-type", "accept-encoding"):
        raise UsageError(f"the load generator sets the header {name} itself", f"remove `--header '{name}: ...'`")
    return name, value
