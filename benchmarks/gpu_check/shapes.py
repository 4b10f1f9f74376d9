"""Step 3: batches of random shapes, as a server has them: time, growth of memory, kernels, launches, share of the peak.

Each batch has about as many tokens as the others, but a number of sequences and a longest one of its own. A library
that prepares something for each new shape is slow in the tail, and keeps what it prepared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import card
import numpy as np
import results
from results import SHORT, STAND_IN, Step

import models

BATCHES, TOKENS = 300, 256 if STAND_IN else 8192
WARM = 20  # batches at the start that are not counted
TAIL = 5.0  # the p99 may be so many times the p50
MIB = 1 << 20
# From a third of the batches on. What torch reserves grows with a batch that is larger, or has another shape, than all
# before. Its bound is a guess, as no GPU has run this yet.
GROWTH, RESERVED_GROWTH = 48 * MIB, 1024 * MIB
# The least share of the rate of this GPU's own matrix products, for full batches that are bound by them. A guess too.
LEAST_SHARE = {"bge-base": 0.2}
# What may compute attention. Math is many times slower, and cuDNN keeps a plan for each shape of a batch.
KERNELS = {"packed": ("flash",), "padded": ("flash", "efficient")}
_NAMED = {"cudnn": "cuDNN", "flash": "flash", "efficient": "efficient", "_attention_math": "math"}


def work(step: Step, settings: dict[str, Any]) -> None:
    folder = Path(settings["work"])
    matrix = card.matrix_rate()
    step.figure("matrix products in bf16", f"{matrix / 1e12:.4g} TFLOP/s", flops_per_s=matrix)
    for name, shape in models.SHAPES.items():
        architecture = "qwen3" if name.startswith("qwen3") else "bert"
        if SHORT and name != "minilm":
            continue
        shape = dict(models.SMALL) if STAND_IN else shape
        model = models.make(folder / f"shape-{name}", architecture, **{"initializer_range": 0.02, **shape})
        step.part(name, 40, _both, name, model, matrix)


def _both(step: Step, name: str, model: Path, matrix: float) -> None:
    """Measure a model with packed and with padded attention, and compare them."""
    rates: dict[str, float] = {}
    for kind in ("packed", "padded"):
        _variant(step, name, kind, model, matrix, rates)
        card.free()
    if "packed" in rates:
        gain = rates["packed"] / rates["padded"]
        step.check(f"gain of {name}, packed", gain > 1, f"{gain:.2f}x of padded attention's tokens/s", gain=gain)


def _variant(step: Step, name: str, kind: str, folder: Path, matrix: float, rates: dict[str, float]) -> None:
    """Measure one model with one attention, and add its tokens/s to `rates`."""
    import torch

    from inferctl.serve.engine_process.engine_protocol import EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine

    label = f"{name}, {kind}"
    engine = EncoderEngine(
        EngineConfig(model=str(folder), precision="bf16", device="cuda", max_batch_tokens=2 * TOKENS)
    )
    info = engine.load()
    if STAND_IN:
        torch.set_num_threads(1)
    forward: Any = engine._compute
    if kind == "packed" and info.attention != "packed":
        step.check(label, False, f"the engine chose padded attention: {info.attention_reason}")
        return
    forward.pack(kind == "packed")
    rng = np.random.default_rng(5)
    kernels, _ = _events(forward, _batch(rng))
    for what, batch in (("a full batch", _batch(rng)), ("one short text", _batch(rng, 16))):
        told = ", ".join(f"{count} x {event}" for event, count in _events(forward, batch)[1].items())
        step.figure(f"launches of {what} of {label}", told)
    batches, seconds, memory = _measure(step, forward)
    counted = np.array(seconds[WARM:])
    p50, p99 = np.percentile(counted, 50), np.percentile(counted, 99)
    growth = {kind: memory[-1][kind] - memory[len(memory) // 3][kind] for kind in memory[0]}
    rates[kind] = sum(sum(lengths) for lengths in batches[WARM:]) / float(counted.sum())
    figures = {
        "p50_ms": 1000 * float(p50),
        "p99_ms": 1000 * float(p99),
        "slowest_ms": 1000 * float(counted.max()),
        "tokens_per_s": rates[kind],
        "growth_bytes": growth,
        "kernels": kernels,
        "batches": len(seconds),
    }
    told = f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, {p99 / p50:.1f}x; {len(seconds)} batches"
    step.check(f"tail of {label}", bool(p99 <= TAIL * p50), f"{told}, at most {TAIL:.0f}x", **figures)
    limits = {kind: RESERVED_GROWTH if kind == "reserved" else GROWTH for kind in growth}
    grown = ", ".join(f"{kind} {size / MIB:+.0f} MiB" for kind, size in growth.items())
    told = f"{grown}, at most {', '.join(f'{kind} {limit // MIB}' for kind, limit in limits.items())}"
    step.check(f"memory of {label}", all(growth[kind] <= limit for kind, limit in limits.items()), told)
    found = sorted({next(name for word, name in _NAMED.items() if word in kernel) for kernel in kernels})
    told = f"{' and '.join(found) or 'no operator of attention was seen'}: {', '.join(kernels)}"
    step.check(f"kernels of {label}", bool(found) and set(found) <= {*KERNELS[kind]}, told)
    if flops := getattr(info, "flops", None):
        share = sum(flops.batch(np.array(lengths)) for lengths in batches[WARM:]) / float(counted.sum()) / matrix
        peak = getattr(info, "matrix_rate", None)
        told = f"{100 * share:.0f}% of this device's matrix products"
        told += f", {100 * share * matrix / peak.flops_per_s:.0f}% of its {peak.source} rate" if peak else ""
        least = 0.0 if STAND_IN or kind == "padded" else LEAST_SHARE.get(name, 0.0)
        step.check(f"share of {label}", share >= least, f"{told}, at least {100 * least:.0f}%", share=share)


def _measure(step: Step, forward: Any) -> tuple[list[list[int]], list[float], list[dict[str, int]]]:
    """Return the lengths and the seconds of each batch, and the memory after each. Ends early with the step."""
    rng = np.random.default_rng(11)
    batches: list[list[int]] = []
    seconds: list[float] = []
    memory: list[dict[str, int]] = []
    for _ in range(BATCHES):
        batch = _batch(rng)
        started = card.clock()
        forward(batch)
        seconds.append(card.clock() - started)
        batches.append(batch.lengths)
        memory.append(card.memory())
        if step.left() < 5:
            break
    if len(seconds) < 4 * WARM:
        raise TimeoutError(f"only {len(seconds)} batches in the time of the step")
    return batches, seconds, memory


def _batch(rng: Any, tokens: int = TOKENS) -> Any:
    """Return sequences with 0.8 to 1.0 times `tokens` tokens in all, whose mean length is random too."""
    from inferctl.serve.engines.prepared import Sequences

    wanted, mean = int(tokens * rng.uniform(0.8, 1.0)), math.exp(rng.uniform(math.log(16), math.log(160)))
    lengths: list[int] = []
    while (left := wanted - sum(lengths)) > 0:
        lengths.append(min(left, 512, max(1, int(mean * rng.lognormal(0, 0.5)))))
    return Sequences([rng.integers(100, 1000, n).astype(np.int32) for n in lengths])


def _events(forward: Any, batch: Any) -> tuple[list[str], dict[str, int]]:
    """Return the operators of attention that a batch calls, and how often it calls functions of CUDA.

    These launch kernels or graphs, copy, or wait. The stand-in has none: operators of torch are counted in their place.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if STAND_IN else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    forward(batch)  # what is only done for the first batch of its shape is not counted
    with profile(activities=activities) as seen:
        forward(batch)
    counts = {event.key: event.count for event in seen.key_averages()}
    kernels = [key for key in counts if "attention" in key and "::" in key and any(word in key for word in _NAMED)]
    words = ("Launch", "Memcpy", "Synchronize")
    calls = {key: n for key, n in counts.items() if key.startswith("cu") and any(word in key for word in words)}
    operators = {"operators of torch": sum(n for key, n in counts.items() if key.startswith("aten::"))}
    return sorted(kernels), operators if STAND_IN else calls


if __name__ == "__main__":
    results.run(work)
