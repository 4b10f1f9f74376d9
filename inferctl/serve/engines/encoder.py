"""Text encoders out of transformers: packed where that is exact, else padded after sorting by length."""

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
from inferctl.serve import memory, recipe
from inferctl.serve.engines import device as devices
from inferctl.serve.engines import int8, onednn, packed, plain
from inferctl.serve.tokenise import TokenizerPool
from inferctl.serve.types import (
    Batch,
    BatchResult,
    EngineConfig,
    EngineInfo,
    PrecisionInfo,
    Tokens,
    Vectors,
    finite_rows,
)

log = logging.getLogger("inferctl.engine")

# On a CPU larger batches only add latency: throughput is flat from about a thousand tokens a core on and falls when the caches overflow.
_CORE_BATCH_TOKENS = 1024
# Where a batch gets several threads it is cut into a part for each, once a part has this many tokens: parts never wait for one another as the
# threads of one matrix product do. Two busy cores: 1.4 times faster than two threads a product, and steady beside other load.
_CORE_PART_TOKENS = 64
# A text gets twice the threads when that makes it this much faster at least; else the cores run more batches at a time.
_WORTH_TWICE_THE_THREADS = 1.4
_TYPICAL_TOKENS = 64
# A padded sub-batch may hold at most this share of padding before it is split.
_MAX_PADDING = 0.15
# Weights above this many parameters are not held twice just to compare.
_MAX_CHECKED_PARAMETERS = 1_500_000_000
# Lowest cosine of packed texts to each text alone: a text that sees its neighbors falls far below, and LLM.int8
# depends on them a little.
_ALONE = 0.995
# Lowest cosine to fp32, and of packed to padded in the same format.
_SAME = {"fp32": 0.99999, "bf16": 0.99, "fp16": 0.999, "int8": 0.95}

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
        self._kind = "cuda"  # of the device; only a GPU can lack memory before it is known
        self._plain: Any = None  # fp32 weights, once a batch had to be exact

    def load(self) -> EngineInfo:
        """Load, check against fp32 and warm up. Raises `InferctlError`, also if memory is insufficient."""
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
        """`load`, with errors as torch raises them."""
        self._folder = folder = model.find(self._config.model)
        self._recipe = recipe.read(folder.path, self._config.max_input_tokens)
        self._device, info, traits = devices.detect(self._config.device)
        self._kind = info.kind
        precision, self._dtype = devices.choose(self._config.precision, traits)
        on_cpu = info.kind == "cpu"
        cores = info.threads or 1
        self._pool: ThreadPoolExecutor | None = None
        self._threads, self._batch_tokens = cores, self._config.max_batch_tokens
        self._varlen = info.kind == "cuda" and traits.compute_capability >= (8, 0) and self._dtype != torch.float32  # type: ignore[operator]
        known = EngineInfo.from_json(self._config.known) if self._config.known else None
        if known and (known.device, known.precision) == (info, precision):
            return self._load_known(known, folder.path, precision, cores)
        sequences = self._check_sequences(folder.path)
        expected, why = self._reference(folder, sequences)
        attention, reason = self._load_checked(folder.path, precision, info.kind, sequences, expected)
        vectors = self._embed(sequences)
        cosines = _cosines(vectors, expected) if expected is not None else None
        inaccurate = _judge(vectors, expected, precision)
        parallel = 1
        if on_cpu:
            parallel = cores // self._choose_threads(cores)
            self._share_out(cores, parallel)
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
            cosine_limit=None if cosines is None else _SAME[precision.effective],
            check=why,
            warnings=[warning for warning in (unused, inaccurate, lowered) if warning],
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )

    def _load_known(self, known: EngineInfo, folder: Path, precision: PrecisionInfo, cores: int) -> EngineInfo:
        """`load` without what an earlier engine found: clients wait for this one."""
        self._load(folder, precision, packed.NAME if known.attention == "packed" else None)
        if self._device.type == "cpu":
            self._share_out(cores, known.parallel)
        self._batch_tokens = min(self._batch_tokens, known.batch_tokens)
        if lowered := self._warm_up(known.parallel):
            log.warning(lowered)
            return replace(known, batch_tokens=self._batch_tokens, warnings=[*known.warnings, lowered])
        return known

    def _more_memory(self) -> str:
        """The hint of an error that says that memory is insufficient."""
        if self._kind == "cpu":
            return "free memory on this machine, or raise the memory limit of the container"
        return "free memory on the GPU (`nvidia-smi` lists its processes), or use a larger one"

    def _share_out(self, cores: int, parallel: int) -> None:
        """Share the cores of a CPU out among so many batches at a time."""
        self._threads = threads = cores // parallel
        self._pool = _single_threads(cores) if threads > 1 else None
        self._batch_tokens = min(self._batch_tokens, _CORE_BATCH_TOKENS * threads)

    def run(self, batch: Batch) -> BatchResult:
        """See `Engine.run`."""
        started = time.perf_counter()
        sequences = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
        vectors = self._exactly(sequences) if batch.exact else self._embed(sequences)
        return BatchResult(batch.id, vectors, finite_rows(vectors), time.perf_counter() - started)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._pool is not None:
            self._pool.shutdown()
        self._model = self._plain = None

    def _exactly(self, sequences: list[Tokens]) -> Vectors:
        """`_embed` in plain fp32 on the CPU, for what was not finite otherwise; its weights are loaded when first needed, and kept."""
        if self._folder.parameters > _MAX_CHECKED_PARAMETERS:
            return self._embed(sequences)
        self._take_threads()
        if self._plain is None:
            self._plain = plain.load_model(self._folder.path)
        return plain.embed(self._plain, sequences, self._recipe)

    def _check_sequences(self, folder: Path) -> list[Tokens]:
        pool = TokenizerPool(folder, self._recipe, threads=1)
        sequences = pool.encode_now(CHECK_TEXTS, truncate=True)
        pool.close()
        return sequences

    def _reference(self, folder: model.ModelFolder, sequences: list[Tokens]) -> tuple[Vectors | None, str]:
        if folder.parameters > _MAX_CHECKED_PARAMETERS:
            return None, f"not compared with fp32: {folder.parameters / 1e9:.1f} billion parameters"
        return plain.embed(
            plain.load_model(folder.path), sequences, self._recipe
        ), f"{len(sequences)} texts against padded fp32"

    def _load_checked(
        self, folder: Path, precision: PrecisionInfo, kind: str, sequences: list[Tokens], expected: Vectors | None
    ) -> tuple[str, str]:
        """Load the model packed if that is exact, else padded; returns the attention path and the reason for it."""
        if kind == "cuda" and not self._varlen:
            self._load(folder, precision, None)
            return "padded", "variable-length attention needs compute capability 8.0 and a 16-bit format"
        if expected is None:  # padding in the same format is what there is to compare with
            self._load(folder, precision, None)
            expected = self._embed(sequences)
        try:
            self._load(folder, precision, packed.NAME)
            together = self._embed(sequences)
            alone = np.concatenate([self._embed([s]) for s in sequences])
        except InferctlError:
            raise
        except packed.UnsupportedError as error:
            reason = str(error)
        except Exception as error:  # architectures reject packing in many ways; padding works for all of them
            if memory.is_insufficient(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            limit = _SAME[precision.effective]
            independent = bool(_cosines(together, alone).min() >= _ALONE)
            if independent and _cosines(together, expected).min() >= limit:
                return "packed", "no padding; equals the padded result"
            # Either packing is wrong, or the format loses too much. Padding in the same format shows which.
            self._load(folder, precision, None)
            padded = self._embed(sequences)
            if independent and _cosines(together, padded).min() >= limit:
                self._load(folder, precision, packed.NAME)
                return "packed", f"no padding; equals the padded result in {precision.effective}"
            worst = np.concatenate([_cosines(together, alone), _cosines(together, padded)]).min()
            reason = f"packed differs from padded (cosine {worst:.4f})"
        log.warning("packed attention is not used: %s", reason)
        if self._model is None or self._packed:
            self._load(folder, precision, None)
        return "padded", f"sorted by length; {reason}"

    def _load(self, folder: Path, precision: PrecisionInfo, attention: str | None) -> None:
        self._model = None  # let the memory go before it is needed again
        if attention == packed.NAME:
            packed.register()
        loaded = plain.load_model(folder, self._dtype, attention)
        self._fill = self._device.type == "cpu" and (precision.effective == "int8" or _native_bf16(precision))
        if precision.effective == "int8" and self._device.type == "cuda":
            int8.quantise(loaded)
        elif self._fill:
            onednn.pack(loaded, int8=precision.effective == "int8")
        self._model = loaded.to(self._device)
        self._packed = attention == packed.NAME
        # In fp32 the fused attention kernel is the faster one.
        self._bucketed = self._dtype if self._device.type == "cpu" and self._dtype == torch.bfloat16 else None
        embeddings = getattr(loaded, "embeddings", None)
        # RoBERTa and its kin count positions from the padding index on.
        numbered = hasattr(embeddings, "create_position_ids_from_input_ids")
        self._first_position = int(embeddings.padding_idx) + 1 if numbered and embeddings is not None else 0
        self._padding = int(loaded.config.pad_token_id or 0)

    def _choose_threads(self, cores: int) -> int:
        """Threads a batch: what one text of usual length is faster with, on the cores as they are now."""
        text = [np.full(min(self._recipe.max_tokens, _TYPICAL_TOKENS), 5, dtype=np.int32)]
        chosen, seconds = 1, math.inf
        for threads in (1 << bit for bit in range(cores.bit_length())):
            torch.set_num_threads(threads)
            times = []
            for _ in range(8):
                started = time.perf_counter()
                self._forward(text)
                times.append(time.perf_counter() - started)
            if (now := statistics.median(times[2:])) * _WORTH_TWICE_THE_THREADS > seconds:
                break
            chosen, seconds = threads, now
        torch.set_num_threads(chosen)
        return chosen

    def _take_threads(self) -> None:
        """Torch keeps their number for each calling thread."""
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _warm_up(self, parallel: int) -> str | None:
        """Run the largest batch as often as it may run at a time, and a small one: no request pays for first times.

        Halves the batch limit until memory is sufficient, and returns a warning then. Raises `NotReadyError`.
        """
        configured = self._batch_tokens
        while said := self._run_largest(parallel):
            if self._batch_tokens <= memory.SMALLEST_BATCH:
                raise NotReadyError(
                    f"insufficient memory for a batch of {self._batch_tokens} tokens: {said}",
                    f"{self._more_memory()}; a `serve.max_batch_tokens` of {self._batch_tokens} is already too large",
                )
            self._batch_tokens = max(memory.SMALLEST_BATCH, self._batch_tokens // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if self._batch_tokens == configured:
            return None
        limit = self._batch_tokens
        warning = (
            f"insufficient memory for batches of {configured} tokens: the limit is {limit} (serve.max_batch_tokens)"
        )
        return warning if limit >= self._recipe.max_tokens else f"{warning}; longer texts can get 503"

    def _run_largest(self, parallel: int) -> str | None:
        """Run the batches of `_warm_up`; returns what the device says if its memory is insufficient."""
        longest = min(self._recipe.max_tokens, self._batch_tokens)
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
        """float32 [sequences, dimensions], in the order given; spread over the threads that a batch has."""
        self._take_threads()
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
        """`_embed` on the calling thread."""
        lengths = np.array([len(s) for s in sequences])
        order = np.argsort(-lengths, kind="stable")
        ordered = [sequences[i] for i in order]
        rows = (
            self._packed_rows(ordered)
            if self._packed
            else torch.cat([self._padded_rows(part) for part in self._split(ordered)])
        )
        if self._recipe.normalize:
            rows = torch.nn.functional.normalize(rows, dim=1)
        out = np.empty(rows.shape, dtype=np.float32)
        out[order] = rows.cpu().numpy()
        return out

    def _packed_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = [len(s) for s in sequences]
        total = sum(lengths)
        filling = onednn.filled(total) - total if self._fill else 0
        rest = np.full(filling, self._padding, dtype=np.int64)
        tokens = torch.from_numpy(np.concatenate([*sequences, rest], dtype=np.int64)).to(
            self._device, non_blocking=True
        )
        within = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(filling, dtype=np.int64)])
        positions = torch.from_numpy(within + self._first_position).to(self._device, non_blocking=True)
        layout = packed.layout(lengths, self._device, varlen=self._varlen, bucketed=self._bucketed, filling=filling)
        states = self._model(input_ids=tokens[None], position_ids=positions[None], layout=layout).last_hidden_state
        hidden = states[0, :total]
        counts = torch.tensor(lengths, device=self._device)
        ends = counts.cumsum(0)
        if self._recipe.pooling == "mean":
            # Summed in fp32: bf16 keeps 8 bits, too few for a long sum.
            return torch.segment_reduce(hidden.float(), "mean", lengths=counts, unsafe=True)
        chosen: torch.Tensor = hidden[ends - counts if self._recipe.pooling == "cls" else ends - 1]
        return chosen.float()

    def _padded_rows(self, sequences: list[Tokens]) -> torch.Tensor:
        lengths = torch.tensor([len(s) for s in sequences])
        tokens = torch.full((len(sequences), int(lengths.max())), self._padding)
        for row, ids in enumerate(sequences):
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
        tokens, mask, lengths = tokens.to(self._device), mask.to(self._device), lengths.to(self._device)
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        if self._recipe.pooling == "mean":
            summed: torch.Tensor = (hidden * mask[..., None]).sum(dim=1)
            return summed / lengths[:, None]
        at = torch.zeros_like(lengths) if self._recipe.pooling == "cls" else lengths - 1
        chosen: torch.Tensor = hidden[torch.arange(len(sequences), device=self._device), at]
        return chosen

    def _split(self, ordered: list[Tokens]) -> Iterator[list[Tokens]]:
        """Cut sequences sorted by falling length into parts with little padding and at most the batch limit, padding counted."""
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


