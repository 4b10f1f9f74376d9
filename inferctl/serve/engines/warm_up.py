"""Warms up an engine, and lowers its batch limit until memory is sufficient."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from inferctl.core.errors import NotReadyError
from inferctl.reading.rows import Rows
from inferctl.serve.engine_process import failures
from inferctl.serve.engine_process.engine_protocol import MIN_BATCH_TOKENS
from inferctl.serve.engines.prepared import Sequences

LOWERED = "insufficient memory for batches"  # the start of the warning


def warm_up(
    run: Callable[[Sequences], Rows], batch_tokens: int, longest: int, parallel: int, hint: str
) -> tuple[int, str | None]:
    """Run the largest batches and a small one, so that no request waits for one-time work.

    Halves the limit `batch_tokens` until memory is sufficient for `parallel` batches at a time. Returns the limit, and
    a warning if it is lower. `longest`: tokens of the longest text. Raises `NotReadyError`, with `hint`, if memory is
    insufficient for the smallest limit.
    """
    limit = batch_tokens
    while message := _run_largest(run, limit, min(longest, limit), parallel):
        if limit <= MIN_BATCH_TOKENS:
            raise NotReadyError(
                f"insufficient memory for a batch of {limit} tokens: {message}",
                f"{hint}; `serve.max_batch_tokens` was lowered to {limit}, the minimum",
            )
        limit = max(MIN_BATCH_TOKENS, limit // 2)
        torch.cuda.empty_cache()
    if limit == batch_tokens:
        return limit, None
    warning = f"{LOWERED} of {batch_tokens} tokens: the limit is {limit} (serve.max_batch_tokens)"
    return limit, warning if limit >= longest else f"{warning}; longer texts can get 503"


def _run_largest(run: Callable[[Sequences], Rows], batch_tokens: int, longest: int, parallel: int) -> str | None:
    """Return the error message if memory is insufficient, else None."""
    # Two kinds in turn, so that no batch has a common start, which is computed once.
    text, other = (np.full(longest, token, dtype=np.int32) for token in (5, 6))
    largest = Sequences([(text, other)[number % 2] for number in range(max(1, batch_tokens // longest))])
    try:
        if parallel == 1:
            run(largest)  # on the thread that serves, because libraries of GPUs keep handles and plans per thread
        else:
            with ThreadPoolExecutor(parallel) as pool:
                list(pool.map(run, [largest] * parallel))
        run(Sequences([text]))
    except Exception as error:
        if not failures.out_of_memory(error):
            raise
        return failures.summary(error)
    return None
