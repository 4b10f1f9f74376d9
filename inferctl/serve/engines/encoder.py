"""The engine for text encoders of transformers: packed if that gives equal vectors, else padded after sorting."""

from __future__ import annotations

import logging
import math
import platform
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from inferctl import model
from inferctl.errors import InferctlError, NotReadyError
from inferctl.serve import embedding_config
from inferctl.serve.engine_process import memory
from inferctl.serve.engine_process.engine_protocol import (
    MIN_BATCH_TOKENS,
    Batch,
    BatchResult,
    DeviceInfo,
    EngineConfig,
    EngineInfo,
    PrecisionInfo,
    Tokens,
    Vectors,
    finite_rows,
)
from inferctl.serve.engines import device as devices
from inferctl.serve.engines import int8, onednn, packed, plain
from inferctl.serve.tokenizer_pool import TokenizerPool

log = logging.getLogger("inferctl.engine")

# On a CPU larger batches only add latency: above about 1,000 tokens per core the throughput is constant, and it falls
# when the caches overflow.
_CORE_BATCH_TOKENS = 1024
# If a batch has several threads, it is split into one part per thread of at least this many tokens. Parts do not wait
# for each other, unlike the threads of one matrix product. On two busy cores this is 1.4 times faster than two threads
# per product, and steady under other load.
_CORE_PART_TOKENS = 64
# A batch gets twice the threads if a text is then at least this many times faster; else more batches run at a time.
_MIN_SPEEDUP = 1.4
_TYPICAL_TOKENS = 64
# The largest share of padding in a padded sub-batch.
_MAX_PADDING = 0.15
# Larger models are not loaded a second time for the comparison with fp32.
_MAX_CHECKED_PARAMETERS = 1_500_000_000
# Lowest cosine between packed texts and the same texts in isolation. A text that attends to its neighbors is far below.
# LLM.int8 depends on them a little.
_MIN_COSINE_ISOLATED = 0.995
# Lowest cosine to fp32, and of packed to padded in the same format.
_MIN_COSINE = {"fp32": 0.99999, "bf16": 0.99, "fp16": 0.999, "int8": 0.95}

CHECK_TEXTS = (
    "ok",
    "Which river flows through Vienna?",
    "Padding-free inference puts all sequences of a batch end to end, and each of them attends to itself alone.",
    "El veloz murciélago hindú comía feliz cardillo y kiwi; la cigüeña tocaba el saxofón.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)",
    "机器学习模型把文本变成向量。",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Invoice 4711, due 30 days after receipt, total 1,234.56 EUR. " * 40,
)


