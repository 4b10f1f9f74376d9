"""The engine process, with an engine that runs several batches at a time."""

from __future__ import annotations

import json
import socket
import threading
import time
from itertools import count
from typing import Any

import numpy as np
import pytest

from inferctl.serve.engine_process import engine_frames, engine_main, failures
from inferctl.serve.engine_process.engine_frames import Kind
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, EngineInfo


class Sleeping:
    """Sleeps per batch for its first token in milliseconds; fails at token 13. `most`: the most batches at a time."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self._lock = threading.Lock()

    def load(self) -> EngineInfo:
        raise AssertionError

    def run(self, batch: Batch) -> BatchResult:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if batch.tokens[0] == 13:
                raise MemoryError("injected out of memory")
            time.sleep(int(batch.tokens[0]) / 1000)
        finally:
            with self._lock:
                self.running -= 1
        rows = len(batch.lengths)
        return BatchResult(batch.id, np.ones((rows, 2), np.float32), np.ones(rows, np.bool_), 0.0)


def ask(connection: socket.socket, number: int, token: int) -> None:
    tokens = np.array([token], dtype=np.int32)
    connection.sendall(engine_frames.pack_batch(Batch(number, tokens, np.ones(1, dtype=np.int32))))


def test_batches_run_in_parallel_and_each_gets_one_result() -> None:
    parent, child = socket.socketpair()
    engine: Any = Sleeping()
    thread = threading.Thread(target=engine_main._loop, args=(child.makefile("rwb"), engine, 2))
    thread.start()
    for number, token in enumerate((300, 1, 13, 2, 3)):
        ask(parent, number, token)
    answers, stream = [], parent.makefile("rb")
    for _ in range(5):
        frame = engine_frames.receive(stream)
        assert frame is not None
        kind, body = frame
        answers.append((engine_frames.unpack_result(body).id if kind is Kind.RESULT else json.loads(body)["id"], kind))
        if kind is Kind.FAILED:
            assert json.loads(body)["out_of_memory"]
    stream.close()
    parent.close()
    thread.join(timeout=30)
    assert not thread.is_alive(), "it ends when the socket is closed"
    assert sorted(number for number, _ in answers) == [0, 1, 2, 3, 4]
    assert [number for number, kind in answers if kind is Kind.FAILED] == [2]
    assert answers[-1][0] == 0, "the long one does not delay the others"
    assert engine.most == 2


class Overlapping:
    """A stand-in for a GPU: the result of a batch is not there before the next one is launched. Fails at 12 and 13."""

    def __init__(self) -> None:
        self.launched = threading.Semaphore(0)

    def prepare(self, batch: Batch) -> Any:
        if batch.tokens[0] == 12:
            raise MemoryError("injected out of memory")

        def launch() -> Any:
            self.launched.release()
            if batch.tokens[0] == 13:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
            return wait

        def wait() -> Any:
            assert self.launched.acquire(timeout=30)
            assert self.launched.acquire(timeout=30), "the next batch was not launched"
            self.launched.release()
            return np.ones((1, 2), np.float32), 8.0

        return launch


def test_a_gpu_has_the_next_batch_before_it_is_done_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    parent, child = socket.socketpair()
    thread = threading.Thread(target=engine_main._overlap, args=(child.makefile("rwb"), Overlapping().prepare))
    thread.start()
    seconds, stream = {}, parent.makefile("rb")
    for number, token in enumerate((1, 1, 12, 13)):
        ask(parent, number, token)
    for _ in range(4):
        frame = engine_frames.receive(stream)
        assert frame is not None
        if frame[0] is Kind.RESULT:
            result = engine_frames.unpack_result(frame[1])
            seconds[result.id] = result.seconds
        else:
            assert json.loads(frame[1])["out_of_memory"]
    stream.close()
    parent.close()
    thread.join(timeout=30)
    assert not thread.is_alive(), "it ends when the socket is closed"
    assert list(seconds) == [0, 1]
    assert sum(seconds.values()) <= next(clock) - 1, "the time of the first batch counts for the second one too"


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",  # also without memory
        "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_context_is_recognized_by_the_gpu_whatever_the_error_says(
    said: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for two GPUs, of which this process uses the second one."""
    import torch

    def synchronize(number: int) -> None:
        assert number == 1
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    replaced = {"is_initialized": lambda: True, "device_count": lambda: 2, "memory_reserved": lambda number: number}
    for name, value in {**replaced, "synchronize": synchronize}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert failures.breaks_context(RuntimeError(said)) == lost


@pytest.mark.parametrize(
    ("said", "memory", "broken"),
    [
        # Insufficient memory, as different libraries say it.
        ("CUDA error: out of memory", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", True, False),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", True, False),
        ("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY", True, False),
        ("hipErrorOutOfMemory", True, False),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True, False),
        ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1015', True, False),
        ("could not create a primitive", True, False),
        ("could not create a memory", True, False),
        ("[Errno 12] Cannot allocate memory", True, False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", True, False),
        # The CUDA context is broken.
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous", False, True),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("CUDA error: unspecified launch failure", False, True),
        ("CUDA error: uncorrectable ECC error encountered", False, True),
        ("CUDA driver error: CUDA_ERROR_ILLEGAL_ADDRESS", False, True),
        ("CUDA driver error: CUDA_ERROR_TENSOR_MEMORY_LEAK", False, True),
        ("CUDA driver error: unknown error", False, True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`", False, True),
        ("cuDNN error: CUDNN_STATUS_MAPPING_ERROR", False, True),
        ("Triton Error [CUDA]: unknown error", False, True),
        ("CUDA error: unknown error\nSearch for `cudaErrorUnknown' in NVIDIA's documentation", False, True),
        # Only the batch failed.
        ("CUDA error: invalid configuration argument", False, False),
        ("cuDNN error: CUDNN_STATUS_BAD_PARAM", False, False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`", False, False),
        ("could not create a primitive descriptor for the matmul primitive.", False, False),
        ("could not create a memory descriptor from blob", False, False),
        ("unknown error", False, False),
        ("an unknown error was encountered in the tokenizer", False, False),
        ("nvrtc: error: unknown error code", False, False),
    ],
)
def test_errors_of_the_libraries_are_told_apart(said: str, memory: bool, broken: bool) -> None:
    assert (failures.out_of_memory(RuntimeError(said)), failures.breaks_context(RuntimeError(said))) == (memory, broken)


def test_an_out_of_memory_error_needs_no_message() -> None:
    assert failures.out_of_memory(type("OutOfMemoryError", (RuntimeError,), {})("any"))
