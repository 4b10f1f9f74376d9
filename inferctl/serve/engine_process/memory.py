"""Recognizes errors that report insufficient memory, on the host or on a GPU. It needs no torch."""

from __future__ import annotations

import re

# Messages of torch, C++, CUDA, Triton, and of libraries such as cuBLAS, which have no error type for this.
_MESSAGES = re.compile(
    r"you tried to allocate|std::bad_alloc|out of memory|CU\w+_STATUS_(\w+_)?ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_insufficient(error: BaseException) -> bool:
    """Return whether `error` reports insufficient memory."""
    message = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _MESSAGES.search(message) is not None
        or ("could not create a primitive" in message and "descriptor" not in message)  # oneDNN
    )


def summary(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
