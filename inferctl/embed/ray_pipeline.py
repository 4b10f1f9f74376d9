"""A Ray Data pipeline over the ranges that are not done: each block is one range, which an actor writes as a shard.

The blocks have the numbers of ranges only. Texts and vectors stay out of Ray: an actor reads its range from the input
and writes the shard into the output, both in folders that all nodes share. With a node, the ranges that it computes are
lost, and Ray computes them again on another one, with equal bytes.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from inferctl.core.errors import InferctlError, NotReadyError
from inferctl.embed.computer import Computer
from inferctl.embed.job import IN_FLIGHT, Job
from inferctl.embed.manifest import RunOptions

# In a row, of actors: a node can die while its actor starts.
_FAILED_STARTS = 5


class RangeActor:
    """Computes ranges with engines of its own, several at a time, as a local run does."""

    def __init__(self, folder: Path, options: RunOptions, make: Callable[[], Computer]) -> None:
        """`folder`: to which the paths in `options` are relative."""
        os.chdir(folder)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._job = Job(options, make())
        self._job.plan()
        self._run(self._job.start())

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Compute the ranges of a block. What another attempt would not change is returned, not raised."""
        try:
            for number in block["item"].tolist():
                self._run(self._job.run_range(number))
        except (InferctlError, OSError) as error:
            return {"error": [getattr(error, "message", str(error))], "hint": [getattr(error, "hint", None) or ""]}
        return {"error": [""], "hint": [""]}

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


def run(address: str, options: RunOptions, make: Callable[[], Computer], numbers: Sequence[int]) -> Iterator[int]:
    """Compute the ranges `numbers` on the cluster at `address`, and yield how many are done.

    There is one actor for each GPU of the cluster, without GPUs for each node. Raises `InferctlError`.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise NotReadyError(f"no Ray cluster at {address}: {error}", "start one, or correct `--ray`") from None
    context = DataContext.get_current()
    context.max_consecutive_actor_init_deaths = _FAILED_STARTS
    context.enable_progress_bars = False
    # Ray starts as many tasks as the object store has room for, and expects a full block of each (128 MiB).
    context.target_max_block_size = 2**20
    nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]
    gpus = sum(int(each.get("GPU", 0)) for each in nodes)
    cores = [each["CPU"] for each in nodes if each.get("CPU")]
    resources = {"num_gpus": 1} if gpus else {"num_cpus": min(cores, default=1)}
    pool = ActorPoolStrategy(
        min_size=1,
        max_size=len(numbers),
        initial_size=min(gpus or len(cores) or 1, len(numbers)),
        max_tasks_in_flight_per_actor=2 * IN_FLIGHT,  # with fewer, Ray starts no more actors
        max_concurrent_calls_per_actor=IN_FLIGHT,
        enable_true_multi_threading=True,
    )
    ranges = ray.data.from_items(list(numbers), override_num_blocks=len(numbers))
    arguments = (Path.cwd(), options, make)
    done = ranges.map_batches(RangeActor, batch_size=1, compute=pool, fn_constructor_args=arguments, **resources)
    try:
        for count, each in enumerate(done.iter_batches(batch_size=1), start=1):
            if message := str(each["error"][0]):
                raise InferctlError(message, str(each["hint"][0]) or None)
            yield count
    finally:
        ray.shutdown()
