"""CUDA graphs: all kernels of a small batch are launched at once.

A launch takes the host 4 to 6 µs, and a batch has hundreds, for which the GPU waits. A graph has fixed sizes (`Shape`)
and reads fixed tensors, so a batch is padded to the smallest shape that it fits: with rows that belong to no sequence,
and with empty sequences. Each graph is compared with single launches when it is captured, in results and in time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeAlias

import numpy as np
import torch

from inferctl.serve.engine_process import failures
from inferctl.serve.engines.prepared import Inputs, Part, Sequences, Shape

Tensors: TypeAlias = dict[str, torch.Tensor]

# The tokens of the shapes. Larger batches keep any GPU busy for longer than the host needs for their launches.
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Attention starts a thread block per head, sequence and 128 tokens of the longest one, for empty sequences too. So a
# shape has many short sequences or few long ones: at most this product of their number and the longest.
_AREA = 1 << 15
# A graph is kept if it needs at most this share of the time of single launches: batches are padded by a fifth or so.
_LARGEST_SHARE = 0.8
# The largest difference to single launches of as many tokens, relative to the state of a token. Products have the same
# kernels then; those of attention may differ.
_MAX_ERROR = 0.02


def shapes(most: int, max_tokens: int) -> list[Shape]:
    """Return the shapes of at most `most` tokens, for sequences of up to `max_tokens`: the smallest first."""
    found = set()
    for tokens in (tokens for tokens in _TOKENS if tokens <= most):
        for longest in (tokens, 512, 128) if tokens > 512 else (tokens,):
            longest = min(longest, max_tokens)
            found.add(Shape(tokens, longest, min(tokens, _AREA // longest)))
    return sorted(found)


class Gpu:
    """Captures graphs on a GPU, which share their memory: at most `limit` bytes, a part of the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        self._free, total = torch.cuda.mem_get_info(device)
        self.limit = total // 32

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Return what repeats the kernels of `run`, on the same tensors. Raises if `run` waits for the device."""
        # First without a graph, as libraries have handles per stream. Before torch 2.13, a capture that fails for a
        # wait leaves the allocator unusable (pytorch#180395).
        try:
            with warnings.catch_warnings(action="ignore"):  # the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay

    def used(self) -> int:
        """Return the bytes that graphs use."""
        torch.cuda.empty_cache()
        return self._free - torch.cuda.mem_get_info(self._device)[0]

    def seconds(self, run: Callable[[], object]) -> tuple[float, float]:
        """Return the time that `run` takes on the host, and until the device is idle."""
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        run()
        host = time.perf_counter() - started
        torch.cuda.synchronize(self._device)
        return host, time.perf_counter() - started


class Graphs:
    """The graphs of one model. `encode(part, inputs)` returns the states of the rows of a part: [rows, width]."""

    def __init__(self, inputs: Inputs, encode: Callable[[Part, Tensors], torch.Tensor], vocabulary_size: int) -> None:
        self._inputs, self._encode, self._vocabulary_size = inputs, encode, vocabulary_size
        self._graphs: dict[Shape, Callable[[Tensors], torch.Tensor]] = {}
        self._states: torch.Tensor | None = None

    def shape(self, lengths: Sequence[int]) -> Shape | None:
        """Return the smallest shape with a graph that sequences of these lengths fit, else None."""
        return min((shape for shape in self._graphs if shape.fits(lengths)), default=None)

    def run(self, shape: Shape, inputs: Tensors) -> torch.Tensor:
        """Return what `encode` returns for a part of this shape. The next run overwrites it, on the same stream."""
        return self._graphs[shape](inputs)

    @torch.inference_mode()
    def capture(self, wanted: list[Shape]) -> str:
        """Capture those of these shapes, the smallest first, that pay. Return which there are, or why there is none.

        If memory is insufficient, there is none for the upper half of tokens. If one fails or differs, there is none at
        all: the forward pass of such a model waits for the device, or depends on what only the host knows.
        """
        reason = "batches are too small"
        while wanted:
            try:
                return self._fill(wanted)
            except Exception as error:
                if failures.breaks_context(error):
                    raise
                reason, smaller = failures.summary(error), failures.out_of_memory(error)
            self._graphs.clear()
            wanted = [shape for shape in wanted if smaller and 2 * shape.tokens <= wanted[-1].tokens]
        return f"none: {reason}"

    def _fill(self, wanted: list[Shape]) -> str:
        gpu, shares, used = Gpu(self._inputs.device), [], 0
        for shape in reversed(list(takewhile(lambda shape: self._waits_for_host(shape, gpu), wanted))):
            graph, share = self._captured(shape, gpu)  # the largest first: the others use its memory
            if share <= _LARGEST_SHARE:
                self._graphs[shape] = graph
                shares.append(share)
            del graph
            if (used := gpu.used()) > gpu.limit:
                raise MemoryError(f"graphs may use {gpu.limit >> 20} MiB of this GPU, which is too little")
        if not shares:
            return "none: single launches are as fast"
        found = f"{len(shares)} for batches of up to {max(self._graphs).tokens:,} tokens, {used >> 20} MiB"
        return f"{found}, {min(shares):.2f} to {max(shares):.2f} of the time of single launches"

    def _waits_for_host(self, shape: Shape, gpu: Gpu) -> bool:
        """Return whether the GPU waits for launches: the host takes most of the time."""
        (single,) = self._parts(self._sample(shape))
        _, (host, whole) = (gpu.seconds(lambda: self._encode(single, single.staged.on_device())) for _ in range(2))
        return host > whole / 2

    def _captured(self, shape: Shape, gpu: Gpu) -> tuple[Callable[[Tensors], torch.Tensor], float]:
        """Return a graph, and its share of the time of single launches. Raises if it differs from these."""
        whole = self._sample(shape)
        (single,) = self._parts(whole)
        expected = self._encode(single, single.staged.on_device())
        parts = self._parts(whole, whole.take(range(len(whole) // 2, len(whole))), whole, shape=shape)
        inputs = {name: values.clone() for name, values in parts[0].staged.on_device().items() if name != "counts"}
        if self._states is None:
            self._states = torch.empty_like(expected)
        states = self._states[: shape.tokens]
        replay = gpu.capture(lambda: states.copy_(self._encode(parts[0], inputs)))

        def graph(given: Tensors) -> torch.Tensor:
            for name, values in inputs.items():
                values.copy_(given[name])
            replay()
            return states

        for part in parts:  # the second one has the last sequences of the others
            found, known = graph(part.staged.on_device())[: part.tokens].float(), expected[-part.tokens :].float()
            error = float(((found - known).norm(dim=1) / known.norm(dim=1)).max())
            if not error <= _MAX_ERROR:
                raise ValueError(f"the states of {shape.tokens} tokens differ by {error:.3f} from single launches")
        runs = (
            lambda: graph(parts[0].staged.on_device()),
            lambda: self._encode(single, single.staged.on_device()),
        )
        seconds = [min(gpu.seconds(run)[1] for _ in range(3)) for run in runs]
        return graph, seconds[0] / seconds[1]

    def _parts(self, *each: Sequences, shape: Shape | None = None) -> list[Part]:
        return [self._inputs.packed(sequences, range(len(sequences)), shape=shape) for sequences in each]

    def _sample(self, shape: Shape) -> Sequences:
        """Return random sequences with all tokens of a shape."""
        random = np.random.default_rng(shape.tokens)
        lengths: list[int] = []
        while (left := shape.tokens - sum(lengths)) > 0:
            lengths.append(min(left, int(random.integers(1, shape.longest))))
        ids = [random.integers(self._vocabulary_size, size=n, dtype=np.int32) for n in lengths]
        return Sequences(ids, [n // 2 for n in lengths] if self._inputs.has_segments else None)
