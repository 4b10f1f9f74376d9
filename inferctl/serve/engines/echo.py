"""An engine without a model: vectors that depend on the tokens alone. For tests and for measuring everything but the model."""

from __future__ import annotations

import time

import numpy as np

from inferctl.serve.types import Batch, BatchResult, DeviceInfo, EngineConfig, EngineInfo, PrecisionInfo, finite_rows

NON_FINITE_TOKEN = 13
FAILING_TOKEN = 14
CRASHING_TOKEN = 15
SLOW_TOKEN = 16
SLOW_SECONDS = 0.5
OVERFLOWING_TOKEN = 17
LARGE_TOKEN = 18
SICKENING_TOKEN = 19


class EchoEngine:
    """Row i is (sum of the ids, length, 1, 0, 0, ...), scaled to length one.

    Some token ids misbehave when a sequence starts with them: one gives NaN, one raises, one ends the process, one takes its time, one gives
    NaN unless the batch is exact, one does not fit into memory beside other
    sequences, and one makes this engine fail from then on.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._sick = config, False

    def load(self) -> EngineInfo:
        """Ready at once."""
        return EngineInfo(
            dimensions=self._config.echo_dimensions,
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
        """See the class."""
        started = time.perf_counter()
        ends = np.cumsum(batch.lengths)
        firsts = batch.tokens[ends - batch.lengths]
        if (firsts == CRASHING_TOKEN).any():
            raise SystemExit(9)
        self._sick |= bool((firsts == SICKENING_TOKEN).any())
        if self._sick or (firsts == FAILING_TOKEN).any():
            raise RuntimeError("asked to fail")
        if (firsts == LARGE_TOKEN).any() and len(firsts) > 1:
            raise MemoryError("asked to be too large")
        vectors = np.zeros((len(batch.lengths), self._config.echo_dimensions), dtype=np.float32)
        vectors[:, 0] = np.add.reduceat(batch.tokens, ends - batch.lengths)
        vectors[:, 1] = batch.lengths
        vectors[:, 2] = 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[(firsts == NON_FINITE_TOKEN) | ((firsts == OVERFLOWING_TOKEN) & (not batch.exact))] = np.nan
        time.sleep(SLOW_SECONDS * int((firsts == SLOW_TOKEN).sum()))
        return BatchResult(batch.id, vectors, finite_rows(vectors), time.perf_counter() - started)

    def close(self) -> None:
        """Nothing to give back."""
