"""What a model computes, counted by torch, and how fast this device multiplies matrices: the limit of an engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from inferctl.facts import catalog
from inferctl.models.flops import ModelFlops
from inferctl.serve.engine_process.engine_protocol import DeviceInfo, MatrixRate, PrecisionInfo
from inferctl.serve.engines import onednn

# Small enough for the caches, large enough for full speed: on a CPU with AMX, larger products are at most 2% faster,
# and much slower next to other load.
_ROWS, _WIDTH = 256, 768
_MEASURE_S, _MIN_RUNS = 0.2, 4
# The fastest fifth: the others shared caches with other processes.
_QUANTILE = 0.2
_LINEAR = ("mm", "addmm", "_grouped_mm")


class FlopCounter:
    """Counts forward passes of one sequence each. Two lengths suffice, and more would only take time."""

    def __init__(self) -> None:
        self._linear: dict[int, float] = {}
        self._others: dict[int, float] = {}

    @contextlib.contextmanager
    def counting(self, tokens: int) -> Iterator[None]:
        """Count the forward pass of a sequence in this context."""
        if tokens in self._linear or len(self._linear) == 2:
            yield
            return
        # torch's counter does not know its own kernel for CPUs.
        kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_shapes}
        with FlopCounterMode(display=False, custom_mapping=kernel) as counter:
            yield
        counts = counter.get_flop_counts()["Global"]
        linear = sum(count for operator, count in counts.items() if str(operator).rpartition(".")[2] in _LINEAR)
        self._linear[tokens], self._others[tokens] = linear, counter.get_total_flops() - linear

    @property
    def model(self) -> ModelFlops:
        """The FLOP by length. Attention also has a part that is linear, such as that of distances in DeBERTa.

        Longformer pads texts to its windows: what all short texts cost alike is a part of each text.
        """
        per_token, per_text = _line(self._linear)
        if len(self._others) == 2 and len(set(self._others.values())) == 1:
            return ModelFlops(per_token, 0.0, per_text + max(self._others.values()))
        per_token2, more = _line({tokens: count / tokens for tokens, count in self._others.items()})
        if per_token2 < 0:  # Mamba 2 pads texts to its chunks: the longer one shows what a token costs
            tokens = max(self._others)
            return ModelFlops(per_token + self._others[tokens] / tokens, 0.0, per_text)
        return ModelFlops(per_token + more, per_token2, per_text)


def _attention_shapes(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Return slope and intercept of the line through two points, or through one and the origin."""
    (x1, y1), *others = points.items()
    if not others:
        return y1 / x1, 0.0
    ((x2, y2),) = others
    slope = (y2 - y1) / (x2 - x1)
    return slope, y1 - slope * x1


def matrix_rate(device: DeviceInfo, precision: PrecisionInfo, dtype: torch.dtype, cores: int) -> MatrixRate | None:
    """Return the rate of matrix products on this device in this precision; None if it is not known.

    It is measured on the `cores` of an engine on a CPU, and the dense peak of the catalog for a GPU.
    """
    if device.kind == "cuda":
        part = catalog.hardware_profiles().get(device.hardware or "")
        peak = part.peaks.get(precision.effective) if part and not precision.tf32 else None
        return MatrixRate(peak * 1e12, "catalog") if peak else None
    product = _product(precision, dtype)

    def seconds(_: int) -> float:
        torch.set_num_threads(1)
        times: list[float] = []
        end = time.monotonic() + _MEASURE_S
        while time.monotonic() < end or len(times) < _MIN_RUNS:
            started = time.thread_time()  # without the time of other processes on this core
            product()
            times.append(time.thread_time() - started)
        return float(np.quantile(times, _QUANTILE))

    with ThreadPoolExecutor(cores) as pool, torch.inference_mode():
        each = list(pool.map(seconds, range(cores)))
    return MatrixRate(sum(2 * _ROWS * _WIDTH * _WIDTH / found for found in each), "measured")


def _product(precision: PrecisionInfo, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a matrix product by the library that the engine uses in this precision."""
    linear = torch.nn.Linear(_WIDTH, _WIDTH, dtype=dtype)
    x = torch.ones(_ROWS, _WIDTH, dtype=dtype)
    with contextlib.suppress(Exception):  # as in `onednn.pack`, which has warned
        if precision.effective == "int8":
            weight = torch.ops.onednn.qlinear_prepack(torch.ones((_WIDTH, _WIDTH), dtype=torch.int8), [_ROWS, _WIDTH])
            scales = torch.ones(_WIDTH), torch.zeros(_WIDTH, dtype=torch.int64)
            given: tuple[Any, ...] = x.to(torch.uint8), 1.0, 0, weight, *scales, None, 1.0, 0, dtype, "none", [], ""
            torch.ops.onednn.qlinear_pointwise(*given)
            return lambda: torch.ops.onednn.qlinear_pointwise(*given)
        if precision.effective == "bf16" and precision.level == "native":
            packed = onednn.Linear(linear)
            packed(x)
            return lambda: packed(x)
    return lambda: linear(x)
