"""How errors say that memory is insufficient, on the host or on a GPU. No torch."""

from __future__ import annotations

import re

# The batch limit is never lowered below this (tokens).
SMALLEST_BATCH = 64

# What torch, C++, CUDA, Triton, and cuBLAS and its siblings write when they raise no error type of their own for it.
_SAID = re.compile(
    r"you tried to allocate|std::bad_alloc|out of memory|CU\w+_STATUS_(\w+_)?ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_insufficient(error: BaseException) -> bool:
    """Whether `error` says that memory was insufficient."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _SAID.search(said) is not None
        or ("could not create a primitive" in said and "descriptor" not in said)  # oneDNN
    )


def summary(error: BaseException) -> str:
    """The first line of `error`; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
