"""CUDA graphs: all kernels of a small batch are launched at once.

A launch takes the host 4 to 6 µs, and a batch has hundreds: the GPU waits for them, and a graph removes the wait. It
has fixed sizes (`Shape`), and reads its inputs from fixed tensors, so a batch is padded to the smallest shape that it
fits: with rows that belong to no sequence, and with empty sequences. At the capture, each graph is compared with the
kernels launched one by one, in results and in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from inferctl.serve.engine_process import failures
from inferctl.serve.engines.prepared import Inputs, Part, Sequences, Shape

Tensors: TypeAlias = dict[str, torch.Tensor]

# The tokens of the shapes. Above, batches keep a GPU busy for longer than the host needs for their launches.
_TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Attention starts a thread block per head, sequence and 128 tokens of the longest one, for empty sequences too. So a
# shape has many short sequences or few long ones: at most this product of their number and the longest.
_AREA = 1 << 15
# A graph is kept if it needs at most this share of the time of single launches: batches are padded by a fifth or so.
_LARGEST_SHARE = 0.8
# The largest difference to single launches, relative to the state of a token. The products have equal sizes, so their
# kernels are the same; those of attention may differ.
_MAX_ERROR = 0.02
# Graphs use at most this share of the memory of the device.
_MEMORY_SHARE = 1 / 32
# Each is timed so often; the fastest counts.
_TIMED = 3
_MIB = 1 << 20


def shapes(most: int, max_tokens: int) -> list[Shape]:
    """Return the shapes of at most `most` tokens, for sequences of up to `max_tokens`: the smallest first."""
    found = set()
    for tokens in _TOKENS:
        for longest in (tokens, *((512, 128) if tokens > 512 else ())):
            longest = min(tokens, longest, max_tokens)
            found.add(Shape(tokens, longest, min(tokens, _AREA // longest)))
    return sorted(shape for shape in found if shape.tokens <= most)


class Gpu:
    """Captures kernels on a GPU. The graphs share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.reset()

    def reset(self) -> None:
        """Free the memory of graphs that are no longer used."""
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run once, on the stream of the capture: libraries have handles per stream. Raises if `run` waits.

        A capture would fail too, and before torch 2.13 it leaves torch's allocator unusable (pytorch#180395).
        """
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(self._device)

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Return what repeats the kernels of `run`, on the tensors that it used."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            run()
        return graph.replay

    def memory(self) -> tuple[int, int]:
        """Return the used and the whole memory of the device, without what torch has in reserve."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time from the call of `run` until the device is idle."""
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


@dataclass(frozen=True)
class _Graph:
    """A captured forward pass: it reads `inputs` and writes `states`."""

    inputs: Tensors
    states: torch.Tensor
    replay: Callable[[], None]

    def __call__(self, inputs: Tensors) -> torch.Tensor:
        for name, values in self.inputs.items():
            values.copy_(inputs[name])
        self.replay()
        return self.states


