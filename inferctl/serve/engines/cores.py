"""Divides the cores of a CPU between batches that run at the same time, and a batch between its threads."""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch

from inferctl.reading.rows import Rows, join_rows
from inferctl.serve.engines.forward import AnyForward
from inferctl.serve.engines.prepared import Sequences

# If a batch has several threads, it is split into one part per thread of at least this many tokens. Parts do not wait
# for each other, unlike the threads of one matrix product. On two busy cores this is 1.4 times faster than two threads
# per product, and steady under other load.
_PART_TOKENS = 64
# A batch gets twice the threads if a text is then at least this many times faster; else more batches run at a time.
_MIN_SPEEDUP = 1.4
_TYPICAL_TOKENS = 64
# Each number of threads runs this text up to eight times, or until this time (s) has passed, but at least four times.
_MAX_RUNS, _MIN_RUNS, _MEASURE_S = 8, 4, 0.3


def choose_threads(forward: AnyForward, cores: int) -> int:
    """Return the threads per batch: measured with one text of typical length, at the current load of the cores."""
    text = Sequences([np.full(min(forward.max_tokens, _TYPICAL_TOKENS), 5, dtype=np.int32)])
    chosen, seconds = 1, math.inf
    for threads in (1 << bit for bit in range(cores.bit_length())):
        torch.set_num_threads(threads)
        times: list[float] = []
        while len(times) < _MIN_RUNS or (len(times) < _MAX_RUNS and sum(times) < _MEASURE_S):
            started = time.perf_counter()
            forward(text)
            times.append(time.perf_counter() - started)
        # The first two may do one-time work.
        if (median := statistics.median(times[2:])) * _MIN_SPEEDUP > seconds:
            break
        chosen, seconds = threads, median
    return chosen


class Cores:
    """Computes `parallel` batches at the same time, each on an equal share of the cores."""

    def __init__(self, forward: AnyForward, cores: int, parallel: int) -> None:
        self._forward, self._threads = forward, cores // parallel
        # torch stores the number of threads per calling thread.
        self._pool = ThreadPoolExecutor(cores, "core", initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, sequences: Sequences) -> Rows:
        """Return what `Forward` returns. The calling thread uses the threads of one batch."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        parts = min(self._threads, sum(sequences.lengths) // _PART_TOKENS, len(sequences))
        if parts < 2:
            return self._forward(sequences)
        groups = _balanced(sequences.lengths, parts)
        found = list(self._pool.map(self._forward, map(sequences.take, groups)))
        by_index = dict(zip(chain(*groups), chain(*found), strict=True))
        return join_rows([by_index[index] for index in range(len(sequences))])


def _balanced(lengths: list[int], parts: int) -> list[list[int]]:
    """Return the indices of `lengths` in `parts` groups of about equal sums.

    The longest come first, each goes to the group with the smallest sum.
    """
    groups: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(index)
        loads[lightest] += lengths[index]
    return groups