def _native_bf16(precision: PrecisionInfo) -> bool:
    return precision.effective == "bf16" and precision.level == "native"


def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads each compute alone; the thread count is torch's, per calling thread."""
    return ThreadPoolExecutor(count, thread_name_prefix="core", initializer=torch.set_num_threads, initargs=(1,))


def _balanced(lengths: list[int], parts: int) -> list[list[int]]:
    """Indices of `lengths` in `parts` groups of about equal sums: the longest first, each to the group with the least so far."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(index)
        loads[lightest] += lengths[index]
    return groups


def _judge(vectors: Vectors, expected: Vectors | None, precision: PrecisionInfo) -> str | None:
    """A warning if `vectors` are further from `expected` (fp32) than this precision should be, else None.

    Raises `NotReadyError` for NaN or infinity.
    """
    effective = precision.effective
    if bad := int((~finite_rows(vectors)).sum()):
        said = f"the model returns NaN or infinity for {bad} of {len(vectors)} check texts in {effective}"
        if effective == "fp32" or (expected is not None and not finite_rows(expected).all()):
            raise NotReadyError(
                said if effective == "fp32" else f"{said}, and in fp32", "check the weights of the model"
            )
        wider = "`--precision fp32`" if effective == "bf16" else "`--precision bf16` or `--precision fp32`"
        raise NotReadyError(said, f"use {wider}, which have the range that this model needs")
    if expected is None or (lowest := float(_cosines(vectors, expected).min())) >= _SAME[effective]:
        return None
    said = f"{effective} is inaccurate: cosine to fp32 {lowest:.5f}, at least {_SAME[effective]} is expected"
    if effective != "fp32":
        return f"{said}. `--precision fp32` avoids this"
    return f"{said}. `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0` turns TF32 off" if precision.tf32 else said


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    """Cosine of each row of `a` with the same row of `b`."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Vectors = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return cosines
