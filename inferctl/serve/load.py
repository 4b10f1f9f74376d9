"""How much the server holds at a time, whatever clients do: requests, and the bytes of their bodies."""

from __future__ import annotations

from dataclasses import dataclass

from inferctl.serve.http import ApiError


@dataclass
class Load:
    """`accepted`: requests whose body is complete and whose answer is not sent; what is left of it after a drain went unanswered."""

    max_requests: int = 4096
    max_body_bytes: int = 256 * 1024 * 1024
    requests: int = 0
    body_bytes: int = 0
    accepted: int = 0

    def enter(self) -> None:
        """One more request. Raises `ApiError` 429 when there are too many; `leave` only if it did not."""
        if self.requests >= self.max_requests:
            raise busy(f"{self.requests} requests are in flight", "too_many_requests", 1)
        self.requests += 1

    def hold(self, size: int) -> None:
        """So many bytes more of a body. Raises `ApiError` 429 when all bodies together are too large."""
        if self.body_bytes and self.body_bytes + size > self.max_body_bytes:
            raise busy(f"bodies of {self.body_bytes} bytes are in flight", "too_many_bytes", 1)
        self.body_bytes += size

    def leave(self, size: int) -> None:
        """The request is over, with the `size` bytes that it held."""
        self.requests -= 1
        self.body_bytes -= size


def busy(why: str, code: str, seconds: int) -> ApiError:
    """A 429 that says when to come back. Not a 503: proxies take a server that answers those out of service."""
    message = f"the server is at capacity: {why}; retry after {seconds} s"
    return ApiError(429, message, code=code, headers={"retry-after": str(seconds)})
