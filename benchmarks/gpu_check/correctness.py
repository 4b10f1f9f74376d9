"""Step 2: several architectures in all precisions: the attention, and the vectors against fp32 on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import card
import numpy as np
import results
from results import SHORT, STAND_IN, Step

import models

HEADS = ("SPLADE", "soft cap", "static embeddings") if SHORT else tuple(models.HEADS)
PRECISIONS = ("bf16",) if SHORT else ("bf16", "fp16", "fp32", "int8")
# As the engine's own checks at the start: the distance of a text to itself in another batch.
ALONE = {"bf16": 0.005, "fp16": 0.005, "fp32": 0.005, "int8": 0.05}
# What the variable-length kernel does not compute: a server pads these, and warns.
UNPACKED = ("T5", "soft cap")
# With the stand-in, formats that a CPU emulates need seconds for a large batch.
LIMITS: dict[str, int] = {"max_batch_tokens": 512} if STAND_IN else {}
LENGTHS = (1, 2, 3, 31, 32, 33, 64, 100, 127, 128, 129, 200, 255, 256, 300, 384, 511, 512)


def work(step: Step, settings: dict[str, Any]) -> None:
    folder, small = Path(settings["work"]), dict(models.SMALL) if STAND_IN else {}
    cases: list[tuple[str, str, Callable[..., Path]]] = [
        *(
            (name, "embed", partial(models.make, folder / f"tiny-{name}", name, **small))
            for name in models.ARCHITECTURES
        ),
        ("cross-encoder", "rerank", partial(models.make, folder / "tiny-cross", "bert", task="rerank", **small)),
    ]
    heads: list[tuple[str, str, Callable[..., Path]]] = [
        (name, "rerank" if "rerank" in name else "embed", partial(models.head, folder / f"head-{index}", name))
        for index, name in enumerate(HEADS)
    ]
    real = Path(settings["models"]) / "all-MiniLM-L6-v2"
    if not SHORT and (real / "model.safetensors").is_file():
        cases.append((real.name, "embed", lambda: real))
    elif not SHORT:
        step.skip(real.name, f"{real} does not exist")
    for name, task, make in [*(cases[-2:] if SHORT else cases), *heads]:
        expected: dict[str, Any] = {}
        for precision in PRECISIONS:
            # int8 not again: the layers of the heads are those of the architectures.
            if name not in models.HEADS or precision in PRECISIONS[:3]:
                step.part(f"{name} in {precision}", 10, _case, name, make, task, precision, expected)
                card.free()


def _case(
    step: Step, name: str, make: Callable[..., Path], task: Any, precision: str, expected: dict[str, Any]
) -> None:
    from inferctl.reading import task_config
    from inferctl.reading.outputs import Form, Outputs, mark, unpack
    from inferctl.serve.engine_process.engine_protocol import EngineConfig
    from inferctl.serve.engines import plain
    from inferctl.serve.engines.checks import _largest_distance
    from inferctl.serve.engines.encoder import PADDED, EncoderEngine

    label = f"{name} in {precision}"
    if precision == "int8" and not STAND_IN and importlib.util.find_spec("bitsandbytes") is None:
        step.skip(label, "bitsandbytes is not installed")
        return
    folder = make()
    engine = EncoderEngine(EngineConfig(model=str(folder), task=task, precision=precision, device="cuda", **LIMITS))
    info, config = engine.load(), task_config.read(task, folder, None)
    form = getattr(config, "checked", Form.DENSE)
    # The first token of BGE-M3 has no vector.
    ids = [row for row in _sequences(info.vocabulary_size, config.max_tokens) if form == Form.DENSE or len(row) > 1]
    # No pair has its second text at the start: 0 says that there is none.
    starts = [max(1, len(row) // 2) for row in ids] if task == "rerank" else None
    marks = starts or (None if form == Form.DENSE else [mark(form)] * len(ids))
    if not expected:
        reference = plain.Reference(folder, config)
        if starts:
            expected["rows"] = reference.score(list(zip(ids, starts, strict=True)))
        elif marks:
            expected["rows"] = [reference.outputs(row, mark(form)) for row in ids]
        else:
            expected["rows"] = [Outputs(row) for row in reference.embed(ids)]
    rows = _run(engine, ids, marks)
    alone = [_run(engine, [row], marks and [marks[i]])[0] for i, row in enumerate(ids)]
    slow = precision == "fp32" or float(info.device.compute_capability or 0) < 8
    wanted = "none" if name == "static embeddings" else "padded" if slow or name in UNPACKED else "packed"
    warned = any(warning.startswith(PADDED) for warning in info.warnings)
    step.check(
        f"attention of {label}",
        info.attention == wanted and warned == (name in UNPACKED and not slow),
        f"{info.attention}" + (f", expected {wanted}: {info.attention_reason}" if info.attention != wanted else ""),
        versions=info.versions,
    )
    if task == "rerank":
        scale = float(np.abs(expected["rows"]).max())
        errors = [float(np.abs(found - expected["rows"]).max()) / scale for found in (rows, np.stack(alone))]
        limit, own = info.logit_error_limit or 0.0, float(np.abs(np.subtract(rows, alone)).max()) / scale
        step.check(
            f"logits of {label}",
            max(errors) <= limit and own <= limit,
            f"error {errors[0]:.4f} in a batch, {errors[1]:.4f} alone, at most {limit}",
        )
        return

    def outputs(found: Any) -> list[Outputs]:
        return [unpack(row, form, info.dimensions, info.token_dimensions) for row in found]

    def cosine(first: list[Outputs], second: list[Outputs]) -> float:
        """Return the lowest cosine of all outputs."""
        return 1 - max(map(_largest_distance, first, second))

    whole, each = outputs(rows), outputs(alone)
    cosines = [cosine(found, expected["rows"]) for found in (whole, each)]
    own, limit = cosine(whole, each), info.cosine_limit or 1.0
    step.check(
        f"vectors of {label}",
        min(cosines) >= limit and own >= 1 - ALONE[precision],
        f"cosine to fp32 {cosines[0]:.5f} in a batch, {cosines[1]:.5f} alone, at least {limit}; "
        f"alone to batch {own:.5f}",
        cosine=cosines[0],
        alone=own,
    )


def _sequences(vocabulary: int, longest: int) -> list[Any]:
    rng = np.random.default_rng(3)
    lengths = [n for n in LENGTHS if n <= longest and not (STAND_IN and n > 130)]
    return [rng.integers(100, vocabulary, n).astype(np.int32) for n in [*lengths[::-1], *lengths]]


def _run(engine: Any, ids: list[Any], marks: list[int] | None) -> Any:
    from inferctl.serve.engine_process.engine_protocol import Batch

    lengths = np.array([len(row) for row in ids], dtype=np.int32)
    result = engine.run(Batch(1, np.concatenate(ids), lengths, None if marks is None else np.array(marks, np.int32)))
    if not result.ok.all():
        raise ValueError(f"{int((~result.ok).sum())} rows have NaN or infinity")
    return result.rows


if __name__ == "__main__":
    results.run(work)
