"""Recognizes errors about insufficient memory, or a GPU that this process cannot use any more. It imports no torch."""

from __future__ import annotations

import re
import sys
from typing import Any

# Messages of torch, C++, CUDA, HIP, Triton, oneDNN, and of libraries such as cuBLAS, which have no error type for this.
# cuBLAS reports that it is not initialized if there is no memory for its handle. The NVML assertion fails while torch
# writes the message of an out-of-memory error, where NVML is not available (MIG, Jetson, some containers).
_NO_MEMORY = re.compile(
    r"tried to allocate|std::bad_alloc|out[ _]?of[ _]?memory|cannot allocate memory|STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|NVML_SUCCESS == .* INTERNAL ASSERT FAILED"
    r"|could not create a (primitive|memory)(?! descriptor)",
    re.IGNORECASE,
)
# The texts of `cudaGetErrorString` for the errors of which NVIDIA's documentation says: "any further CUDA work will
# return the same error. To continue using CUDA, the process must be terminated and relaunched." Other libraries can
# report the first such error in their own words: cuBLAS and cuDNN say that execution or mapping failed. "unknown error"
# and "context is destroyed" too, of which the documentation says less: the first remains when a GPU is lost. Words that
# can mean less (`CUBLAS_STATUS_INTERNAL_ERROR`, `_NOT_INITIALIZED`) are not here: `breaks_context` asks the GPU.
_BROKEN = re.compile(
    r"an illegal memory access was encountered|device-side assert triggered|an illegal instruction was encountered"
    r"|unspecified launch failure|the launch timed out and was terminated|hardware stack error|misaligned address"
    r"|operation not supported on global/shared address space|invalid program counter|context is destroyed"
    r"|uncorrectable ECC error|uncorrectable NVLink error|Invalid access of peer GPU memory over nvlink"
    r"|tensor memory not completely freed|CUDA(\]| driver)?( error)?: unknown error"
    r"|MPS client has been terminated by the server|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|MAPPING_ERROR)"
    r"|CUDA_ERROR_(ILLEGAL_\w+|ASSERT|LAUNCH_(FAILED|TIMEOUT)|MISALIGNED_ADDRESS|HARDWARE_STACK_ERROR"
    r"|TENSOR_MEMORY_LEAK|UNKNOWN|CONTAINED|INVALID_(ADDRESS_SPACE|PC)|CONTEXT_IS_DESTROYED"
    r"|ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|MPS_CLIENT_TERMINATED)",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports insufficient memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or _NO_MEMORY.search(str(error)) is not None
    )


def breaks_context(error: BaseException) -> bool:
    """Return whether all later CUDA calls of this process will fail too, as `error` or the GPUs in use say."""
    if _BROKEN.search(str(error)) is not None:
        return True
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    try:
        if cuda is not None and cuda.is_initialized():
            for number in range(cuda.device_count()):
                if cuda.memory_reserved(number):  # else this would take memory of another GPU
                    cuda.synchronize(number)
    except Exception:  # noqa: BLE001  # any error
        return True
    return False


def summary(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
