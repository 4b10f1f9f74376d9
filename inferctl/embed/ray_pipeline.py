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
        """Compute the range of a block. An error that another attempt would repeat is returned, not raised."""
        try:
            self._run(self._job.run_range(int(block["item"][0])))
        except (InferctlError, OSError) as error:
            return {"error": [str(error)]}
        return {"error": [""]}

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


def run(address: str, options: RunOptions, make: Callable[[], Computer], numbers: Sequence[int]) -> Iterator[None]:
    """Compute the ranges `numbers`, and yield as each is done. There is one actor for each GPU, else for each node.

    Raises `InferctlError`.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise NotReadyError(f"no Ray cluster at {address}: {error}", "start one, or correct `--ray`") from None
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = 5  # a node can die while its actor starts
    # Ray starts as many tasks as the object store has room for, and expects a full block of each (128 MiB).
    context.target_max_block_size = 2**20
    gpus = int(ray.cluster_resources().get("GPU", 0))
    cores = [each["Resources"]["CPU"] for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU")]
    pool = ActorPoolStrategy(
        size=min(gpus or len(cores) or 1, len(numbers)),
        max_tasks_in_flight_per_actor=IN_FLIGHT,
        max_concurrent_calls_per_actor=IN_FLIGHT,
        enable_true_multi_threading=True,
    )
    done = ray.data.from_items(list(numbers), override_num_blocks=len(numbers)).map_batches(
        RangeActor,
        batch_size=1,
        compute=pool,
        fn_constructor_args=(Path.cwd(), options, make),
        **({"num_gpus": 1} if gpus else {"num_cpus": min(cores, default=1)}),
    )
    try:
        for each in done.iter_batches(batch_size=1):
            if message := str(each["error"][0]):
                raise InferctlError(message, "correct it, and repeat the command to continue")
            yield
    finally:
        ray.shutdown()
