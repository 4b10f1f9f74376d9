"""Recognizes errors that report insufficient memory, on the host or on a GPU. It needs no torch."""

from __future__ import annotations

import re

# Messages of torch, C++, CUDA, HIP, Triton, oneDNN, and of libraries such as cuBLAS, which have no error type for this.
# cuBLAS reports that it is not initialized if there is no memory for its handle. The NVML assertion fails while torch
# writes the message of an out-of-memory error, where NVML is not available (MIG, Jetson, some containers).
_MESSAGES = re.compile(
    r"tried to allocate|std::bad_alloc|out[ _]?of[ _]?memory|cannot allocate memory|STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|NVML_SUCCESS == .* INTERNAL ASSERT FAILED"
    r"|could not create a (primitive|memory)(?! descriptor)",
    re.IGNORECASE,
)


def is_insufficient(error: BaseException) -> bool:
    """Return whether `error` reports insufficient memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _MESSAGES.search(str(error)) is not None
    )


def summary(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
