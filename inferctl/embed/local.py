"""Computes ranges with the engines of a server, in processes of their own.

The last bits of a row can depend on what else is in its batch. So batches depend on the range alone: its distinct
inputs, sorted by length, up to the token limit of the engine. A batch that fails, or that an engine runs when it ends,
runs again with the same inputs, in isolation. If it fails again, its halves do, until the input that causes the failure
is alone and gets an error.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from typing import Any, TypeAlias

import numpy as np

from inferctl.config.spec import Spec, Task
from inferctl.core import cgroup
from inferctl.core.errors import NotReadyError
from inferctl.embed.computer import Input, Report, Result
from inferctl.models.model import ModelFolder
from inferctl.reading import space, task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.outputs import Output, Role
from inferctl.reading.rows import Tokens, slices
from inferctl.serve.api.embedding_outputs import marked
from inferctl.serve.api.served_model import ServedModel
from inferctl.serve.encoder_model import engine_config
from inferctl.serve.engine_process.engine_protocol import Batch, BatchResult, EngineInfo, EngineProcess
from inferctl.serve.engine_process.pool import EnginePool
from inferctl.serve.options import ServerOptions
from inferctl.serve.text.text_parts import SLICE_CHARACTERS, InputError
from inferctl.serve.text.tokenizer_pool import TokenizerPool

_CHECK_S = 5.0  # between checks whether an engine can still start
_HANG_BATCHES = 20  # as in a server: an engine hangs after so many times the longest batch
_NOT_FINITE = "engine_failed: the model returned NaN or infinity"
_MOST_THREADS = 8  # that tokenize: more only compete for the interpreter
# The token ids of an input, and its mark (see `Batch`).
_Encoded: TypeAlias = tuple[Tokens, int]


@dataclass(frozen=True)
class LocalOptions(ServerOptions):
    """`outputs`: of an embedding model. `role`: what its inputs are. `prompt`: precedes each input, or is the
    instruction for pairs; None is that of the model.
    """

    truncate: bool = False
    outputs: tuple[Output, ...] = ("dense",)
    role: Role = None
    prompt: str | None = None


@dataclass(eq=False)
class _Attempt:
    """A batch, and the future of its result, or of the code and the reason of a failure."""

    inputs: Sequence[_Encoded]
    isolated: bool
    result: asyncio.Future[BatchResult | str]

    def end(self, result: BatchResult | str) -> None:
        if not self.result.done():  # else it was cancelled
            self.result.set_result(result)


class _Engines:
    """The batches that wait for an engine or are in flight, the oldest first. It is the `Listener` of the engines."""

    def __init__(self) -> None:
        self.ready, self.longest_s, self._numbers, self._parallel = asyncio.Event(), 0.0, count(), 1
        self.info: EngineInfo | None = None  # of the first one that was ready
        self._waiting = deque[_Attempt]()
        self._in_flight: dict[EngineProcess, dict[int, _Attempt]] = {}

    async def run(self, inputs: Sequence[_Encoded], *, isolated: bool) -> BatchResult | str:
        """Return the result of a batch. `isolated`: no other one runs on its engine."""
        attempt = _Attempt(inputs, isolated, asyncio.get_running_loop().create_future())
        (self._waiting.appendleft if isolated else self._waiting.append)(attempt)
        self._dispatch()
        return await attempt.result

    def engine_ready(self, engine: EngineProcess, info: EngineInfo) -> None:
        self.info, self._parallel, self._in_flight[engine] = self.info or info, info.parallel, {}
        self.ready.set()
        self._dispatch()

    def engine_lost(self, engine: EngineProcess) -> None:
        attempts = list(self._in_flight.pop(engine).values())
        self._waiting.extendleft(reversed(attempts[self._parallel :]))  # they were prefetched
        for attempt in attempts[: self._parallel]:
            attempt.end("engine_unavailable: the engine crashed while it ran this input")
        self._dispatch()

    def batch_done(self, engine: EngineProcess, result: BatchResult) -> None:
        self.longest_s = max(self.longest_s, result.seconds)
        self._in_flight[engine].pop(result.id).end(result)
        self._dispatch()

    def batch_failed(self, engine: EngineProcess, number: int, message: str, out_of_memory: bool) -> None:
        why = "engine_unavailable: insufficient memory for" if out_of_memory else "engine_failed: the engine failed on"
        self._in_flight[engine].pop(number).end(f"{why} this input: {message}")
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what the engines accept: first what they can run, then as many batches to be prefetched."""
        for most in (self._parallel, 2 * self._parallel):
            while free := [each for each in self._in_flight.items() if self._accepts(each[1], most)]:
                attempt = self._waiting.popleft()
                if attempt.result.done():  # it was cancelled
                    continue
                engine, in_flight = min(free, key=lambda each: len(each[1]))
                number, (ids, marks) = next(self._numbers), zip(*attempt.inputs, strict=True)
                in_flight[number] = attempt
                lengths, given = (np.array(each, dtype=np.int32) for each in (list(map(len, ids)), marks))
                engine.send(Batch(number, np.concatenate(ids), lengths, given if given.any() else None))

    def _accepts(self, in_flight: dict[int, _Attempt], most: int) -> bool:
        if not self._waiting or any(attempt.isolated for attempt in in_flight.values()):
            return False
        return not in_flight if self._waiting[0].isolated else len(in_flight) < most


