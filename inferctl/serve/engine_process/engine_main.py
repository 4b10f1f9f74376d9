"""The engine process: reads batches from a socket, runs them and writes results. Only this process imports torch.

    python -m inferctl.serve.engine_process.engine_main FD

FD is an inherited stream socket that carries `frames`. The process ends when the API process closes it or ends. If the
engine cannot start, it exits with the exit code of the error.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedIOBase
from queue import SimpleQueue

from inferctl.core import streams
from inferctl.core.errors import InferctlError
from inferctl.reading.rows import Rows, finite_rows
from inferctl.serve.engine_process import engine_frames, failures
from inferctl.serve.engine_process.engine_frames import Kind
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, Engine, EngineConfig, Prepare
from inferctl.serve.engines import hide_unused_libraries
from inferctl.serve.engines.cpu import use_idle_time
from inferctl.serve.observe import logs

log = logging.getLogger("inferctl.engine")

EXIT_BROKEN_CONTEXT = 70


def make_engine(config: EngineConfig) -> Engine:
    """Return the engine that the configuration names. Imports only what this engine needs."""
    if config.engine == "echo":
        from inferctl.serve.engines.echo import EchoEngine

        return EchoEngine(config)
    from inferctl.serve.engines.encoder import EncoderEngine

    return EncoderEngine(config)


def serve(stream: BufferedIOBase) -> int:
    """Load the engine, run batches until the API process ends, and return the exit code."""
    first = engine_frames.receive(stream)
    if first is None or first[0] is not Kind.CONFIG:
        return 1
    config = EngineConfig(**json.loads(first[1]))
    logs.configure(config.log)

    def on_phase(text: str) -> None:
        _send(stream, engine_frames.pack_json(Kind.PHASE, text))

    try:
        on_phase("an engine process imports its libraries")
        engine = make_engine(config)
        info = engine.load(on_phase)
    except InferctlError as error:
        return _fatal(stream, error.message, error.hint, error.exit_code)
    except ConnectionError:  # the API process ended while the engine loaded
        raise
    except Exception as error:  # the API process reports it to the user
        log.exception("the engine cannot start")
        return _fatal(stream, f"the engine cannot start: {type(error).__name__}: {error}", None, 1)
    gc.collect()
    gc.freeze()
    _send(stream, engine_frames.pack_json(Kind.READY, info.to_json()))
    return (
        _overlap(stream, engine.prepare) if engine.prepare else _loop(stream, engine, info.parallel, info.idle_parallel)
    )


def _overlap(stream: BufferedIOBase, prepare: Prepare) -> int:
    """Prepare batches on one thread, launch them on this one, and send results from a third one.

    So the GPU has the next batch when it is done with one. The API process sends at most one more than the engine
    runs, which limits what is launched.
    """
    prepared: SimpleQueue[tuple[int, float, Callable[[], Callable[[], tuple[Rows, float]]]] | None] = SimpleQueue()
    launched: SimpleQueue[tuple[int, float, Callable[[], tuple[Rows, float]]] | None] = SimpleQueue()

    def receive() -> int:
        try:
            while (frame := engine_frames.receive(stream)) is not None and frame[0] is Kind.BATCH:
                received, batch = time.perf_counter(), engine_frames.unpack_batch(frame[1])
                with _failing(stream, batch.id):
                    prepared.put((batch.id, received, prepare(batch)))
            return 0 if frame is None else 1
        finally:
            prepared.put(None)

    def finish() -> None:
        last = 0.0
        while (item := launched.get()) is not None:
            number, received, wait = item
            with _failing(stream, number):
                rows, flops = wait()
                # What the GPU computed before is not time of this batch.
                now = time.perf_counter()
                seconds, last = now - max(received, last), now
                _send(stream, engine_frames.pack_result(BatchResult(number, rows, finite_rows(rows), seconds, flops)))

    with ThreadPoolExecutor(2, "batch") as pool:
        receiving, finishing = pool.submit(receive), pool.submit(finish)
        while (item := prepared.get()) is not None:
            number, received, launch = item
            with _failing(stream, number):
                launched.put((number, received, launch()))
        launched.put(None)
        finishing.result()
        return receiving.result()


def _loop(stream: BufferedIOBase, engine: Engine, parallel: int, idle_parallel: int = 0) -> int:
    """Run batches on this thread, or on `parallel` threads; those for idle cores on others."""
    idle_threads = ThreadPoolExecutor(idle_parallel or 1, "idle batch", use_idle_time)
    with ThreadPoolExecutor(parallel, "batch") as pool, idle_threads as idle_pool:
        while (frame := engine_frames.receive(stream)) is not None:
            kind, body = frame
            if kind is not Kind.BATCH:
                return 1
            batch = engine_frames.unpack_batch(body)
            if parallel == 1 and not batch.idle:
                _run_batch(stream, engine, batch)
            else:
                (idle_pool if batch.idle else pool).submit(_run_batch, stream, engine, batch)
        for each in (pool, idle_pool):
            each.shutdown(cancel_futures=True)
    return 0


def _run_batch(stream: BufferedIOBase, engine: Engine, batch: Batch) -> None:
    """Run one batch and send its result, or the error that it raised."""
    with _failing(stream, batch.id):
        _send(stream, engine_frames.pack_result(engine.run(batch)))


@contextmanager
def _failing(stream: BufferedIOBase, number: int) -> Iterator[None]:
    """Send the error that a batch raises, which fails this batch, not the engine."""
    try:
        yield
    except ConnectionError:  # the API process ended
        raise
    except Exception as error:
        log.exception("batch %d failed", number)
        if failures.breaks_context(error):
            log.error("the CUDA context is broken, and only a new process can use the GPU; exiting")
            os._exit(EXIT_BROKEN_CONTEXT)
        failure = {
            "id": number,
            "message": f"{type(error).__name__}: {error}",
            "out_of_memory": failures.out_of_memory(error),
        }
        _send(stream, engine_frames.pack_json(Kind.FAILED, failure))


def _fatal(stream: BufferedIOBase, message: str, hint: str | None, exit_code: int) -> int:
    _send(stream, engine_frames.pack_json(Kind.FATAL, {"message": message, "hint": hint, "exit_code": exit_code}))
    return exit_code


def _send(stream: BufferedIOBase, frame: bytes) -> None:
    stream.write(frame)  # one call, so that the frames of several threads do not mix
    stream.flush()


def main() -> None:
    """Run the engine process."""
    streams.guard()
    hide_unused_libraries()
    # Someone may send these to the engine. The API process decides when it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rwb") as stream:
            code = serve(stream)
    except ConnectionError:  # the API process ended or closed the socket
        code = 0
    # Without Python's finalization, in which Triton prints 30 lines about leaks that look like a crash.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
