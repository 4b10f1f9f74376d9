"""Determines how a device runs a precision: natively, emulated or not at all.

This is the only place that decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# `weight-only`: fp8 in memory, 16-bit products. `unknown`: only vLLM decides, when it starts. Both: generation.
Level = Literal["native", "weight-only", "emulated", "unknown", "unsupported"]

_DTYPES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
# Model types that vLLM rejects in fp16 for numerical instability (vllm/config/model.py).
_WITHOUT_FP16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
# Formats of prepared checkpoints that vLLM no longer reads (QUANTIZATION_METHODS), or reads only on request.
_REMOVED_METHODS = frozenset({"bitsandbytes", "aqlm", "eetq", "hqq", "fbgemm_fp8", "fp_quant"})


@dataclass(frozen=True)
class DeviceTraits:
    """The facts that decide which precisions run: compute capability of a GPU, or instruction flags of a CPU."""

    kind: Literal["cuda", "cpu"]
    compute_capability: tuple[int, int] | None = None
    cpu_flags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Support:
    """How a device runs a precision, with the reason in one line and, for an unsupported one, what to do instead."""

    level: Level
    reason: str
    hint: str | None = None


@dataclass(frozen=True)
class Quantization:
    """How the weights of a prepared checkpoint are stored.

    `method` is the `quant_method` of its `config.json`, such as `gptq`. `weights` is their format, such as int8, fp8 or
    int4; None if unknown.
    """

    method: str
    weights: str | None

    @property
    def name(self) -> str:
        """The format in words: `int8 (compressed-tensors)`."""
        return f"{self.weights} ({self.method})" if self.weights else self.method


@dataclass(frozen=True)
class Checkpoint:
    """The facts of a generative model that decide its precision. `dtype` is fp32, fp16 or bf16; None if not stated."""

    model_type: str | None = None
    dtype: str | None = None
    quantization: Quantization | None = None


def capability_of(text: str) -> tuple[int, int]:
    """Parse a compute capability: `"8.6"` -> `(8, 6)`. Raises `ValueError`."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise ValueError(f"{text!r} is not a compute capability such as 8.6")
    return int(major), int(minor)


def support(precision: str, device: DeviceTraits) -> Support:
    """Return how `device` runs `precision` for embeddings and reranking: natively, emulated or not at all."""
    if precision == "fp32":
        return Support("native", "fp32 runs everywhere")
    if precision == "fp8":
        return Support("unsupported", "fp8 is for generation; embeddings and reranking do not have it", "use auto")
    if device.kind == "cuda":
        return _cuda_support(precision, device.compute_capability or (0, 0))
    return _cpu_support(precision, device.cpu_flags)


def best_precision(device: DeviceTraits) -> str:
    """Return what `auto` selects on `device`: bf16 if native, else fp16 if native on a GPU, else fp32."""
    if support("bf16", device).level == "native":
        return "bf16"
    return "fp16" if device.kind == "cuda" and support("fp16", device).level == "native" else "fp32"


def checkpoint_of(config: Mapping[str, Any]) -> Checkpoint:
    """Return the facts of a generative model from its `config.json`, also if a multimodal one nests them."""
    text = config.get("text_config")
    nested: Mapping[str, Any] = text if isinstance(text, Mapping) else {}

    def first(*names: str) -> Any:
        return next((section[name] for section in (config, nested) for name in names if section.get(name)), None)

    stored = first("quantization_config", "compression_config")
    return Checkpoint(
        first("model_type"),
        _DTYPES.get(str(first("dtype", "torch_dtype")).removeprefix("torch.")),
        _quantization(stored) if isinstance(stored, Mapping) else None,
    )


@dataclass(frozen=True)
class GenerationPrecision:
    """How vLLM runs a model: the precision, how the device runs it, and the options of vLLM for it.

    `dtype`: format of activations and KV cache (fp32, fp16 or bf16), for `--dtype`. `quantization`: value of
    `--quantization`, None without the option.
    """

    effective: str
    support: Support
    dtype: str
    quantization: str | None


def choose_generation(
    requested: str, device: DeviceTraits, checkpoint: Checkpoint = Checkpoint()
) -> GenerationPrecision:
    """Return how vLLM runs the precision `requested` (`auto` or a name), also if the device does not support it."""
    effective = best_generation_precision(device, checkpoint) if requested == "auto" else requested
    found = generation_support(effective, device, checkpoint)
    dtype = generation_dtype(effective, device, checkpoint)
    quantization = None
    if effective == "fp8" and checkpoint.quantization is None:
        # The CPU build lacks the operator for one scale per tensor. Weight-only GPUs reject scales per channel.
        quantization = "fp8_per_channel" if device.kind == "cpu" else "fp8_per_tensor"
    return GenerationPrecision(effective, found, dtype, quantization)


