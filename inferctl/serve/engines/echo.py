"""An engine without a model. Its vectors depend only on the tokens. For tests and to measure the server's overhead."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from inferctl.reading.outputs import Form, Outputs, form_of, pack
from inferctl.reading.rows import Rows, Tokens, Vectors, finite_rows
from inferctl.serve.engine_process.engine_protocol import (
    Batch,
    BatchResult,
    DeviceInfo,
    EngineConfig,
    EngineInfo,
    PrecisionInfo,
    Prepare,
)

NON_FINITE_TOKEN = 13
FAILING_TOKEN = 14
CRASHING_TOKEN = 15
SLOW_TOKEN = 16
SLOW_SECONDS = 0.5
LINGER_SECONDS = 60
LARGE_TOKEN = 18
CORRUPTING_TOKEN = 19
CLOSING_TOKEN = 20
_DIMENSIONS = 8


class EchoEngine:
    """Returns (sum of the ids, length, 1, 0, 0, ...) per sequence, scaled to length one.

    A sequence that starts with one of the token ids above injects a fault. NON_FINITE gives NaN, FAILING raises,
    CRASHING ends the process, SLOW sleeps. LARGE raises out of memory in a batch with other sequences. CORRUPTING
    raises what torch raises after a failed assertion on a GPU. CLOSING closes all files, so the API process sees the
    end of an engine whose process lives on.
    """

    prepare: Prepare | None = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def load(self, on_phase: Callable[[str], None] = lambda _: None) -> EngineInfo:
        """Return the info of an engine without a model."""
        return EngineInfo(
            dimensions=_DIMENSIONS,
            token_dimensions=_DIMENSIONS,
            attention="none",
            attention_reason="the echo engine has no model",
            precision=PrecisionInfo(
                self._config.precision, "fp32", "native", "the echo engine computes nothing", "echo"
            ),
            device=DeviceInfo("cpu", "echo", None, 0),
            batch_tokens=self._config.max_batch_tokens,
            check="the echo engine has no model",
        )

    def run(self, batch: Batch) -> BatchResult:
        """Return the vectors of a batch, or inject the faults that its sequences request."""
        started = time.perf_counter()
        ends = np.cumsum(batch.lengths)
        firsts = batch.tokens[ends - batch.lengths]
        if (firsts == CRASHING_TOKEN).any():
            raise SystemExit(9)
        if (firsts == CORRUPTING_TOKEN).any():
            raise RuntimeError("CUDA error: device-side assert triggered")
        if (firsts == CLOSING_TOKEN).any():
            os.closerange(3, 1 << 20)
            time.sleep(LINGER_SECONDS)
        if (firsts == FAILING_TOKEN).any():
            raise RuntimeError("injected failure")
        if (firsts == LARGE_TOKEN).any() and len(firsts) > 1:
            raise MemoryError("injected out of memory")
        vectors = np.zeros((len(batch.lengths), _DIMENSIONS), dtype=np.float32)
        vectors[:, 0] = np.add.reduceat(batch.tokens, ends - batch.lengths)
        vectors[:, 1] = batch.lengths
        vectors[:, 2] = 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[firsts == NON_FINITE_TOKEN] = np.nan
        time.sleep(SLOW_SECONDS * int((firsts == SLOW_TOKEN).sum()))
        rows: Rows = vectors
        if batch.marks is not None and self._config.task == "embed":
            sequences = np.split(batch.tokens, ends[:-1])
            rows = [_row(*each) for each in zip(vectors, sequences, batch.marks.tolist(), strict=True)]
        return BatchResult(batch.id, rows, finite_rows(rows), time.perf_counter() - started)


def _row(vector: Vectors, ids: Tokens, mark: int) -> Vectors:
    """Return the outputs that a sequence asks for: its vector for each token, and the weight 1 of each id."""
    form, present = form_of(mark), np.unique(ids)
    found = Outputs(dense=vector if Form.DENSE in form else vector[:0])
    if Form.SPARSE in form:
        found = found._replace(ids=present, weights=np.ones(len(present), np.float32))
    if Form.TOKENS in form:
        found = found._replace(tokens=np.repeat(vector[None], len(ids), axis=0))
    return pack(form, found)
