"""The engine of all encoder tasks, and of static embeddings: connects forward pass, checks, cores and warm-up."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import transformers

from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.models import model
from inferctl.models.flops import ModelFlops
from inferctl.reading import task_config
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.rows import Rows, finite_rows
from inferctl.serve.engine_process import failures, memory
from inferctl.serve.engine_process.engine_protocol import (
    Batch,
    BatchResult,
    DeviceInfo,
    EngineConfig,
    EngineInfo,
    PrecisionInfo,
    Prepare,
)
from inferctl.serve.engines import device as devices
from inferctl.serve.engines import flops, packed
from inferctl.serve.engines.checks import Checks
from inferctl.serve.engines.cores import Cores, choose_threads
from inferctl.serve.engines.cpu import BATCH_TOKENS_PER_CORE, idle_batches
from inferctl.serve.engines.forward import AnyForward, Forward, StaticForward
from inferctl.serve.engines.prepared import Sequences
from inferctl.serve.engines.warm_up import LOWERED, warm_up

log = logging.getLogger("inferctl.engine")

PADDED = "attention is padded, which is slower than packed"  # the start of the warning


class EncoderEngine:
    """One model on one device in one precision."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._compute: AnyForward | Cores | None = None
        self._idle_compute: Cores | None = None
        self.prepare: Prepare | None = None
        self._flops = ModelFlops(0.0, 0.0)
        self._shared_starts = deque[tuple[int, int]]()
        self._memory_hint = "free memory on the GPU (`nvidia-smi` lists its processes), or use a larger one"

    def load(self, on_phase: Callable[[str], None] = lambda _: None) -> EngineInfo:
        """Load, compare with fp32 and warm up. Raises `InferctlError`, also for insufficient memory.

        Architectures and odd values in `config.json` fail in any way, at any place: all that is a `UsageError`.

        If the configuration has the info of an earlier engine on an equal device, the comparison is skipped, because
        clients wait for the restart.
        """
        try:
            return self._load(on_phase)
        except InferctlError:
            raise
        except Exception as error:
            if failures.out_of_memory(error):
                message = f"insufficient memory to load the model: {failures.summary(error)}"
                raise NotReadyError(message, self._memory_hint) from error
            # It ran before, the GPU is gone, or the API process ended: not a fault of the model.
            if self._config.previous_info or failures.breaks_context(error) or isinstance(error, OSError):
                raise
            name = model.find(self._config.model).architecture
            raise UsageError(
                f"{name} cannot be computed: {type(error).__name__}: {failures.summary(error)}",
                "correct config.json if it has an odd value, use a model of another architecture, or try "
                "`--precision fp32`",
            ) from error

    def _load(self, on_phase: Callable[[str], None]) -> EngineInfo:
        """Do what `load` does, with the errors that torch raises."""
        config = self._config
        folder = model.find(config.model)
        settings = task_config.read(config.task, folder.path, config.max_input_tokens)
        device, device_info, traits = devices.detect(config.device)
        static = settings if isinstance(settings, EmbeddingConfig) and settings.static is not None else None
        precision, dtype = devices.choose("fp32" if static else config.precision, traits)
        if static:
            reason = "a mean of static embeddings is as fast in fp32 as in any other precision"
            precision = replace(precision, requested=config.precision, reason=reason)
        on_cpu, cores = device_info.kind == "cpu", max(1, (device_info.threads or 1) // config.engines)
        if on_cpu:
            self._memory_hint = "free memory on this machine, or raise the memory limit of the container"
        else:
            devices.avoid_cudnn()
        no_kernel = None if on_cpu else packed.missing_kernel(traits.compute_capability, dtype)
        varlen = not on_cpu and no_kernel is None
        load_model: Callable[[int], AnyForward]
        load_model = partial(Forward, folder.path, settings, device, dtype, precision, varlen=varlen)
        if static:
            load_model = partial(StaticForward, folder.path, static, device)
        if on_cpu:
            memory.check(folder, precision.effective)
        info = EngineInfo.from_json(config.previous_info) if config.previous_info else None
        if info and devices.equal(info.device, device_info) and info.precision == precision:
            forward = load_model(info.batch_tokens)
            if isinstance(forward, Forward):
                forward.pack(info.attention == "packed")
        else:
            on_phase("computing the check texts in fp32")
            # Before the model is loaded: memory may be insufficient for both.
            check = Checks(folder, settings, self._memory_hint)
            on_phase(f"loading the weights in {precision.effective}")
            forward = load_model(config.max_batch_tokens)
            check.check_vocabulary(forward.vocabulary_size)
            if isinstance(forward, Forward) and forward.query_vocabulary_size is not None:
                check.check_vocabulary(forward.query_vocabulary_size)
            on_phase("comparing with fp32")
            info = self._choose_settings(check, forward, no_kernel, device_info, precision, dtype, cores)
        if isinstance(forward, Forward) and not on_cpu:
            on_phase("capturing CUDA graphs")
            info = replace(info, graphs=forward.capture_graphs())
        self._compute = run = Cores(forward, cores, info.parallel) if on_cpu else forward
        self._idle_compute = Cores(forward, cores, cores) if on_cpu else None
        if not on_cpu and isinstance(forward, Forward):
            self.prepare = partial(self._prepare, forward)
        on_phase("warming up")
        limit, lowered = warm_up(run, info.batch_tokens, settings.max_tokens, info.parallel, self._memory_hint)
        forward.batch_tokens = limit
        if lowered:
            log.warning(lowered)
            # Only the latest, also after restarts with less and less memory.
            kept = [warning for warning in info.warnings if not warning.startswith(LOWERED)]
            info = replace(info, batch_tokens=limit, warnings=[*kept, lowered])
        self._flops = info.flops or self._flops
        forward.shared_starts.clear()  # of the check texts
        self._shared_starts = forward.shared_starts
        return info

    def _choose_settings(
        self,
        check: Checks,
        forward: AnyForward,
        no_kernel: str | None,
        device: DeviceInfo,
        precision: PrecisionInfo,
        dtype: torch.dtype,
        cores: int,
    ) -> EngineInfo:
        """Choose attention and threads, compare with fp32, and return the result."""
        padded = None
        check.sizes = dimensions, token_dimensions = forward.sizes()
        if isinstance(forward, StaticForward):
            reason, results = "static embeddings have none", check.run(forward)
        elif no_kernel:
            reason, results = f"sorted by length; {no_kernel}", check.run(forward)
            padded = no_kernel if no_kernel.startswith(packed.TOO_OLD) else None
        else:
            reason, results, padded = check.choose_attention(forward, precision)
        if padded:
            padded = f"{PADDED}: {padded}"
        attention = "none" if isinstance(forward, StaticForward) else "packed" if forward.packed else "padded"
        fidelity, inaccurate = check.compare(results, precision, self._config.allow_inaccurate)
        batch_tokens, parallel, idle_parallel = self._config.max_batch_tokens, 1, 0
        if device.kind == "cpu":
            threads = self._config.batch_threads or choose_threads(forward, cores)
            batch_tokens, parallel = min(batch_tokens, BATCH_TOKENS_PER_CORE * threads), cores // threads
            idle_parallel = idle_batches(cores)
        unused_gpu = devices.unused_gpu(self._config.device)
        if isinstance(results, np.ndarray) and not dimensions:
            dimensions = results.shape[1]  # logits
        return EngineInfo(
            dimensions=dimensions,
            token_dimensions=token_dimensions,
            attention=attention,
            attention_reason=reason,
            precision=precision,
            device=device,
            batch_tokens=batch_tokens,
            parallel=parallel,
            idle_parallel=idle_parallel,
            vocabulary_size=forward.vocabulary_size,
            causal=check.causal,
            flops=check.flops,
            matrix_rate=flops.matrix_rate(device, precision, dtype, cores) if check.flops else None,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            warnings=[warning for warning in (unused_gpu, padded, inaccurate, forward.warning) if warning],
            **fidelity,
        )

    def run(self, batch: Batch) -> BatchResult:
        """Return the vectors of a batch, or the logits of its sequences ([sequences, labels]).

        The calling thread uses the threads of one batch.
        """
        compute = self._idle_compute if batch.idle else self._compute
        assert compute is not None, "`load` comes first"
        # A batch for idle cores runs on this thread only, with pauses.
        clock = time.thread_time if batch.idle else time.perf_counter
        started = clock()
        rows = compute(_sequences(batch))
        seconds = clock() - started
        return BatchResult(batch.id, rows, finite_rows(rows), seconds, self._computed(batch))

    def _prepare(self, forward: Forward, batch: Batch) -> Callable[[], Callable[[], tuple[Rows, float]]]:
        prepared = forward.prepare(_sequences(batch))

        def launch() -> Callable[[], tuple[Rows, float]]:
            launched = forward.launch(prepared)
            return lambda: (launched.rows(), self._computed(batch))

        return launch

    def _computed(self, batch: Batch) -> float:
        """Return the FLOP of a batch that is done. Of several at a time only the sum is right, which is what counts.

        It is not negative, because a counter sums it up: common starts of another, larger batch wait for that one.
        """
        computed = self._flops.batch(batch.lengths)
        with contextlib.suppress(IndexError):  # other threads take from it, too
            while True:
                repeats, tokens = start = self._shared_starts.popleft()
                saved = repeats * (self._flops.flop(tokens) - self._flops.per_text)
                if saved > computed:
                    self._shared_starts.appendleft(start)
                    break
                computed -= saved
        return computed


def _sequences(batch: Batch) -> Sequences:
    marks = None if batch.marks is None else batch.marks.tolist()
    return Sequences(np.split(batch.tokens, np.cumsum(batch.lengths)[:-1]), marks)
