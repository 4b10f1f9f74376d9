"""Tests which precisions vLLM runs for generation, by device and checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.facts import catalog
from inferctl.facts.precision import (
    Checkpoint,
    DeviceTraits,
    Quantization,
    best_precision,
    checkpoint_of,
    choose_generation,
    generation_support,
    support,
)

T4, A100, L4, H100 = (catalog.hardware(key).traits for key in ("t4", "a100-40gb-sxm", "l4", "h100-sxm"))
CPU = DeviceTraits("cpu")
AVX512_CPU = DeviceTraits("cpu", cpu_flags=frozenset({"avx512_vnni", "avx512_bf16"}))
VNNI_CPU = DeviceTraits("cpu", cpu_flags=frozenset({"avx512_vnni"}))
W8A8 = Checkpoint("llama", "bf16", Quantization("compressed-tensors", "int8"))
GPTQ8 = Checkpoint("llama", "fp16", Quantization("gptq", "int8"))
AWQ = Checkpoint("llama", "fp16", Quantization("awq", "int4"))
FP8 = Checkpoint("llama", "bf16", Quantization("fp8", "fp8"))
GEMMA3 = Checkpoint("gemma3_text", "bf16")


def compressed(activations: bool = False, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": weights if activations else None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def stored(name: str, format_: str | None) -> Checkpoint:
    return Checkpoint(quantization=Quantization(name, format_))


@pytest.mark.parametrize(
    ("precision", "device", "checkpoint", "level"),
    [
        ("fp32", T4, Checkpoint(), "native"),
        ("fp16", T4, Checkpoint(), "native"),
        ("bf16", T4, Checkpoint(), "unsupported"),
        ("bf16", A100, Checkpoint(), "native"),
        ("fp16", A100, GEMMA3, "unsupported"),
        ("bf16", CPU, Checkpoint(), "emulated"),
        ("bf16", AVX512_CPU, Checkpoint(), "native"),
        ("fp8", DeviceTraits("cuda", (7, 0)), Checkpoint(), "unsupported"),
        ("fp8", T4, Checkpoint(), "weight-only"),
        ("fp8", A100, Checkpoint(), "weight-only"),
        ("fp8", L4, Checkpoint(), "native"),
        ("fp8", H100, Checkpoint(), "native"),
        ("fp8", T4, GEMMA3, "unsupported"),
        ("fp8", AVX512_CPU, Checkpoint(), "emulated"),
        ("fp8", DeviceTraits("cpu", cpu_flags=frozenset({"amx_fp8"})), Checkpoint(), "native"),
        ("int8", A100, Checkpoint(), "unsupported"),
        ("int8", T4, W8A8, "unknown"),
        ("int8", CPU, GPTQ8, "unknown"),
        ("int4", T4, AWQ, "unknown"),
        ("int8", A100, AWQ, "unsupported"),
        ("fp8", A100, FP8, "weight-only"),
        ("fp8", H100, FP8, "native"),
        ("fp8", CPU, FP8, "unknown"),
        ("bf16", A100, W8A8, "unknown"),
        ("bf16", T4, W8A8, "unsupported"),
        ("int8", A100, Checkpoint(quantization=Quantization("bitsandbytes", "int8")), "unsupported"),
        ("mxfp4", H100, Checkpoint(quantization=Quantization("mxfp4", "mxfp4")), "unknown"),
    ],
)
def test_levels(precision: str, device: DeviceTraits, checkpoint: Checkpoint, level: str) -> None:
    found = generation_support(precision, device, checkpoint)
    assert found.level == level, found
    assert (found.hint is not None) or level != "unsupported", found


@pytest.mark.parametrize(("device", "best"), [(VNNI_CPU, "fp32"), (AVX512_CPU, "bf16")])
def test_int8_on_a_cpu_is_compared_with_what_auto_selects(device: DeviceTraits, best: str) -> None:
    assert best_precision(device) == best
    assert best in support("int8", device).reason


@pytest.mark.parametrize("device", [T4, A100, CPU])
def test_fp8_is_rejected_for_embeddings(device: DeviceTraits) -> None:
    found = support("fp8", device)
    assert found.level == "unsupported" and "fp8" in found.reason


@pytest.mark.parametrize(
    ("requested", "device", "checkpoint", "effective", "dtype", "quantization"),
    [
        ("auto", T4, Checkpoint("llama", "bf16"), "fp16", "fp16", None),
        ("auto", T4, GEMMA3, "fp32", "fp32", None),
        ("auto", A100, Checkpoint("llama", "bf16"), "bf16", "bf16", None),
        ("auto", A100, Checkpoint("llama", "fp16"), "fp16", "fp16", None),
        ("auto", A100, Checkpoint("llama", "fp32"), "bf16", "bf16", None),
        ("auto", A100, W8A8, "int8", "bf16", None),
        ("auto", T4, W8A8, "int8", "fp16", None),
        ("auto", A100, AWQ, "int4", "fp16", None),
        ("auto", H100, Checkpoint("gpt_oss", "bf16", Quantization("mxfp4", None)), "mxfp4", "bf16", None),
        ("auto", CPU, Checkpoint("llama", "bf16"), "fp32", "fp32", None),
        ("auto", AVX512_CPU, Checkpoint("llama", "fp16"), "bf16", "bf16", None),
        ("fp8", T4, Checkpoint("llama", "bf16"), "fp8", "fp16", "fp8_per_tensor"),
        ("fp8", H100, Checkpoint("llama", "bf16"), "fp8", "bf16", "fp8_per_tensor"),
        ("fp8", AVX512_CPU, Checkpoint("llama", "bf16"), "fp8", "bf16", "fp8_per_channel"),
        ("fp8", H100, FP8, "fp8", "bf16", None),
        ("fp16", A100, W8A8, "fp16", "fp16", None),
    ],
)
def test_auto_keeps_the_format_of_the_checkpoint_where_the_device_runs_it(
    requested: str, device: DeviceTraits, checkpoint: Checkpoint, effective: str, dtype: str, quantization: str | None
) -> None:
    chosen = choose_generation(requested, device, checkpoint)
    assert (chosen.effective, chosen.dtype, chosen.quantization) == (effective, dtype, quantization)
    assert chosen.support == generation_support(effective, device, checkpoint)


@pytest.mark.parametrize(
    ("config", "checkpoint"),
    [
        ({}, Checkpoint()),
        ({"model_type": "llama", "torch_dtype": "bfloat16"}, Checkpoint("llama", "bf16")),
        ({"model_type": "gemma3", "text_config": {"dtype": "torch.bfloat16"}}, Checkpoint("gemma3", "bf16")),
        *(
            ({"quantization_config": settings}, found)
            for settings, found in [
                ({"quant_method": "gptq", "bits": 8, "group_size": 128}, stored("gptq", "int8")),
                ({"quant_method": "awq", "bits": 4, "version": "gemm"}, stored("awq", "int4")),
                ({"quant_method": "fp8", "weight_block_size": [128, 128]}, stored("fp8", "fp8")),
                (compressed(True, num_bits=8, type="int"), stored("compressed-tensors", "int8")),
                ("wrong", Checkpoint()),
                ({"config_groups": 3}, stored("unknown", None)),
            ]
        ),
        (
            {"compression_config": compressed(num_bits=4, type="int", strategy="group")},
            stored("compressed-tensors", "int4"),
        ),
        (
            {"text_config": {"quantization_config": compressed(num_bits=8, type="float")}},
            stored("compressed-tensors", "fp8"),
        ),
    ],
)
def test_the_checkpoint_is_read_from_its_config(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    assert checkpoint_of(config) == checkpoint
