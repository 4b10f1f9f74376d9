"""Step 3: batches of random shapes, as a server has them: their time, the growth of memory, and the kernels.

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


def work(step: Step, settings: dict[str, Any]) -> None:
    folder = Path(settings["work"])
    for name, shape in models.SHAPES.items():
        small = dict(models.SMALL) if STAND_IN else shape
        model = models.make(folder / f"shape-{name}", "bert", **{"initializer_range": 0.02, **small})
        if SHORT and name != "minilm":
            continue
        for packed in (True,) if SHORT else (True, False):
            for cudnn in (False,) if SHORT else (False, True):
                label = f"{name}, {'packed' if packed else 'padded'}{', cuDNN on' if cudnn else ''}"
                step.part(label, 20, _variant, label, model, packed, cudnn)
                card.free()


def _variant(step: Step, label: str, folder: Path, packed: bool, cudnn: bool) -> None:
    """Measure one model with one attention. With `cudnn`, torch may use it, which no server allows."""
    import torch

    from inferctl.serve.engine_process.engine_protocol import EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine

    engine = EncoderEngine(
        EngineConfig(model=str(folder), precision="bf16", device="cuda", max_batch_tokens=2 * TOKENS)
    )
    info = engine.load()
    if STAND_IN:
        torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(cudnn or torch.backends.cuda.cudnn_sdp_enabled())
    forward: Any = engine._compute
    if packed and info.attention != "packed":
        step.check(label, False, f"the engine chose padded attention: {info.attention_reason}")
        return
    forward.pack(packed)
    kernels = _kernels(forward)
    seconds, tokens, memory = _measure(step, forward, BATCHES if not cudnn else BATCHES // 3)
    counted = np.array(seconds[WARM:])
    p50, p99 = np.percentile(counted, 50), np.percentile(counted, 99)
    growth = {kind: memory[-1][kind] - memory[len(memory) // 3][kind] for kind in memory[0]}
    figures = {
        "p50_ms": 1000 * float(p50),
        "p99_ms": 1000 * float(p99),
        "slowest_ms": 1000 * float(counted.max()),
        "tokens_per_s": sum(tokens[WARM:]) / float(counted.sum()),
        "growth_bytes": growth,
        "kernels": kernels,
        "batches": len(seconds),
    }
    told = f"p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, {p99 / p50:.1f}x; {len(seconds)} batches"
    grown = ", ".join(f"{kind} {size / MIB:+.0f} MiB" for kind, size in growth.items())
    if cudnn:
        step.figure(label, f"{told}; {grown}; {', '.join(kernels)}", **figures)
        return
    step.check(f"tail of {label}", bool(p99 <= TAIL * p50), f"{told}, at most {TAIL:.0f}x", **figures)
    limits = {kind: RESERVED_GROWTH if kind == "reserved" else GROWTH for kind in growth}
    told = f"{grown}, at most {', '.join(f'{kind} {limit // MIB}' for kind, limit in limits.items())}"
    step.check(f"memory of {label}", all(growth[kind] <= limit for kind, limit in limits.items()), told)
    known = bool(kernels) and not any("cudnn" in kernel for kernel in kernels)
    step.check(f"kernels of {label}", known, ", ".join(kernels) or "no operator of attention was seen")


def _measure(step: Step, forward: Any, count: int) -> tuple[list[float], list[int], list[dict[str, int]]]:
    """Return the seconds and the tokens of each batch, and the memory after each. Ends early with the step."""
    rng = np.random.default_rng(11)
    seconds: list[float] = []
    tokens: list[int] = []
    memory: list[dict[str, int]] = []
    for _ in range(count):
        batch = _batch(rng)
        started = card.clock()
        forward(batch)
        seconds.append(card.clock() - started)
        tokens.append(sum(batch.lengths))
        memory.append(card.memory())
        if step.left() < 5:
            break
    if len(seconds) < 4 * WARM:
        raise TimeoutError(f"only {len(seconds)} batches in the time of the step")
    return seconds, tokens, memory


def _batch(rng: Any) -> Any:
    """Return sequences with 0.8 to 1.0 times TOKENS tokens in all, whose mean length is random too."""
    from inferctl.serve.engines.prepared import Sequences

    wanted, mean = int(TOKENS * rng.uniform(0.8, 1.0)), math.exp(rng.uniform(math.log(16), math.log(160)))
    lengths: list[int] = []
    while (left := wanted - sum(lengths)) > 0:
        lengths.append(min(left, 512, max(1, int(mean * rng.lognormal(0, 0.5)))))
    return Sequences([rng.integers(100, 1000, n).astype(np.int32) for n in lengths])


def _kernels(forward: Any) -> list[str]:
    """Return the names of the operators of attention that a batch calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        forward(_batch(np.random.default_rng(5)))
    names = {event.key for event in seen.key_averages()}
    words = ("_attention_forward", "cudnn_attention", "_attention_math", "flash_attention", "efficient_attention")
    return sorted(name for name in names if any(word in name for word in words))


if __name__ == "__main__":
    results.run(work)