class Graphs:
    """The graphs of one model. `summary` says which there are, or why there is none.

    `encode(part, inputs)` returns the states of the rows of a part: [rows, width].
    """

    def __init__(self, inputs: Inputs, encode: Callable[[Part, Tensors], torch.Tensor], vocabulary_size: int) -> None:
        self.summary = "none: not captured"
        self._inputs, self._encode, self._vocabulary_size = inputs, encode, vocabulary_size
        self._graphs: dict[Shape, _Graph] = {}
        self._states: torch.Tensor | None = None

    def shape(self, lengths: Sequence[int]) -> Shape | None:
        """Return the smallest shape with a graph that sequences of these lengths fit, else None."""
        return next((shape for shape in sorted(self._graphs) if shape.fits(lengths)), None)

    def run(self, part: Part, inputs: Tensors) -> torch.Tensor:
        """Return what `encode` returns for a part of a shape. The next run overwrites it, in the order of the stream."""
        assert part.shape is not None
        return self._graphs[part.shape](inputs)

    @torch.inference_mode()
    def capture(self, wanted: list[Shape]) -> None:
        """Capture graphs of these shapes, from the largest to the smallest, whose memory the others use too.

        If they need too much memory, there is none for the upper half of tokens. If one fails or differs, there is none
        at all: the forward pass of such a model waits for the device, or depends on values that only the host knows.
        """
        try:
            self._gpu = Gpu(self._inputs.device)
            while wanted and not self._fill(wanted):
                self._graphs.clear()
                self._gpu.reset()
                wanted = [shape for shape in wanted if 2 * shape.tokens <= wanted[-1].tokens]
            if not wanted:
                self.summary = "none: insufficient memory"
        except Exception as error:
            if failures.breaks_context(error):
                raise
            self._graphs.clear()
            self.summary = f"none: {failures.summary(error)}"

    def _fill(self, wanted: list[Shape]) -> bool:
        """Capture the shapes that pay. Return whether there is enough memory."""
        before, total = self._gpu.memory()
        used, shares = 0, []
        for shape in reversed(wanted):
            try:
                graph, share = self._captured(shape)
            except Exception as error:
                if failures.out_of_memory(error):
                    return False
                raise
            if share <= _LARGEST_SHARE:
                self._graphs[shape] = graph
                shares.append(share)
            del graph
            used = self._gpu.memory()[0] - before
            if used > total * _MEMORY_SHARE:
                return False
        self.summary = (
            f"{len(shares)}, for batches of up to {max(self._graphs).tokens:,} tokens, {used // _MIB} MiB; "
            f"{min(shares):.2f} to {max(shares):.2f} of the time of single launches"
            if shares
            else "none: not faster than single launches"
        )
        return True

    def _captured(self, shape: Shape) -> tuple[_Graph, float]:
        """Return a graph, and its share of the time of single launches. Raises if it differs from them."""
        whole, start = self._samples(shape)
        # Single launches of as many tokens: with others, the products could have other kernels, which round differently.
        joined = Sequences(start.ids + whole.ids[len(start) :], self._marks(whole.lengths))
        parts = [self._inputs.packed(each, range(len(each)), shape=shape) for each in (whole, start)]
        exact = [self._inputs.packed(each, range(len(each))) for each in (whole, joined)]
        given = parts[0].staged.on_device()
        inputs = {name: given[name].clone() for name in given if name != "counts"}
        self._gpu.warm_up(lambda: self._encode(parts[0], inputs))
        expected = [self._encode(part, part.staged.on_device()) for part in exact]
        if self._states is None:
            self._states = torch.empty_like(expected[0])
        states = self._states[: shape.tokens]
        replay = self._gpu.capture(lambda: states.copy_(self._encode(parts[0], inputs)))
        graph = _Graph(inputs, states, replay)
        for index in (0, 1, 0):
            count = parts[index].tokens
            found, wanted = graph(parts[index].staged.on_device())[:count].float(), expected[index][:count].float()
            error = float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
            if not error <= _MAX_ERROR:
                raise ValueError(f"the states of {shape.tokens} tokens differ by {error:.3f} from single launches")
        times = [
            min(self._gpu.seconds(run) for _ in range(_TIMED))
            for run in (
                lambda: graph(parts[0].staged.on_device()),
                lambda: self._encode(exact[0], exact[0].staged.on_device()),
            )
        ]
        return graph, times[0] / times[1]

    def _samples(self, shape: Shape) -> tuple[Sequences, Sequences]:
        """Return sequences of all tokens of a shape, and others, with the lengths of the first half of them."""
        random = np.random.default_rng(shape.tokens)
        lengths: list[int] = []
        while (left := shape.tokens - sum(lengths)) > 0:
            lengths.append(min(left, int(random.integers(1, shape.longest))))
        found = []
        for each in (lengths, lengths[: (len(lengths) + 1) // 2]):
            ids = [random.integers(self._vocabulary_size, size=n, dtype=np.int32) for n in each]
            found.append(Sequences(ids, self._marks(each)))
        return found[0], found[1]

    def _marks(self, lengths: list[int]) -> list[int] | None:
        return [n // 2 for n in lengths] if self._inputs.has_segments else None
