"""The engine process: reads batches from a socket, runs them, writes results. torch lives here and nowhere else.

    python -m inferctl.serve.worker FD

FD is an inherited stream socket that speaks `frames`. The process ends when the other side is gone, or with the exit code of what kept the
engine from starting.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from inferctl.errors import InferctlError
from inferctl.serve import frames, logs, memory
from inferctl.serve.frames import Kind
from inferctl.serve.types import Batch, Engine, EngineConfig

log = logging.getLogger("inferctl.engine")


def make_engine(config: EngineConfig) -> Engine:
    """The engine that the configuration names; imports what it needs and nothing else."""
    if config.engine == "echo":
        from inferctl.serve.engines.echo import EchoEngine

        return EchoEngine(config)
    from inferctl.serve.engines.encoder import EncoderEngine

    return EncoderEngine(config)


def serve(connection: socket.socket) -> int:
    """Speak the protocol until the other side is gone; returns the exit code."""
    first = frames.receive(connection)
    if first is None or first[0] is not Kind.CONFIG:
        return 1
    config = EngineConfig(**json.loads(first[1]))
    logs.configure(config.log)
    try:
        engine = make_engine(config)
        info = engine.load()
    except InferctlError as error:
        return _fatal(connection, error.message, error.hint, error.exit_code)
    except Exception as error:  # whatever it was, the API process must hear of it
        log.exception("the engine cannot start")
        return _fatal(connection, f"the engine cannot start: {type(error).__name__}: {error}", None, 1)
    gc.collect()
    gc.freeze()
    connection.sendall(frames.pack_json(Kind.READY, info.to_json()))
    try:
        return _loop(connection, engine, info.parallel)
    finally:
        engine.close()


def _loop(connection: socket.socket, engine: Engine, parallel: int) -> int:
    """Batches on this thread, or on one thread for each that may run at a time."""
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(parallel, "batch") if parallel > 1 else None
        if pool:
            stack.callback(pool.shutdown, cancel_futures=True)
        sending = threading.Lock()
        while (frame := frames.receive(connection)) is not None:
            kind, body = frame
            if kind is not Kind.BATCH:
                return 1
            if pool is None:
                _answer(connection, sending, engine, frames.unpack_batch(body))
            else:
                pool.submit(_answer, connection, sending, engine, frames.unpack_batch(body))
    return 0


def _answer(connection: socket.socket, sending: threading.Lock, engine: Engine, batch: Batch) -> None:
    try:
        answer = frames.pack_result(engine.run(batch))
    except Exception as error:  # one bad batch must not end the engine
        log.exception("batch %d failed", batch.id)
        said = {
            "id": batch.id,
            "message": f"{type(error).__name__}: {error}",
            "out_of_memory": memory.is_insufficient(error),
        }
        answer = frames.pack_json(Kind.FAILED, said)
    with sending:
        connection.sendall(answer)


def _fatal(connection: socket.socket, message: str, hint: str | None, exit_code: int) -> int:
    connection.sendall(frames.pack_json(Kind.FATAL, {"message": message, "hint": hint, "exit_code": exit_code}))
    return exit_code


def main() -> None:
    """Entry point of the engine process."""
    # Both reach the whole process group; the API process decides when the engine ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            code = serve(connection)
        except ConnectionError:  # the API process is gone, or has stopped listening: the end as well
            code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
