"""Limits on the requests in flight and on the bytes of their bodies."""

from __future__ import annotations

from dataclasses import dataclass

from inferctl.serve.embeddings.schemas import ApiError


@dataclass
class InFlightLimits:
    """Counts the requests in flight and the bytes of their bodies, and rejects requests above the limits.

    `unanswered`: requests whose body is complete and whose response is not sent. After a drain, it counts the requests
    that got no response.
    """

    max_requests: int = 4096
    max_body_bytes: int = 256 * 1024 * 1024
    requests: int = 0
    body_bytes: int = 0
    unanswered: int = 0

    def add_request(self) -> None:
        """Count one more request. Raises `ApiError` 429 if there are too many; then do not call `release`."""
        if self.requests >= self.max_requests:
            raise at_capacity(f"{self.requests} requests are in flight", "too_many_requests", 1)
        self.requests += 1

    def add_bytes(self, size: int) -> None:
        """Count `size` more bytes of a body. Raises `ApiError` 429 if all bodies together are too large."""
        if self.body_bytes and self.body_bytes + size > self.max_body_bytes:
            raise at_capacity(f"bodies of {self.body_bytes} bytes are in flight", "too_many_bytes", 1)
        self.body_bytes += size

    def release(self, size: int) -> None:
        """Stop counting a request and the `size` bytes of its body."""
        self.requests -= 1
        self.body_bytes -= size


def at_capacity(reason: str, code: str, seconds: int) -> ApiError:
    """Return a 429 with `Retry-After`. It is not a 503, because proxies stop using a server that returns those."""
    message = f"the server is at capacity: {reason}; retry after {seconds} s"
    return ApiError(429, message, code=code, headers={"retry-after": str(seconds)})
