"""Engines in the process of the tests, and the batches that they get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inferctl.config.spec import Task
from inferctl.reading import task_config
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
from inferctl.serve.text.text_parts import Pair
from inferctl.serve.text.tokenizer_pool import TokenizerPool


def loaded(folder: Path, precision: str = "fp32", **options: Any) -> tuple[Any, Any]:
    """Return an engine on the CPU with the model in `folder`, and its info. `options` are those of `EngineConfig`."""
    from inferctl.serve.engines.encoder import EncoderEngine  # it imports torch, which only one test worker does

    engine = EncoderEngine(EngineConfig(model=str(folder), precision=precision, device="cpu", **options))
    return engine, engine.load()


def batch(rows: Sequence[Any], marks: Sequence[int] | None = None) -> Batch:
    """Return a batch of token ids."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return Batch(1, np.concatenate(rows), lengths, None if marks is None else np.array(marks, dtype=np.int32))


def batch_of_pairs(pairs: Sequence[Pair]) -> Batch:
    ids, starts = zip(*pairs, strict=True)
    return batch(ids, starts)


def encoded_pairs(folder: Path, pairs: Sequence[tuple[str, str]], task: Task, limit: int | None = None) -> list[Pair]:
    pool = TokenizerPool(folder, task_config.read(task, folder, limit), threads=1)
    firsts, seconds = zip(*pairs, strict=True)
    found = pool.encode_pairs_now(firsts, seconds, truncate=True)
    pool.close()
    return found