class LocalComputer:
    """A `Computer` with engines on this machine."""

    def __init__(self, spec: Spec, task: Task, folder: ModelFolder, options: LocalOptions) -> None:
        """Raises `UsageError` for a model that is not usable."""
        self._digest, self._revision, self._options = folder.digest, spec.model.revision, options
        self._folder = folder.path
        self._config = config = task_config.read(task, folder.path, spec.serve.max_input_tokens)
        self._model = ServedModel.of(spec, config, options.truncate)
        self._tokenizer = TokenizerPool(folder.path, config)
        self._executor = ThreadPoolExecutor(max(1, min(_MOST_THREADS, cgroup.cores() // 2)), "tokenize")
        # Otherwise a measurement decides how many threads divide a batch.
        engine = replace(engine_config(spec, task, options, folder), batch_threads=1)
        self._engines = engines = _Engines()
        self._pool = EnginePool(
            engine, options.engines, engines, lambda: max(options.hang_seconds, _HANG_BATCHES * engines.longest_s)
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, Any]:
        """Do what `Computer.start` says."""
        # Each thread tokenizes a part of the texts. The library would start more threads for each part.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._running = asyncio.create_task(self._pool.run())
        spaces = await asyncio.to_thread(self._spaces)  # while the engines start
        await self._while_running(self._engines.ready.wait())
        info, model = self._engines.info, self._model
        assert info is not None
        same = ("batch_tokens", "dimensions", "token_dimensions", "versions")
        return {
            **{name: getattr(info, name) for name in same},
            "task": model.task,
            "model": model.source,
            "revision": self._revision,
            "digest": self._digest,
            "precision": info.precision.effective,
            "outputs": list(self._options.outputs),
            "spaces": spaces,
            "vocabulary_size": info.vocabulary_size or self._tokenizer.vocabulary_size,
            "labels": list(model.labels),
            "normalized": model.normalized,
            "max_tokens": self._tokenizer.max_tokens,
            "device": asdict(info.device),
            "matrix_rate": info.matrix_rate and info.matrix_rate.flops_per_s * self._pool.counts()["count"],
        }

    def _spaces(self) -> dict[str, Any]:
        """Return the name and the definition of the space of each output; none for another task."""
        if not isinstance(self._config, EmbeddingConfig):
            return {}
        found = space.read(self._folder, self._config)
        return {output: found[output].described for output in self._options.outputs}

    async def compute(self, inputs: Sequence[Input], report: Report) -> None:
        """Do what `Computer.compute` says."""
        info, loop = self._engines.info, asyncio.get_running_loop()
        assert info is not None, "`start` comes first"
        sizes = [len(each) if isinstance(each, str) else sum(map(len, each)) for each in inputs]
        calls = [
            loop.run_in_executor(self._executor, self._encode, inputs[start:stop])
            for start, stop in slices(sizes, SLICE_CHARACTERS)
        ]
        found = list(enumerate(chain.from_iterable(await asyncio.gather(*calls))))
        report([(number, (each, 0)) for number, each in found if isinstance(each, str)], 0.0)
        encoded = {number: each for number, each in found if not isinstance(each, str)}
        lengths = {number: len(ids) for number, (ids, _) in encoded.items()}

        async def run(members: Sequence[int], *, isolated: bool = False) -> None:
            result = await self._engines.run([encoded[number] for number in members], isolated=isolated)
            if not isinstance(result, str):
                rows = result.rows if self._model.task == "embed" else self._model.activation(np.asarray(result.rows))
                results: Iterator[tuple[int, Result]] = (
                    (number, (row, lengths[number]) if ok else (_NOT_FINITE, 0))
                    for number, row, ok in zip(members, rows, result.ok, strict=True)
                )
                report(results, result.flops)
            elif isolated and len(members) == 1:
                report([(members[0], (result, 0))], 0.0)
            else:
                middle = len(members) // 2 if isolated else 0
                for part in filter(None, (members[:middle], members[middle:])):
                    await run(part, isolated=True)

        await self._while_running(asyncio.gather(*(run(batch) for batch in batches(lengths, info.batch_tokens))))

    async def close(self) -> None:
        """End the engines and the threads."""
        self._pool.stop()
        if self._running is not None:
            await asyncio.wait((self._running,))  # `start` or `compute` raised its error
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._tokenizer.close()

    def _encode(self, inputs: Sequence[Input]) -> list[_Encoded | str]:
        """Return the token ids and the mark of each input, or the code and the reason why it has none."""
        try:
            return list(self._encode_all(inputs))
        except (InputError, UnicodeError, RuntimeError) as error:  # of one of them
            if len(inputs) > 1:
                middle = len(inputs) // 2
                return self._encode(inputs[:middle]) + self._encode(inputs[middle:])
            return [f"{error.code}: {error.problem}" if isinstance(error, InputError) else f"invalid_text: {error}"]

    def _encode_all(self, inputs: Sequence[Input]) -> Sequence[_Encoded]:
        columns = list(zip(*((each,) if isinstance(each, str) else each for each in inputs), strict=True))
        if not all(columns[0]):
            raise InputError(None, "empty_input", "the text is empty")
        for column in columns:
            "".join(column).encode()  # raises `UnicodeError` for half of a surrogate pair
        model, role, outputs = self._model, self._options.role, self._options.outputs
        options: dict[str, Any] = {"truncate": model.truncate, "prompt": self._options.prompt}
        if len(columns) > 1:
            return self._tokenizer.encode_pairs_now(*columns, **options)
        ids, marks = marked(
            model, self._tokenizer.encode_now(columns[0], **options, **model.text_options(role)), outputs, role
        )
        return list(zip(ids, marks or [0] * len(ids), strict=True))

    async def _while_running(self, work: Awaitable[Any]) -> None:
        """Wait for `work`. Raises why engines cannot start, at first or again and again."""
        assert self._running is not None, "`start` comes first"
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait((task, self._running), timeout=_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
                if self._running.done():
                    self._running.result()
                if self._running.done() or self._pool.crash_looping:
                    raise NotReadyError("no engine can start any more", "see the engine log above")
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # else asyncio reports that nobody read its error


def batches(lengths: Mapping[int, int], most: int) -> list[list[int]]:
    """Return the indices of sequences by batches of at most `most` tokens, or one sequence: the longest come first."""
    found: list[list[int]] = []
    free = 0
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        if not found or lengths[index] > free:
            found.append([])
            free = most
        found[-1].append(index)
        free -= lengths[index]
    return found
