"""A run: computes the ranges of its plan that are not done, in any order and in any number of processes."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from inferctl.core.errors import InferctlError, UsageError, shown
from inferctl.embed import inputs, shards
from inferctl.embed.computer import Computed, Computer, Progress, compute
from inferctl.embed.inputs import JsonLines, Problem
from inferctl.embed.manifest import SCHEMA, Manifest, RunOptions, open_plan, write_new
from inferctl.receipts import receipt

# While one range is computed, the next one is read and tokenized, and the one before it is written.
IN_FLIGHT = 3
# What `Computer.start` says of this machine, not of the vectors.
_OF_THE_MACHINE = ("device", "matrix_rate", "versions")


class Job:
    """`computer`: None for a process that only plans and finishes. `machine`: what it says of this machine."""

    def __init__(self, options: RunOptions, computer: Computer | None = None) -> None:
        self.options, self.computer, self.progress = options, computer, Progress()
        self._identity: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        shards.check(options.decisive)
        self._worker = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"

    @cached_property
    def _opened(self) -> tuple[Manifest, list[JsonLines], list[tuple[int, int]]]:
        plan, files = open_plan(self.options)
        return plan, files, [_state(file) for file in files]

    def plan(self) -> Manifest:
        """Return the plan of the folder, which is made and written if there is none.

        Raises `UsageError` for an input that cannot be read, and for the folder of another run.
        """
        return self._opened[0]

    def missing(self) -> list[int]:
        """Return the numbers of the ranges that are not done."""
        count = len(self.plan().ranges)
        return [number for number in range(count) if shards.done(self.options.output, number) is None]

    async def start(self) -> dict[str, Any]:
        """Start the computer, and return what it says of itself.

        Raises `UsageError` if it does not compute what the finished ranges have.
        """
        assert self.computer is not None
        found: dict[str, Any] = json.loads(json.dumps(await self.computer.start()))
        self.machine = {name: found.get(name) for name in _OF_THE_MACHINE}
        identity = {name: value for name, value in found.items() if name not in _OF_THE_MACHINE}
        self._remove_partials()
        file = self.options.output / "model.json"
        write_new(file, identity)
        known = json.loads(file.read_bytes())
        known = {"spaces": identity["spaces"], **known}  # an earlier version did not write them
        if changed := [name for name in {**known, **identity} if known.get(name) != identity.get(name)]:
            was = ", ".join(
                f"{name} was {shown(known.get(name))} and is {shown(identity.get(name))}" for name in changed
            )
            raise UsageError(f"{self.options.output} has vectors of another model: {was}", "name another folder")
        plan = {"columns": self.plan().columns, "plan_sha256": self.plan().digest}
        self._identity = {"schema": SCHEMA, **self.plan().options, **identity, **plan}
        return found

    def _remove_partials(self) -> None:
        """Remove what killed processes left, unless another process works in the folder: then it may still write."""
        self._lock = (self.options.output / "manifest.json").open("rb")  # until this process ends
        with suppress(OSError):  # another process has it, or the file system has no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in self.options.output.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    async def run(self, numbers: Iterable[int]) -> None:
        """Compute ranges in this order, several at a time.

        Raises the first error; what is not done then is not lost, only missing.
        """
        waiting = iter(numbers)

        async def work() -> None:
            for number in waiting:
                if await asyncio.to_thread(shards.done, self.options.output, number) is None:
                    await self.run_range(number)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(work())
        except BaseExceptionGroup as found:
            raise found.exceptions[0] from None

    async def run_range(self, number: int) -> None:
        """Read, compute and write one range. Raises `InferctlError` and `OSError`."""
        assert self.computer is not None
        started = time.time()
        rows = await asyncio.to_thread(self._read, number)
        computed = await compute(self.computer, rows.inputs, self.progress)
        await asyncio.to_thread(self._write, number, rows, computed, started)

    def _read(self, number: int) -> inputs.Rows:
        plan, files, states = self._opened
        range_ = plan.ranges[number]
        file = files[range_.file]
        if _state(file) != states[range_.file]:
            raise UsageError(f"{file.path} changed during the run", "restore it, and repeat the command")
        return inputs.read(file, range_, plan.columns)

    def _write(self, number: int, rows: inputs.Rows, computed: Computed, started: float) -> None:
        plan, options = self.plan(), self.options
        problems = list(rows.problems)
        for place, text in computed.errors.items():
            code, _, reason = text.partition(": ")
            problems.append(Problem(code, reason, rows.lines[place], rows.ids[place]))
        self.progress.rows += len(rows.problems)
        self.progress.errors += len(problems)
        problems.sort(key=lambda problem: problem.line)
        path = plan.inputs[plan.ranges[number].file]["path"]
        if problems and options.strict:
            first = problems[0]
            raise InferctlError(f"{path}:{first.line}: {first.message} ({first.code})", "run without `--strict`")
        errors = [{"file": path, "line": p.line, "id": p.id, "code": p.code, "reason": p.message} for p in problems]
        ids = [id_ for place, id_ in enumerate(rows.ids) if place not in computed.errors]
        files = shards.write(options.output, number, ids, computed.rows, errors, self._identity)
        facts = {
            "rows": len(ids),
            "errors": len(errors),
            "tokens": int(computed.tokens.sum()),
            "distinct": computed.distinct,
            "flops": computed.flops,
            "files": files,
            "worker": self._worker,
            "started": started,
            "finished": time.time(),
            **self.machine,
        }
        shards.mark_done(options.output, number, facts)

    def finish(self, price: Callable[[Any], Mapping[str, Any] | None] = lambda _: None) -> dict[str, Any] | None:
        """Write the receipt and return it; None if ranges are missing. `price`: `usd_per_hour` of a device."""
        plan, folder = self.plan(), self.options.output
        ranges = [facts for number in range(len(plan.ranges)) if (facts := shards.done(folder, number)) is not None]
        if len(ranges) < len(plan.ranges):
            return None
        files = {name: each for facts in ranges for name, each in facts["files"].items()}
        lines = "".join(f"{name} {each['sha256']}\n" for name, each in files.items())
        workers = {facts["worker"] for facts in ranges}
        seconds = [_busy_s(facts for facts in ranges if facts["worker"] == worker) for worker in workers]
        sums = ("rows", "errors", "tokens", "distinct", "flops")
        cost = price(ranges[0]["device"])
        document = {
            "schema": SCHEMA,
            "model": json.loads((folder / "model.json").read_bytes()),
            "machines": list({str(facts["device"]): facts["device"] for facts in ranges}.values()),
            "plan": {"sha256": plan.digest, "ranges": len(ranges), "options": plan.options, "inputs": plan.inputs},
            **{key: sum(facts[key] for facts in ranges) for key in sums},
            "bytes": sum(each["bytes"] for each in files.values()),
            "output_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "wall_s": _busy_s(ranges),
            "machine_s": sum(seconds),
            "rows_per_s": plan.rows / _busy_s(ranges),
            "cost": cost and {**cost, "usd": cost["usd_per_hour"] * sum(seconds) / 3600},
        }
        return receipt.write(folder / "receipt.json", document).data

    async def close(self) -> None:
        """End the computer."""
        if self.computer is not None:
            await self.computer.close()


def _state(file: JsonLines) -> tuple[int, int]:
    found = file.path.stat()
    return found.st_size, found.st_mtime_ns


def _busy_s(ranges: Iterable[Mapping[str, Any]]) -> float:
    """Return the seconds in which any of these ranges was computed."""
    total = end = 0.0
    for started, finished in sorted((facts["started"], facts["finished"]) for facts in ranges):
        total += max(0.0, finished - max(started, end))
        end = max(end, finished)
    return total