class EncoderEngine:
    """One model on one device in one precision."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._model: Any = None
        self._kind = "cuda"  # of the device; before it is detected, only a GPU can run out of memory

    def load(self) -> EngineInfo:
        """Load, compare with fp32 and warm up. Raises `InferctlError`, also for insufficient memory."""
        try:
            return self._start()
        except InferctlError:
            raise
        except Exception as error:
            if not memory.is_insufficient(error):
                raise
            raise NotReadyError(
                f"insufficient memory to load the model: {memory.summary(error)}", self._more_memory()
            ) from error

    def _start(self) -> EngineInfo:
        """Do what `load` does, with the errors that torch raises."""
        self._folder = folder = model.find(self._config.model)
        self._embedding = embedding_config.read(folder.path, self._config.max_input_tokens)
        self._device, info, traits = devices.detect(self._config.device)
        self._kind = info.kind
        precision, self._dtype = devices.choose(self._config.precision, traits)
        on_cpu = info.kind == "cpu"
        cores = max(1, (info.threads or 1) // self._config.engines)
        self._pool: ThreadPoolExecutor | None = None
        self._threads, self._batch_tokens = cores, self._config.max_batch_tokens
        capability = traits.compute_capability or (0, 0)
        self._varlen = info.kind == "cuda" and capability >= (8, 0) and self._dtype != torch.float32
        previous = EngineInfo.from_json(self._config.previous_info) if self._config.previous_info else None
        if previous and _same_device(previous.device, info) and previous.precision == precision:
            return self._load_unchecked(previous, folder.path, precision, cores)
        sequences = self._check_sequences(folder.path)
        expected, check = self._reference(folder, sequences)
        attention, reason = self._load_checked(folder.path, precision, info.kind, sequences, expected)
        vectors = self._embed(sequences)
        cosines = _cosines(vectors, expected) if expected is not None else None
        inaccurate = _accuracy_warning(vectors, expected, precision)
        parallel = 1
        if on_cpu:
            parallel = cores // self._choose_threads(cores)
            self._divide_cores(cores, parallel)
        lowered = self._warm_up(parallel)
        unused = devices.unused_gpu(self._config.device)
        return EngineInfo(
            dimensions=int(vectors.shape[1]),
            attention=attention,
            attention_reason=reason,
            precision=precision,
            device=info,
            batch_tokens=self._batch_tokens,
            parallel=parallel,
            cosine_min=None if cosines is None else float(cosines.min()),
            cosine_mean=None if cosines is None else float(cosines.mean()),
            cosine_limit=None if cosines is None else _MIN_COSINE[precision.effective],
            check=check,
            warnings=[warning for warning in (unused, inaccurate, lowered) if warning],
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )

    def _load_unchecked(self, previous: EngineInfo, folder: Path, precision: PrecisionInfo, cores: int) -> EngineInfo:
        """Load without the checks, with the results of an earlier engine, because clients wait for a restart."""
        self._load(folder, precision, packed.NAME if previous.attention == "packed" else None)
        if self._device.type == "cpu":
            self._divide_cores(cores, previous.parallel)
        self._batch_tokens = min(self._batch_tokens, previous.batch_tokens)
        if lowered := self._warm_up(previous.parallel):
            log.warning(lowered)
            return replace(previous, batch_tokens=self._batch_tokens, warnings=[*previous.warnings, lowered])
        return previous

    def _more_memory(self) -> str:
        """Return the hint of an error about insufficient memory."""
        if self._kind == "cpu":
            return "free memory on this machine, or raise the memory limit of the container"
        return "free memory on the GPU (`nvidia-smi` lists its processes), or use a larger one"

    def _divide_cores(self, cores: int, parallel: int) -> None:
        """Divide the cores of a CPU between `parallel` batches at a time."""
        self._threads = threads = cores // parallel
        self._pool = _single_threads(cores) if threads > 1 else None
        self._batch_tokens = min(self._batch_tokens, _CORE_BATCH_TOKENS * threads)

    def run(self, batch: Batch) -> BatchResult:
        """Return the vectors of a batch. The calling thread uses the threads of one batch."""
        started = time.perf_counter()
        sequences = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
        vectors = self._embed(sequences)
        return BatchResult(batch.id, vectors, finite_rows(vectors), time.perf_counter() - started)

    def close(self) -> None:
        """Stop the threads and release the weights."""
        if self._pool is not None:
            self._pool.shutdown()
        self._model = None

    def _check_sequences(self, folder: Path) -> list[Tokens]:
        pool = TokenizerPool(folder, self._embedding, threads=1)
        sequences = pool.encode_now(CHECK_TEXTS, truncate=True)
        pool.close()
        return sequences

    def _reference(self, folder: model.ModelFolder, sequences: list[Tokens]) -> tuple[Vectors | None, str]:
        """Return the fp32 vectors to compare with, None if the model is too large, and a description of the check."""
        if folder.parameters > _MAX_CHECKED_PARAMETERS:
            return None, f"not compared with fp32: {folder.parameters / 1e9:.1f} billion parameters"
        vectors = plain.embed(plain.load_model(folder.path), sequences, self._embedding)
        return vectors, f"{len(sequences)} texts compared with padded fp32"

    def _load_checked(
        self, folder: Path, precision: PrecisionInfo, kind: str, sequences: list[Tokens], expected: Vectors | None
    ) -> tuple[str, str]:
        """Load the model, packed if that gives equal vectors, else padded. Return the attention path and its reason."""
        if kind == "cuda" and not self._varlen:
            self._load(folder, precision, None)
            return "padded", "variable-length attention needs compute capability 8.0 and a 16-bit format"
        if expected is None:  # compare with padding in the same format instead
            self._load(folder, precision, None)
            expected = self._embed(sequences)
        try:
            self._load(folder, precision, packed.NAME)
            batched = self._embed(sequences)
            isolated = np.concatenate([self._embed([s]) for s in sequences])
        except InferctlError:
            raise
        except packed.UnsupportedError as error:
            reason = str(error)
        except Exception as error:  # architectures reject packing with various errors; padding works for all
            if memory.is_insufficient(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            limit = _MIN_COSINE[precision.effective]
            independent = bool(_cosines(batched, isolated).min() >= _MIN_COSINE_ISOLATED)
            if independent and _cosines(batched, expected).min() >= limit:
                return "packed", "no padding; equals the padded result"
            # Either packing is wrong, or the format is inaccurate. Padding in the same format shows which.
            self._load(folder, precision, None)
            padded = self._embed(sequences)
            if independent and _cosines(batched, padded).min() >= limit:
                self._load(folder, precision, packed.NAME)
                return "packed", f"no padding; equals the padded result in {precision.effective}"
            worst = np.concatenate([_cosines(batched, isolated), _cosines(batched, padded)]).min()
            reason = f"packed differs from padded (cosine {worst:.4f})"
        log.warning("packed attention is not used: %s", reason)
        if self._model is None or self._packed:
            self._load(folder, precision, None)
        return "padded", f"sorted by length; {reason}"

    def _load(self, folder: Path, precision: PrecisionInfo, attention: str | None) -> None:
        self._model = None  # free the memory before it is needed again
        if attention == packed.NAME:
            packed.register()
        loaded = plain.load_model(folder, self._dtype, attention)
        self._pad_rows = self._device.type == "cpu" and (precision.effective == "int8" or _native_bf16(precision))
        if precision.effective == "int8" and self._device.type == "cuda":
            int8.quantize(loaded)
        elif self._pad_rows:
            onednn.pack(loaded, int8=precision.effective == "int8")
        self._model = loaded.to(self._device)
        self._packed = attention == packed.NAME
        # In fp32 the fused attention kernel is faster.
        self._bucketed = self._dtype if self._device.type == "cpu" and self._dtype == torch.bfloat16 else None
        embeddings = getattr(loaded, "embeddings", None)
        # RoBERTa-like models number positions from the padding index + 1.
        offset = hasattr(embeddings, "create_position_ids_from_input_ids")
        self._first_position = int(embeddings.padding_idx) + 1 if offset and embeddings is not None else 0
        self._padding_id = int(loaded.config.pad_token_id or 0)

    def _choose_threads(self, cores: int) -> int:
        """Return the threads per batch: measured with one text of typical length, at the current load of the cores."""
        text = [np.full(min(self._embedding.max_tokens, _TYPICAL_TOKENS), 5, dtype=np.int32)]
        chosen, seconds = 1, math.inf
        for threads in (1 << bit for bit in range(cores.bit_length())):
            torch.set_num_threads(threads)
            times = []
            for _ in range(8):
                started = time.perf_counter()
                self._forward(text)
                times.append(time.perf_counter() - started)
            if (median := statistics.median(times[2:])) * _MIN_SPEEDUP > seconds:
                break
            chosen, seconds = threads, median
        torch.set_num_threads(chosen)
        return chosen

    def _set_threads(self) -> None:
        """Set torch's number of threads, which torch stores per calling thread."""
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _warm_up(self, parallel: int) -> str | None:
        """Run `parallel` batches of the largest size and a small one, so that no request waits for one-time work.

        Halves the batch limit until memory is sufficient, and returns a warning if it did. Raises `NotReadyError` if
        memory is insufficient for the smallest limit.
        """
        configured = self._batch_tokens
        while message := self._run_largest(parallel):
            if self._batch_tokens <= MIN_BATCH_TOKENS:
                raise NotReadyError(
                    f"insufficient memory for a batch of {self._batch_tokens} tokens: {message}",
                    f"{self._more_memory()}; `serve.max_batch_tokens` was lowered to {self._batch_tokens}, the minimum",
                )
            self._batch_tokens = max(MIN_BATCH_TOKENS, self._batch_tokens // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if self._batch_tokens == configured:
            return None
        limit = self._batch_tokens
        warning = (
            f"insufficient memory for batches of {configured} tokens: the limit is {limit} (serve.max_batch_tokens)"
        )
        return warning if limit >= self._embedding.max_tokens else f"{warning}; longer texts can get 503"

    def _run_largest(self, parallel: int) -> str | None:
        """Run the batches of `_warm_up`. Return the error message if memory is insufficient, else None."""
        longest = min(self._embedding.max_tokens, self._batch_tokens)
        text = np.full(longest, 5, dtype=np.int32)
        try:
            with ThreadPoolExecutor(parallel) as pool:
                for _ in pool.map(self._embed, [[text] * max(1, self._batch_tokens // longest)] * parallel):
                    pass
            self._embed([text])
        except Exception as error:
            if not memory.is_insufficient(error):
                raise
            return memory.summary(error)
        return None

    def _embed(self, sequences: list[Tokens]) -> Vectors:
        """Return float32 [sequences, dimensions], in the given order, computed on the threads of one batch."""
        self._set_threads()
        parts = min(self._threads, sum(map(len, sequences)) // _CORE_PART_TOKENS, len(sequences))
        if self._pool is None or parts < 2:
            return self._forward(sequences)
        split = _balanced([len(s) for s in sequences], parts)
        rows = np.concatenate(list(self._pool.map(self._forward, [[sequences[i] for i in part] for part in split])))
        out = np.empty_like(rows)
        out[np.concatenate(split)] = rows
        return out

    @torch.inference_mode()
    def _forward(self, sequences: list[Tokens]) -> Vectors:
        """Do what `_embed` does, on the calling thread."""
        lengths = np.array([len(s) for s in sequences])
        order = np.argsort(-lengths, kind="stable")
        ordered = [sequences[i] for i in order]
        rows = (
            self._packed_rows(ordered)
            if self._packed
            else torch.cat([self._padded_rows(part) for part in self._split(ordered)])
        )
        if self._embedding.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        out = np.empty(rows.shape, dtype=np.float32)
        out[order] = rows.cpu().numpy()
        return out

    def _packed_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = [len(s) for s in sequences]
        total = sum(lengths)
        padding_rows = onednn.padded_rows(total) - total if self._pad_rows else 0
        padding = np.full(padding_rows, self._padding_id, dtype=np.int64)
        tokens = torch.from_numpy(np.concatenate([*sequences, padding], dtype=np.int64)).to(
            self._device, non_blocking=True
        )
        within = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(padding_rows, dtype=np.int64)])
        positions = torch.from_numpy(within + self._first_position).to(self._device, non_blocking=True)
        layout = packed.layout(
            lengths, self._device, varlen=self._varlen, bucketed=self._bucketed, padding_rows=padding_rows
        )
        states = self._model(input_ids=tokens[None], position_ids=positions[None], layout=layout).last_hidden_state
        hidden = states[0, :total]
        counts = torch.tensor(lengths, device=self._device)
        ends = counts.cumsum(0)
        if self._embedding.pooling == "mean":
            # Summed in fp32, because the 8 bits of bf16 are too few for a long sum.
            return torch.segment_reduce(hidden.float(), "mean", lengths=counts, unsafe=True)
        chosen: torch.Tensor = hidden[ends - counts if self._embedding.pooling == "cls" else ends - 1]
        return chosen.float()

    def _padded_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = torch.tensor([len(s) for s in sequences])
        tokens = torch.full((len(sequences), int(lengths.max())), self._padding_id)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
        tokens, mask, lengths = tokens.to(self._device), mask.to(self._device), lengths.to(self._device)
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        if self._embedding.pooling == "mean":
            summed: torch.Tensor = (hidden * mask[..., None]).sum(dim=1)
            return summed / lengths[:, None]
        position = torch.zeros_like(lengths) if self._embedding.pooling == "cls" else lengths - 1
        chosen: torch.Tensor = hidden[torch.arange(len(sequences), device=self._device), position]
        return chosen

    def _split(self, ordered: list[Tokens]) -> Iterator[list[Tokens]]:
        """Split sequences, sorted by falling length, into parts with little padding and at most the batch limit.

        The limit includes padding.
        """
        part: list[Tokens] = []
        used = 0
        for ids in ordered:
            area = (len(part) + 1) * (len(part[0]) if part else len(ids))
            if part and (area > self._batch_tokens or used + len(ids) < (1 - _MAX_PADDING) * area):
                yield part
                part, used = [], 0
            part.append(ids)
            used += len(ids)
        yield part


def _same_device(a: DeviceInfo, b: DeviceInfo) -> bool:
    """Return whether two devices compute the same vectors, also if they are two GPUs of one machine."""
    return (a.kind, a.name, a.compute_capability) == (b.kind, b.name, b.compute_capability)


def _native_bf16(precision: PrecisionInfo) -> bool:
    return precision.effective == "bf16" and precision.level == "native"


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool of `count` threads, in which torch uses one thread each. torch stores that per calling thread."""
    return ThreadPoolExecutor(count, thread_name_prefix="core", initializer=torch.set_num_threads, initargs=(1,))


def _balanced(lengths: list[int], parts: int) -> list[list[int]]:
    """Return the indices of `lengths` in `parts` groups of about equal sums.

    The longest come first, each goes to the group with the smallest sum.
    """
    groups: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(index)
        loads[lightest] += lengths[index]
    return groups


def _accuracy_warning(vectors: Vectors, expected: Vectors | None, precision: PrecisionInfo) -> str | None:
    """Return a warning if `vectors` differ from `expected` (fp32) by more than the limit of this precision, else None.

    Raises `NotReadyError` for NaN or infinity.
    """
    effective = precision.effective
    if bad := int((~finite_rows(vectors)).sum()):
        message = f"the model returns NaN or infinity for {bad} of {len(vectors)} check texts in {effective}"
        if effective == "fp32" or (expected is not None and not finite_rows(expected).all()):
            raise NotReadyError(
                message if effective == "fp32" else f"{message}, and in fp32", "check the weights of the model"
            )
        wider = "`--precision fp32`" if effective == "bf16" else "`--precision bf16` or `--precision fp32`"
        raise NotReadyError(message, f"use {wider}, with a larger range of numbers")
    if expected is None or (lowest := float(_cosines(vectors, expected).min())) >= _MIN_COSINE[effective]:
        return None
    message = f"{effective} is inaccurate: cosine to fp32 {lowest:.5f}, expected at least {_MIN_COSINE[effective]}"
    if effective != "fp32":
        return f"{message}. `--precision fp32` avoids this"
    return f"{message}. `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0` turns TF32 off" if precision.tf32 else message


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    """Return the cosine of each row of `a` with the same row of `b`."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Vectors = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return cosines
