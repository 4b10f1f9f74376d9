"""Step 4: what goes wrong around a GPU: memory that others hold, a broken context, lost engines, wrong devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import results
import servers
from results import SHORT, STAND_IN, Step

import models

MIB = 1 << 20
POISONED = 997  # as in hooks/sitecustomize.py


def work(step: Step, settings: dict[str, Any]) -> None:
    folder = Path(settings["work"])
    small = dict(models.SMALL) if STAND_IN else {}
    model = models.make(folder / "tiny-bert", "bert", **small)
    large = model if STAND_IN else models.make(folder / "shape-bge-base", "bert", **models.SHAPES["bge-base"])
    step.part("a GPU by its UUID", 20, _by_uuid, folder, model)
    if SHORT:
        return
    step.part("wrong devices", 30, _wrong_devices, folder, model)
    step.part("a token beyond the vocabulary", 40, _broken_context, folder, model)
    step.part("two engines", 40, _two_engines, folder, model)
    step.part("memory of another process", 60, _memory, folder, large)


def _wrong_devices(step: Step, folder: Path, model: Path) -> None:
    environment = dict(os.environ)
    for name, arguments, variables, said in (
        ("cuda:9", ("--device", "cuda:9"), {}, "cuda:9"),
        ("CUDA_VISIBLE_DEVICES is empty", ("--device", "cuda"), {"CUDA_VISIBLE_DEVICES": ""}, "no usable CUDA GPU"),
    ):
        code, message = servers.refused(folder, "--model", str(model), *arguments, environment=environment | variables)
        step.check(name, code == 3 and said in message, f"exit code {code}: {message}")


def _by_uuid(step: Step, folder: Path, model: Path) -> None:
    chosen = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": _uuid()}
    with servers.serving(folder, "by-uuid", "--model", str(model), "--device", "cuda:0", environment=chosen) as server:
        device = server.info()["device"]
        status = server.embed("a text")
        told = f"{device['name']}, status {status}"
        step.check("a GPU by its UUID", device["kind"] == "cuda" and status == 200, told)


def _broken_context(step: Step, folder: Path, model: Path) -> None:
    """Break the CUDA context of the engine while other requests wait: one restart, and each gets a response."""
    marker = folder / "poison"
    marker.touch()
    environment = {**os.environ, "GPU_CHECK_POISON": str(marker)}
    arguments = ("--model", str(model), "--device", "cuda:0", "--precision", "bf16")
    with servers.serving(folder, "poison", *arguments, environment=environment) as server:
        bodies: list[Any] = [[101, POISONED, 102], *models.texts(23)]
        answers = server.answers(bodies, len(bodies))
        statuses = [status for status, _ in answers]
        again = servers.until(server.ready, 90)
        restarts, log = server.metric("engine_restarts"), server.log.read_text(errors="replace")
        step.check("the token was in a batch", not marker.exists())
        # Those that come while the engine starts again may be told to come later, but none is blamed: the token is
        # replaced once, so that no request breaks the engine by itself.
        kept = statuses[0] == 200 and set(statuses) <= {200, 429, 503}
        step.check("requests of the broken batch are retried", kept, f"statuses {_counts(statuses)}")
        blamed = [str(answer) for _, answer in answers if "in isolation" in str(answer)]
        told = f"{len(blamed)} of {len(answers)} are told that they crashed the engine: {blamed[:1]}"
        step.check("no request is blamed for the crash", not blamed, told if blamed else "")
        step.check("one restart", again and restarts == 1, f"{restarts:.0f} restarts, ready again: {again}")
        step.check("the engine ends itself", "exit code 70" in log and "the CUDA context is broken" in log)


def _two_engines(step: Step, folder: Path, model: Path) -> None:
    """Run two engines on one GPU, and kill one under load."""
    arguments = ("--model", str(model), "--device", "cuda:0", "--engines", "2")
    with servers.serving(folder, "two", *arguments) as server:
        both = servers.until(lambda: len(server.engines()) == 2 and server.metric("engine_up") == 2, 90)
        step.check("both start", both, f"{len(server.engines())} processes")
        pids = server.engines()
        timer = threading.Timer(0.2, os.kill, (pids[0], signal.SIGKILL))
        timer.start()
        statuses = server.embed_many(models.texts(200))
        while timer.is_alive():  # a fast machine is done before the engine is killed
            statuses += server.embed_many(models.texts(200))
        step.check("one is killed under load", set(statuses) == {200}, f"statuses {_counts(statuses)}")
        back = servers.until(lambda: server.metric("engine_up") == 2, 90)
        step.check("it is started again", back, f"{server.metric('engine_restarts'):.0f} restarts")


def _memory(step: Step, folder: Path, model: Path) -> None:
    """Take the memory of the GPU while the server runs, and give it back: the batch limit falls, and recovers."""
    full = 1024 if STAND_IN else 16384
    held = folder / "held"
    # Without torch's own cache, each batch asks the GPU for memory, so that it notices what others took.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GPU_CHECK_HELD": str(held)}
    arguments = ("--model", str(model), "--device", "cuda:0", "--precision", "bf16", "--max-batch-tokens", str(full))
    inputs = [models.texts(16, 60 if STAND_IN else 400) for _ in range(12)]
    with servers.serving(folder, "memory", *arguments, environment=environment) as server:
        before = server.metric("batch_limit_tokens")
        lowest, statuses = before, list[int]()
        for leave in (96, 64, 32):
            with _held(held, leave * MIB):
                statuses += server.embed_many(inputs)
                lowest = min(lowest, server.metric("batch_limit_tokens"))
            if lowest < before:
                break
        step.check("the limit falls", lowest < before, f"{before:.0f} to {lowest:.0f} tokens")
        step.check(
            "requests get a response", set(statuses) <= {200, 503} and 200 in statuses, f"statuses {_counts(statuses)}"
        )

        def recovered() -> bool:
            server.embed_many(inputs)
            return server.metric("batch_limit_tokens") == before

        back = servers.until(recovered, min(60, max(10, step.left() - 20)))
        step.check("it recovers", back, f"{server.metric('batch_limit_tokens'):.0f} tokens")
        step.check("no restart", server.metric("engine_restarts") == 0)


def _counts(statuses: list[int]) -> str:
    """Return how often each status came, as text."""
    return ", ".join(f"{count} x {status}" for status, count in sorted(Counter(statuses).items()))


@contextmanager
def _held(file: Path, leave: int) -> Iterator[None]:
    """Hold the memory of the GPU but for `leave` bytes. The stand-in's engine asks the file instead."""
    if STAND_IN:
        file.write_text("300")
        try:
            yield
        finally:
            file.unlink()
        return
    command = [sys.executable, str(Path(__file__).with_name("card.py")), str(leave)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        if not process.stdout.readline():
            raise RuntimeError("the process that takes the memory of the GPU ended")
        yield
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _uuid() -> str:
    """Return the UUID of the first GPU, as CUDA_VISIBLE_DEVICES accepts it."""
    if STAND_IN:
        import stand_in

        return str(stand_in.UUID)
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


if __name__ == "__main__":
    results.run(work)
