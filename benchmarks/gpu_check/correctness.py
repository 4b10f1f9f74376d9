"""Step 2: several architectures in all precisions: the attention, and the vectors against fp32 on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import card
import numpy as np
import results
from results import SHORT, STAND_IN, Step

import models

PRECISIONS = ("bf16",) if SHORT else ("bf16", "fp16", "fp32", "int8")
# As the engine's own checks at the start: the distance of a text to itself in another batch.
ALONE = {"bf16": 0.005, "fp16": 0.005, "fp32": 0.005, "int8": 0.05}
# With the stand-in, formats that a CPU emulates need seconds for a large batch.
LIMITS: dict[str, int] = {"max_batch_tokens": 512} if STAND_IN else {}
LENGTHS = (1, 2, 3, 31, 32, 33, 64, 100, 127, 128, 129, 200, 255, 256, 300, 384, 511, 512)


def work(step: Step, settings: dict[str, Any]) -> None:
    folder, small = Path(settings["work"]), dict(models.SMALL) if STAND_IN else {}
    cases: list[tuple[str, Path, str]] = [
        (name, models.make(folder / f"tiny-{name}", name, **small), "embed") for name in models.ARCHITECTURES
    ]
    cross = models.make(folder / "tiny-cross", "bert", task="rerank", **small)
    cases.append(("cross-encoder", cross, "rerank"))
    real = Path(settings["models"]) / "all-MiniLM-L6-v2"
    if SHORT:
        pass
    elif (real / "model.safetensors").is_file():
        cases.append(("all-MiniLM-L6-v2", real, "embed"))
    else:
        step.skip("all-MiniLM-L6-v2", f"{real} does not exist")
    for name, model, task in cases[-2:] if SHORT else cases:
        expected: dict[str, Any] = {}
        for precision in PRECISIONS:
            step.part(f"{name} in {precision}", 10, _case, name, model, task, precision, expected)
            card.free()


def _case(step: Step, name: str, folder: Path, task: Any, precision: str, expected: dict[str, Any]) -> None:
    from inferctl.reading import task_config
    from inferctl.serve.engine_process.engine_protocol import EngineConfig
    from inferctl.serve.engines import plain
    from inferctl.serve.engines.encoder import PADDED, EncoderEngine

    label = f"{name} in {precision}"
    if precision == "int8" and not STAND_IN and importlib.util.find_spec("bitsandbytes") is None:
        step.skip(label, "bitsandbytes is not installed")
        return
    engine = EncoderEngine(EngineConfig(model=str(folder), task=task, precision=precision, device="cuda", **LIMITS))
    info = engine.load()
    ids = _sequences(info.vocabulary_size, task_config.read(task, folder, None).max_tokens)
    # No pair has its second text at the start: 0 says that there is none.
    starts = [max(1, len(row) // 2) for row in ids] if task == "rerank" else None
    if not expected:
        config = task_config.read(task, folder, None)
        reference = plain.Reference(folder, config)
        expected["rows"] = reference.score(list(zip(ids, starts, strict=True))) if starts else reference.embed(ids)
    rows = _run(engine, ids, starts)
    alone = np.concatenate([_run(engine, [row], starts and [starts[i]]) for i, row in enumerate(ids)])
    wanted = "padded" if precision == "fp32" or float(info.device.compute_capability or 0) < 8 else "packed"
    warned = [warning for warning in info.warnings if warning.startswith(PADDED)]
    step.check(
        f"attention of {label}",
        info.attention == wanted and not warned,
        f"{info.attention}" + (f", expected {wanted}: {info.attention_reason}" if info.attention != wanted else ""),
        versions=info.versions,
    )
    if task == "rerank":
        scale = float(np.abs(expected["rows"]).max())
        errors = [float(np.abs(found - expected["rows"]).max()) / scale for found in (rows, alone)]
        limit, own = info.logit_error_limit or 0.0, float(np.abs(rows - alone).max()) / scale
        step.check(
            f"logits of {label}",
            max(errors) <= limit and own <= limit,
            f"error {errors[0]:.4f} in a batch, {errors[1]:.4f} alone, at most {limit}",
        )
        return
    cosines = [float(_cosines(found, expected["rows"]).min()) for found in (rows, alone)]
    own, limit = float(_cosines(rows, alone).min()), info.cosine_limit or 1.0
    nearest = _nearest(rows, expected["rows"])
    step.check(
        f"vectors of {label}",
        min(cosines) >= limit and own >= 1 - ALONE[precision] and not nearest,
        f"cosine to fp32 {cosines[0]:.5f} in a batch, {cosines[1]:.5f} alone, at least {limit}; "
        f"alone to batch {own:.5f}" + (f"; another text is nearer for {nearest} of {len(rows)}" if nearest else ""),
        cosine=cosines[0],
        alone=own,
    )


def _sequences(vocabulary: int, longest: int) -> list[Any]:
    rng = np.random.default_rng(3)
    lengths = [n for n in LENGTHS if n <= longest and not (STAND_IN and n > 130)]
    return [rng.integers(100, vocabulary, n).astype(np.int32) for n in [*lengths[::-1], *lengths]]


def _run(engine: Any, ids: list[Any], starts: list[int] | None) -> Any:
    from inferctl.serve.engine_process.engine_protocol import Batch

    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    second = None if starts is None else np.array(starts, dtype=np.int32)
    result = engine.run(Batch(1, np.concatenate(ids), lengths, second))
    if not result.ok.all():
        raise ValueError(f"{int((~result.ok).sum())} rows have NaN or infinity")
    return result.rows


def _cosines(a: Any, b: Any) -> Any:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def _nearest(rows: Any, expected: Any) -> int:
    """Return for how many rows another expected one is clearly nearer than their own."""
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (rows, expected))
    similar = a @ b.T
    return int((similar.max(axis=1) > np.diag(similar) + 1e-3).sum())


if __name__ == "__main__":
    results.run(work)