def generation_support(precision: str, device: DeviceTraits, checkpoint: Checkpoint = Checkpoint()) -> Support:
    """Return how vLLM runs `precision` on `device`.

    For a prepared checkpoint, its own format (`int8`, `fp8`, `int4`) keeps the weights as they are, and fp16 or bf16
    sets the activations only.
    """
    stored = checkpoint.quantization
    if precision in ("fp32", "fp16", "bf16"):
        plain = _dense_support(precision, device, checkpoint.model_type)
        if stored is None or plain.level == "unsupported":
            return plain
        found = _prepared_support(stored, device)
        why = f"{precision} activations, the weights stay {stored.name}: {found.reason}"
        return Support(found.level, why, found.hint)
    if stored is None:
        return _online_support(precision, device, checkpoint.model_type)
    if precision not in (stored.weights, stored.method):
        why = f"the weights of the checkpoint are {stored.name}; vLLM does not convert them to {precision}"
        return Support("unsupported", why, "use auto, or choose the checkpoint without quantization")
    activations = _dense_support(generation_dtype(precision, device, checkpoint), device, checkpoint.model_type)
    return activations if activations.level == "unsupported" else _prepared_support(stored, device)


def best_generation_precision(device: DeviceTraits, checkpoint: Checkpoint = Checkpoint()) -> str:
    """Return what `auto` selects for generation: the format of a prepared checkpoint, else 16 bits if native, or fp32.

    Of the 16-bit formats, the one of the checkpoint is first, because a conversion loses accuracy or range.
    """
    stored = checkpoint.quantization
    if stored is not None:
        return stored.weights or stored.method
    choices = ("fp16", "bf16") if checkpoint.dtype == "fp16" else ("bf16", "fp16")
    levels = {choice: _dense_support(choice, device, checkpoint.model_type).level for choice in choices}
    return next((choice for choice in choices if levels[choice] == "native"), "fp32")


def generation_dtype(precision: str, device: DeviceTraits, checkpoint: Checkpoint = Checkpoint()) -> str:
    """Return the format of the activations and of the KV cache: fp32, fp16 or bf16. vLLM's `--dtype`, by our names."""
    if precision in ("fp32", "fp16", "bf16"):
        return precision
    if device.kind == "cpu":
        return "bf16"
    best = best_generation_precision(device, Checkpoint(checkpoint.model_type, checkpoint.dtype))
    return "fp16" if best == "fp32" else best


def _dense_support(precision: str, device: DeviceTraits, model_type: str | None) -> Support:
    capability = device.compute_capability or (0, 0)
    if precision == "fp16" and model_type in _WITHOUT_FP16:
        better = "bf16" if device.kind == "cpu" or capability >= (8, 0) else "fp32"
        why = f"vLLM rejects fp16 for {model_type}: it is numerically unstable"
        return Support("unsupported", why, f"use {better}")
    if precision == "bf16" and device.kind == "cuda" and capability < (8, 0):
        why = f"vLLM rejects bf16 below compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
        return Support("unsupported", why, "use fp32" if model_type in _WITHOUT_FP16 else "use fp16")
    found = support(precision, device)
    if device.kind == "cpu" and found.level == "emulated":
        # fp16 was as fast as bf16 and fp32 with vLLM 0.32 on two cores with avx512_bf16 (SmolLM2-135M, one sequence).
        why = f"the CPU has no {precision} instructions, so vLLM converts the numbers: it takes half the memory of fp32"
        return Support("emulated", why)
    return found


def _online_support(precision: str, device: DeviceTraits, model_type: str | None) -> Support:
    """Return how vLLM converts the 16-bit weights of a checkpoint to `precision` when it loads them."""
    capability = device.compute_capability or (0, 0)
    if precision != "fp8":
        why = f"vLLM does not convert the weights of a checkpoint to {precision}: it runs prepared checkpoints only"
        hint = "choose a checkpoint in compressed-tensors W8A8 or GPTQ with 8 bits"
        fp8 = _online_support("fp8", device, model_type).level in ("native", "weight-only")
        return Support("unsupported", why, f"{hint}, or use {'fp8' if fp8 else 'auto'}")
    if device.kind == "cuda" and capability < (8, 0) and model_type in _WITHOUT_FP16:
        why = f"fp8 needs activations in 16 bits, and vLLM runs {model_type} in fp32 only on this GPU"
        return Support("unsupported", why, "use fp32")
    if device.kind == "cpu":
        if "amx_fp8" in device.cpu_flags:
            return Support("native", "the CPU has amx_fp8: fp8 weights and activations")
        # SmolLM2-135M with vLLM 0.32 on two cores with avx512_bf16: 0.3 tokens/s instead of 15, other load present.
        why = "the CPU has no fp8 products: fp8 halves the weights, but was tens of times slower than bf16"
        return Support("emulated", why)
    return _fp8_support(device)


