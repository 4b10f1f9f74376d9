"""HTTP requests with JSON to servers that are measured or described, with the headers of `--url`."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.core.sizes import size

ABSENT = (404, 405, 501)
# Of a page such as `/info` or `/metrics`, and of a response of the model: 512 texts with vectors of tokens have 300 MB.
_MAX_PAGE_BYTES, _MAX_RESPONSE_BYTES = 16 << 20, 512 << 20
# No proxies, as in the load generator: the latency of a proxy is not that of the server.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# JSON objects: the report of a server about itself (`GET /info`), and the body of a request.
Info = dict[str, Any]
Body = dict[str, Any]


@dataclass(frozen=True)
class ServerAccess:
    """The model name and the headers for servers at `--url`.

    Headers may contain secrets, so they are never printed or written to a file.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    model: str | None = None

    def without_secrets(self, text: str) -> str:
        """Return `text` with `***` in place of each header value and key: a server may quote them in an error."""
        for value in self.headers.values():
            for secret in (value, value.rpartition(" ")[2]):
                text = text.replace(secret, "***") if len(secret) > 3 else text
        return text


class StatusError(InferctlError):
    """The server responded with an HTTP error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_limit(self) -> bool:
        """Whether the key of the client is above its limit. OpenAI and others have the same code."""
        return self.status == 429 and "rate_limit_exceeded" in self.message


def get_json(url: str, timeout_s: float, access: ServerAccess) -> Info:
    """Return the JSON object at `url`; empty if the server has no such page or returns something else.

    Raises `NotReadyError` if no server responds or it rejects the request.
    """
    try:
        value = json.loads(get(url, timeout_s, access))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def get(url: str, timeout_s: float, access: ServerAccess) -> bytes:
    """Return the page at `url`; empty if the server has no such page. Raises `NotReadyError` as `get_json` does."""
    try:
        return _content(_request(url, access), _MAX_PAGE_BYTES, timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in ABSENT:
            return b""
        raise NotReadyError(f"{url} returned {error.code} {error.reason}", hint(error.code, access)) from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> NotReadyError:
    reason = getattr(error, "reason", error)
    return NotReadyError(f"cannot connect to {url}: {reason}", "start the server first, or check host and port")


def _content(request: urllib.request.Request, most: int, timeout_s: float) -> bytes:
    """Return the body of a response. Raises `OSError` above `most` bytes, or if it does not end in `timeout_s`."""

    def read() -> bytes:
        content = bytearray()
        with _OPENER.open(request, timeout=timeout_s) as response:
            while part := response.read1(1 << 16):
                content += part
                if len(content) > most:
                    raise OSError(f"the response has more than {size(most)}")
        return bytes(content)

    return _within(timeout_s, read)


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """Return `read()`. Raises `TimeoutError` after `seconds`: also headers and trailers may never end."""
    found: Future[bytes] = Future()

    def run() -> None:
        try:
            found.set_result(read())
        except Exception as error:  # noqa: BLE001  # raised in the other thread
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"the response did not end within {seconds:g} s") from None


def _request(url: str, access: ServerAccess, body: bytes | None = None) -> urllib.request.Request:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
    for name, value in access.headers.items():
        # A redirect to another host must not send the headers there.
        request.add_unredirected_header(name, value)
    return request


WITHOUT_LIMITS = (
    "raise the limits of its key with `--requests-per-minute` and `--tokens-per-minute` of `inferctl keys create`"
)


def hint(status: int, access: ServerAccess) -> str:
    """Return what to do about an HTTP error status of a server, which got the headers of `access`."""
    if status in (401, 403):
        if access.headers:
            return (
                "the server rejects the headers of this command: check that their key is complete, valid and allowed; "
                "inferctl requires one of `inferctl keys create NAME --admin`"
            )
        return (
            "the server requires credentials: name the environment variable of its API key with `--api-key-env NAME`, "
            "or pass `--header 'Name: value'`; for inferctl, a key of `inferctl keys create NAME --admin`"
        )
    if status in (429, 502, 503, 504):
        return "the server may be loading its model, or be busy: wait until GET /readyz or GET /health returns 200"
    return "see the log of the server"


def post(url: str, timeout_s: float, body: Mapping[str, Any], access: ServerAccess) -> Any:
    """Return the JSON of the response to a POST request. Raises `InferctlError`."""
    try:
        return json.loads(send(url, timeout_s, body, access))
    except (ValueError, RecursionError) as error:
        raise InferctlError(f"the request to {url} failed: {error}") from None


def send(url: str, timeout_s: float, body: Mapping[str, Any], access: ServerAccess) -> bytes:
    """Return the body of the response to a POST request. Raises `InferctlError`."""
    try:
        return _content(_request(url, access, json.dumps(body).encode()), _MAX_RESPONSE_BYTES, timeout_s)
    except urllib.error.HTTPError as error:
        text = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = _within(timeout_s, partial(error.read, 2000))  # a message of up to 1,000, then its code
        message = access.without_secrets(text.decode(errors="replace"))
        raise StatusError(error.code, f"{url} returned {error.code}: {message}") from None
    except urllib.error.URLError as error:
        raise _unreachable(url, error) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InferctlError(f"the request to {url} failed: {error}") from None
