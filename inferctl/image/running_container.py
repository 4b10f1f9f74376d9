"""What a verification and `inferctl serve --image` do with a container: mounts, a port, requests, why it ended."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.image.docker import Container
from inferctl.image.output_checks import NO_VERIFY
from inferctl.models.model import IMAGE_FOLDER, ModelFolder

# The last lines of a log that an error shows.
LOG_LINES = 20
_INSPECT_SECONDS, _POLL_SECONDS = 0.5, 0.2
# The image may be one of somebody else. A longer response is cut, so it is no JSON.
_MAX_RESPONSE_BYTES = 512 << 20


def mounts_of(folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the mounts (path in the container -> host path) that put each folder at its path.

    A snapshot in a hub cache has links to files outside of its folder, so its files are mounted one by one.
    """
    found: dict[str, str] = {}
    for place, folder in ((place, folder.resolve()) for place, folder in folders.items()):
        files = ModelFolder(folder).files()
        if any(path.is_symlink() for path in files):
            found |= {f"{place}/{path.relative_to(folder).as_posix()}": str(path.resolve()) for path in files}
        else:
            found[place] = str(folder)
    return found


def exit_error(container: Container, hint: str = NO_VERIFY) -> InferctlError | None:
    """Return an error with the reason why the container exited, None if it runs.

    `hint`: for an exit whose reason is only in the log.
    """
    state = container.state()
    if state.running:
        return None
    log = container.log(LOG_LINES)
    if state.out_of_memory or (state.exit_code == 137 and "illed" in log):
        return NotReadyError(
            with_log("the container ran out of memory (OOM-killed)", log),
            "give the engine more memory, or use a smaller model",
        )
    place = f"({IMAGE_FOLDER}|/adapters/)"
    if re.search(rf"Permission denied: '{place}|error: {place}\S* cannot be read: permission denied", log):
        return NotReadyError(
            with_log("the container cannot read its weights: it runs as another user (10001)", log),
            "make the mounted folder readable: `chmod -R a+rX DIR`",
        )
    known = {
        1: "failed",
        2: "invalid configuration",
        3: "a dependency is not ready",
        137: "killed",
        139: "crashed",
    }
    summary = f"the container ended with exit code {state.exit_code}"
    if state.exit_code in known:
        summary += f" ({known[state.exit_code]})"
    return InferctlError(with_log(summary, log or state.error), hint)


def request(address: tuple[str, int], method: str, path: str, body: Any = None, timeout: float = 10.0) -> bytes:
    """Send one HTTP request to a container and return the body. Raises `OSError`, `HTTPError` or `HTTPException`."""
    http_request = urllib.request.Request(
        f"http://{address[0]}:{address[1]}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={"content-type": "application/json"},
        method=method,
    )
    # Without the proxy settings of the environment: the container is local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(http_request, timeout=timeout) as response:
        return bytes(response.read(_MAX_RESPONSE_BYTES))


def wait_ready(container: Container, address: tuple[str, int], seconds: float) -> bool:
    """Wait until the server is ready (return True), or its container ended or `seconds` passed (return False)."""
    end = time.monotonic() + seconds
    inspect_at = 0.0
    while (now := time.monotonic()) < end:
        # Not each time, because an inspection takes time from the server.
        if now >= inspect_at:
            if not container.state().running:
                return False
            inspect_at = now + _INSPECT_SECONDS
        try:
            request(address, "GET", "/readyz", timeout=5.0)
        except (OSError, http.client.HTTPException):
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_log(message: str, log: str) -> str:
    """Return a message with the last lines of a log below it."""
    lines = "\n".join(f"  | {line}" for line in log.splitlines()[-LOG_LINES:])
    return f"{message}\n{lines}" if lines else f"{message}; the log is empty"