def _fp8_support(device: DeviceTraits) -> Support:
    capability = device.compute_capability or (0, 0)
    sm = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 9):
        return Support("native", f"{sm} multiplies fp8 weights and activations (8.9 or newer)")
    if capability >= (7, 5):
        why = f"{sm} has no fp8 products: the weights take half the memory, the products run in 16 bits (Marlin)"
        return Support("weight-only", why)
    return Support("unsupported", f"{sm} has no fp8 in vLLM (requires 7.5 or newer)", "use fp16")


def _prepared_support(stored: Quantization, device: DeviceTraits) -> Support:
    if stored.method in _REMOVED_METHODS:
        why = f"vLLM no longer runs {stored.method} checkpoints"
        return Support("unsupported", why, "choose the checkpoint without quantization, or one in compressed-tensors")
    if stored.weights == "fp8" and device.kind == "cuda":
        return _fp8_support(device)
    return Support("unknown", f"vLLM decides when it starts whether it runs {stored.name} here")


def _quantization(stored: Mapping[str, Any]) -> Quantization:
    method = str(stored.get("quant_method", "unknown")).lower().replace("compressed_tensors", "compressed-tensors")
    weights = None
    if method == "compressed-tensors" and isinstance(groups := stored.get("config_groups"), Mapping):
        found = {_number_format(group.get("weights")) for group in groups.values() if isinstance(group, Mapping)}
        weights = found.pop() if len(found) == 1 else None
    elif method in ("awq", "gptq") and isinstance(bits := stored.get("bits") or stored.get("w_bit"), int):
        weights = f"int{bits}"
    elif method in ("fp8", "mxfp4"):
        weights = method
    return Quantization(method, weights)


def _number_format(arguments: Any) -> str | None:
    if not isinstance(arguments, Mapping) or not isinstance(bits := arguments.get("num_bits"), int):
        return None
    return f"{'fp' if arguments.get('type') == 'float' else 'int'}{bits}"


def _cuda_support(precision: str, capability: tuple[int, int]) -> Support:
    sm = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16":
        if capability >= (8, 0):
            return Support("native", f"{sm} has bf16 tensor cores (8.0 or newer)")
        return Support("emulated", f"{sm} has no bf16 tensor cores (requires 8.0 or newer): use fp16")
    if precision == "fp16":
        if capability >= (7, 0):
            return Support("native", f"{sm} has fp16 tensor cores")
        return Support("emulated", f"{sm} has no fp16 tensor cores (requires 7.0 or newer)")
    if capability >= (7, 5):
        return Support("native", f"{sm} runs LLM.int8: half the weight memory; slower than fp16 in every measurement")
    return Support("unsupported", f"{sm} does not support LLM.int8 of bitsandbytes (requires 7.5 or newer)")


def _cpu_support(precision: str, flags: frozenset[str]) -> Support:
    if precision == "bf16":
        found = sorted(flags & {"avx512_bf16", "amx_bf16"})
        if found:
            return Support("native", f"the CPU has {', '.join(found)}")
        return Support("emulated", "the CPU has no avx512_bf16 or amx_bf16 instructions: bf16 is slower than fp32")
    if precision == "fp16":
        if flags & {"avx512_fp16", "amx_fp16"}:
            return Support("native", "the CPU has fp16 arithmetic")
        return Support("emulated", "the CPU has no fp16 arithmetic: fp16 is many times slower than fp32")
    found = sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    if found:
        memory_only = _cpu_support("bf16", flags).level == "native"  # docs/results.md#int8
        worth = "half the weight memory of bf16, and slower" if memory_only else "faster than fp32"
        return Support("native", f"the CPU has {', '.join(found)}: {worth}; less accurate")
    return Support("emulated", "the CPU has no VNNI or AMX instructions: int8 has 7-bit weights and is less accurate")
