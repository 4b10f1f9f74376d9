"""Where the time of an engine on a CPU goes: core-seconds of its parts, recorded by torch's profiler.

    echo '{"engine": {"precision": "bf16"}, "words": "...", "grid": [[1, 16], [64, 256]], "texts": []}' |
        python -m inferctl.serve.engines.profile MODEL_DIR

`engine` has fields of `EngineConfig`, and `words` is a text to take texts from: `grid` has pairs of texts and tokens.
`texts`, if any, are one more point. stdout is JSON: `precision`, `matrix_rate` (as in `GET /info`), and `points`. Each
has `texts`, `tokens` (the mean), `seconds` of its batches without the profiler, `matrix_share_percent` of these,
`cpu_share_percent` of the CPU seconds in place of all core-seconds, and `parts`: shares of all core-seconds, in
percent, that add up to 100. At most two batches per core run, as further ones would be like them.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from inferctl.core.errors import UsageError
from inferctl.reading import task_config
from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
from inferctl.serve.engines.encoder import EncoderEngine
from inferctl.serve.engines.forward import Forward
from inferctl.serve.engines.prepared import Sequences
from inferctl.serve.main import exit_with
from inferctl.serve.text.tokenizer_pool import TokenizerPool

# The operators of each part by the ends or pieces of their names; what is left is elementwise.
_PRODUCTS = ("::mm", "::addmm", "linear_pointwise", "_linear")
_ATTENTION = ("bmm", "softmax", "scaled_dot_product", "_attention_forward", "_varlen")
_FORWARD, _LAYERS = "inferctl forward", "inferctl layers"
_SAMPLE = 400  # characters that show how long tokens are
_MOST_TEXTS, _BATCHES_PER_CORE, _ROUNDS, _MOST_S = 256, 2, 3, 3.0


def _mark(forward: Forward) -> None:
    """Let the profiler record forward passes, with their threads, and in them the layers of the transformer."""
    call, local = Forward.__call__, threading.local()

    def marked(self: Forward, sequences: Sequences) -> Any:
        with record_function(f"{_FORWARD} {torch.get_num_threads()}"):
            return call(self, sequences)

    def enter(*_: Any) -> None:
        local.layers = record_function(_LAYERS)
        local.layers.__enter__()

    Forward.__call__ = marked  # type: ignore[method-assign]
    forward._encoder.register_forward_pre_hook(enter)
    forward._encoder.register_forward_hook(lambda *_: local.layers.__exit__(None, None, None))


def account(events: Sequence[Any], core_seconds: float, tokens: int) -> dict[str, float]:
    """Return the core-seconds of each part of recorded batches with so many tokens. They add up to `core_seconds`."""
    parts: dict[str, float] = defaultdict(float)
    by_thread: dict[int, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        by_thread[event.thread].append(event)
    rows = busy = 0.0
    for found in by_thread.values():
        forwards = [event for event in found if event.name.startswith(_FORWARD)]
        cores = max((int(event.name.rpartition(" ")[2]) for event in forwards), default=0)
        layers = [event.time_range for event in found if event.name == _LAYERS]
        operators = [event for event in found if not event.name.startswith((_FORWARD, _LAYERS))]
        for whole in (event.time_range for event in forwards):
            inside = [each for each in layers if whole.start <= each.start < whole.end]
            ends = [whole.start, *(end for each in inside for end in (each.start, each.end)), whole.end]
            spans = [(second - first) * cores for first, second in pairwise(ends)]
            busy += sum(spans)
            parts["preparation"] += spans[0] if inside else 0.0
            parts["embedding and outputs"] += sum(spans[2::2]) if inside else spans[0]
            parts["Python"] += sum(spans[1::2])
        at = 0
        for each in layers:
            first = True
            while at < len(operators) and operators[at].time_range.start < each.end:
                operator, at = operators[at], at + 1
                if operator.time_range.start < each.start:
                    continue
                seconds = operator.self_cpu_time_total * cores
                kind = part_of(operator.name)
                parts[kind] += seconds
                parts["Python"] -= seconds
                if first and kind == "matrix products" and (shapes := [s for s in operator.input_shapes if len(s) > 1]):
                    rows, first = rows + float(np.prod(shapes[0][:-1])), False
    parts = defaultdict(float, {name: value / 1e6 for name, value in parts.items()})
    parts["waiting"] = max(0.0, core_seconds - busy / 1e6)
    parts["padding"] = parts["matrix products"] * max(0.0, 1 - tokens / rows) if rows else 0.0
    parts["matrix products"] -= parts["padding"]
    return parts


def part_of(operator: str) -> str:
    """Return the part that an operator of the layers belongs to."""
    if any(piece in operator for piece in _ATTENTION):
        return "attention"
    if operator.endswith(_PRODUCTS):
        return "matrix products"
    return "embedding and outputs" if operator.endswith("::embedding") else "norms and elementwise"


class _Profiler:
    """An engine with its tokenizer. `info`: what the engine says of itself, `rate`: its limit."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        config = EngineConfig(model=str(folder), device="cpu", allow_inaccurate=True, **settings)
        self._engine = EncoderEngine(config)
        self.info = self._engine.load()
        self._cores = self.info.device.threads or 1
        self._config = task_config.read(config.task, folder)
        self._pool = TokenizerPool(folder, self._config)
        compute: Any = self._engine._compute
        if self.info.matrix_rate is None:
            raise UsageError("this model has no layers to profile", "profile a transformer")
        self.rate = self.info.matrix_rate
        _mark(compute._forward)

    def texts(self, words: str, count: int, tokens: int) -> list[str]:
        """Return texts of about so many tokens, which start at different places of `words`."""
        size = max(1, round(tokens * _SAMPLE / len(self._tokenized([words[:_SAMPLE]]).ids[0])))
        starts = [(613 * number) % max(1, len(words) - size) for number in range(count)]
        return [words[start : start + size] for start in starts]

    def _tokenized(self, texts: list[str]) -> Sequences:
        if getattr(self._config, "takes_texts", True):
            return Sequences(self._pool.encode_now(texts, truncate=True))
        queries, documents = [text[: len(text) // 4] for text in texts], [text[len(text) // 4 :] for text in texts]
        return Sequences.of_pairs(self._pool.encode_pairs_now(queries, documents, truncate=True))

    def point(self, texts: list[str]) -> dict[str, Any]:
        """Return one element of `points`."""
        started = time.perf_counter()
        sequences = self._tokenized(texts)
        tokenization = time.perf_counter() - started
        batches = self._batches(sequences)
        kept = sum(len(batch.lengths) for batch in batches)
        lengths = np.array(sequences.lengths[:kept], dtype=np.int32)
        with ThreadPoolExecutor(self.info.parallel) as pool:
            times: list[tuple[float, float]] = []  # the first round does one-time work
            while len(times) < 2 or (len(times) <= _ROUNDS and sum(wall for wall, _ in times) < _MOST_S):
                clocks = time.perf_counter(), time.process_time()
                flops = sum(result.flops for result in pool.map(self._engine.run, batches))
                times.append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
            every_thread = _ExperimentalConfig(profile_all_threads=True)
            with profile(
                activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=every_thread
            ) as recorded:
                started = time.perf_counter()
                list(pool.map(self._engine.run, batches))
                passed = time.perf_counter() - started
        parts = account(recorded.events(), passed * self._cores, int(lengths.sum()))
        parts["tokenization"] = tokenization * kept / len(texts)
        total, (seconds, cpu_seconds) = sum(parts.values()), (min(column) for column in zip(*times[1:], strict=True))
        least = flops / self.rate.flops_per_s
        return {
            "texts": len(texts),
            "tokens": round(float(lengths.mean()), 1),
            "seconds": round(seconds, 6),
            "matrix_share_percent": round(100 * least / seconds, 1),
            "cpu_share_percent": round(100 * least * self._cores / cpu_seconds, 1),
            "parts": {name: round(100 * value / total, 2) for name, value in parts.items()},
        }

    def _batches(self, sequences: Sequences) -> list[Batch]:
        found: list[list[int]] = [[]]
        for index, length in enumerate(sequences.lengths):
            used = sum(sequences.lengths[other] for other in found[-1])
            if found[-1] and (used + length > self.info.batch_tokens or len(found[-1]) == _MOST_TEXTS):
                found.append([])
            found[-1].append(index)
        batches = []
        for number, group in enumerate(found[: _BATCHES_PER_CORE * self._cores]):
            part = sequences.take(group)
            lengths = np.array(part.lengths, dtype=np.int32)
            marks = None if part.marks is None else np.array(part.marks, dtype=np.int32)
            batches.append(Batch(number, np.concatenate(part.ids), lengths, marks))
        return batches


def main() -> int:
    """Run the program, and return its exit code."""
    wanted = json.load(sys.stdin)
    profiler = _Profiler(Path(sys.argv[1]), wanted["engine"])
    given = [profiler.texts(wanted["words"], *each) for each in wanted["grid"]]
    points = [profiler.point(texts) for texts in [*given, *([wanted["texts"]] if wanted["texts"] else [])]]
    precision, rate = profiler.info.precision.effective, asdict(profiler.rate)
    json.dump({"precision": precision, "matrix_rate": rate, "points": points}, sys.stdout)
    return 0


if __name__ == "__main__":
    exit_with(main)
