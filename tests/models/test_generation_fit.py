"""Tests on which hardware a spec of the task generate fits, and what the findings say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inferctl.config.spec import Spec
from inferctl.facts import catalog, vllm_api
from inferctl.models import fit, generation_fit
from tests.conftest import ROOT
from tests.models.decoder_configs import DOLLY_12B, FALCON_7B, GEMMA3_12B, LLAMA_2_7B, LLAMA_31_8B, SMOLLM2_135M

LLAMA = fit.ModelSize(8_030_261_248, LLAMA_31_8B | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"})
LLAMA2 = fit.ModelSize(6_738_415_616, LLAMA_2_7B | {"torch_dtype": "float16"})
FALCON = fit.ModelSize(7_217_189_760, FALCON_7B | {"torch_dtype": "bfloat16"})
GIB = 2**30


def spec(**serve: Any) -> Spec:
    return Spec.model_validate({"name": "m", "model": {"source": "org/m", "task": "generate"}, "serve": serve})


def on(key: str, model: fit.ModelSize | fit.UnknownSize = LLAMA, **serve: Any) -> fit.Fit:
    base = catalog.base("cuda13.0")
    return generation_fit.check_part(spec(**serve), base, catalog.stack(base.stack), catalog.hardware(key), model)


def finding(judged: fit.Fit, topic: str) -> fit.Finding:
    (found,) = [finding for finding in judged.findings if finding.topic == topic]
    return found


def test_the_activations_agree_with_what_vllm_measured() -> None:
    """vllm #10511: Llama 3 8B, 8,192 tokens per step, 256 sequences: weights 14.96 GiB, activations 1.26 GiB."""
    need = on("h100-sxm", max_sequences=256).memory
    assert need
    assert need.weights / GIB == pytest.approx(14.96, abs=0.01)
    assert need.activations / GIB == pytest.approx(1.26, rel=0.1)


def test_the_rest_of_the_share_holds_the_kv_cache() -> None:
    judged, half = on("a100-80gb-sxm"), on("a100-80gb-sxm", gpu_memory_share=0.45).capacity
    assert judged.verdict == "ok" and judged.memory and judged.capacity and half
    assert judged.capacity.kv_cache_bytes == 72_000_000_000 - judged.memory.total
    assert half.kv_cache_bytes == 36_000_000_000 - judged.memory.total
    per_sequence = 131072 * 131072
    assert judged.capacity.sequences == judged.capacity.kv_cache_bytes // per_sequence == 3
    assert judged.capacity.context_tokens == judged.capacity.longest_context_tokens == 131072


def test_a_context_that_does_not_fit_is_an_error_with_what_does() -> None:
    judged = on("l4")
    found = finding(judged, "memory")
    assert judged.capacity
    assert (judged.verdict, judged.capacity.sequences) == ("error", 0)
    assert "131,072" in found.what
    longest = judged.capacity.longest_context_tokens
    assert found.hint is not None
    assert f"serve.max_context_tokens: {longest}" in found.hint and "fp8" in found.hint
    assert found.hint.endswith(", or serve.gpus: 2")
    assert on("l4", max_context_tokens=longest).verdict == "ok"
    assert on("l4", max_context_tokens=longest + 1).verdict == "error"


def test_the_hints_fit() -> None:
    falcon = on("t4", FALCON)
    assert finding(falcon, "memory").hint == "use serve.precision: fp8"
    assert on("t4", FALCON, precision="fp8").verdict == "ok"
    sliced = on("a100-40gb-mig-2g.10gb", FALCON)
    assert finding(sliced, "memory").hint == "use hardware with more memory or a smaller model"
    assert on("a100-40gb-mig-3g.20gb", FALCON).verdict == "ok"
    assert on("l4", gpus=2).verdict == "ok"
    large = fit.ModelSize(400_000_000_000, LLAMA.config)
    assert "hardware" in (finding(on("t4", large), "memory").hint or "")


def test_the_weights_and_the_kv_heads_are_divided_among_gpus() -> None:
    one, two = on("a100-80gb-sxm"), on("a100-80gb-sxm", gpus=2)
    assert one.memory and two.memory and one.capacity and two.capacity
    assert two.memory.weights == one.memory.weights // 2
    assert two.capacity.kv_bytes_per_token == one.capacity.kv_bytes_per_token // 2
    assert two.capacity.sequences > 2 * one.capacity.sequences
    assert "on each of 2 GPUs" in finding(two, "memory").why
    assert "serve.gpus: 2" in finding(on("a100-40gb-mig-3g.20gb", gpus=2), "gpus").what


def test_fp8_halves_the_linear_layers_but_not_the_tables() -> None:
    need = on("h100-sxm", precision="fp8").memory
    assert need
    assert need.weights == LLAMA.parameters + 2 * 128256 * 4096
    tied = fit.ModelSize(134_515_008, SMOLLM2_135M | {"tie_word_embeddings": True})
    small = on("t4", tied, precision="fp8")
    assert small.level == "weight-only"
    assert small.memory
    assert small.memory.weights == tied.parameters + 49152 * 576


def test_a_prepared_checkpoint_keeps_its_format_and_the_size_of_its_files() -> None:
    stored = {"quant_method": "gptq", "bits": 8}
    model = fit.ModelSize(2_000_000_000, LLAMA.config | {"quantization_config": stored}, weights_bytes=9_000_000_000)
    judged = on("t4", model)
    assert judged.memory
    assert (judged.precision, judged.level, judged.memory.weights) == ("int8", "unknown", 9_000_000_000)
    rejected = on("t4", model, precision="fp8")
    assert (rejected.verdict, rejected.memory) == ("error", None)
    assert "int8 (gptq)" in finding(rejected, "precision").why


def test_int8_of_a_plain_checkpoint_and_bf16_on_a_t4_are_errors() -> None:
    assert finding(on("a100-40gb-sxm", precision="int8"), "precision").level == "error"
    assert finding(on("t4", precision="bf16"), "precision").hint == "use fp16"


def test_a_gpu_older_than_turing_is_an_error() -> None:
    volta = catalog.Hardware(**{**vars(catalog.hardware("t4")), "key": "v100", "compute_capability": "7.0"})
    base = catalog.base("cuda12.8")
    judged = generation_fit.check_part(spec(), base, catalog.stack(base.stack), volta, FALCON)
    assert finding(judged, "vllm").what.endswith("7.0")


def test_auto_keeps_fp16_weights_in_fp16() -> None:
    assert (on("a100-40gb-sxm", LLAMA2).precision, on("a100-40gb-sxm").precision) == ("fp16", "bf16")
    assert on("t4").precision == "fp16"


def test_a_cpu_has_the_kv_cache_of_the_spec() -> None:
    judged = on("cpu", FALCON, precision="bf16")
    assert judged.level == "depends"
    assert "amx_bf16 or avx512_bf16" in judged.reason
    assert judged.capacity
    assert judged.capacity.kv_cache_bytes == 4 * GIB
    long = on("cpu", precision="bf16").capacity
    assert long
    assert (long.kv_cache_bytes, long.sequences) == (131072 * 131072, 1)
    small = on("cpu", FALCON, precision="bf16", kv_cache="1GiB").capacity
    assert small
    assert small.kv_cache_bytes == GIB


def test_a_kv_cache_of_a_fixed_size_must_fit_beside_the_weights() -> None:
    fixed = on("l4", kv_cache="4GB", max_context_tokens=8192)
    assert fixed.capacity
    assert (fixed.verdict, fixed.capacity.kv_cache_bytes) == ("ok", 4_000_000_000)
    found = finding(on("l4", kv_cache="8GB", max_context_tokens=8192), "memory")
    assert found.level == "error" and "5.7 GB" in (found.hint or "")
    assert finding(on("t4", kv_cache="8GB"), "memory").hint == "remove serve.kv_cache"


def test_vllm_takes_larger_steps_on_large_gpus() -> None:
    keys = ("t4", "a100-80gb-sxm", "h100-sxm", "b200-sxm", "cpu")
    assert [generation_fit.step_tokens(catalog.hardware(key)) for key in keys] == [2048, 2048, 8192, 16384, 2048]


def test_what_is_unknown_is_stated() -> None:
    hybrid = fit.ModelSize(8_000_000_000, LLAMA.config | {"layer_types": ["linear_attention"]})
    judged = on("l4", hybrid)
    assert (judged.verdict, judged.memory, judged.capacity) == ("warn", None, None)
    assert "16.0 GB" in finding(judged, "memory").what
    assert finding(on("t4", hybrid), "memory").level == "error"
    unknown = on("t4", fit.UnknownSize("the hub does not respond", "check the network"))
    assert finding(unknown, "memory").why == "the hub does not respond"


def checked(config: dict[str, Any], **serve: Any) -> list[fit.Finding]:
    return [found for found in generation_fit.check_model(spec(**serve), config) if found.level != "ok"]


def test_an_architecture_that_vllm_does_not_run_is_an_error() -> None:
    for name in ("MPTForCausalLM", "MptForCausalLM", "T5ForConditionalGeneration"):
        (found,) = checked(LLAMA.config | {"architectures": [name]})
        assert (found.level, found.what) == ("error", f"vLLM does not run {name}")


def test_a_context_beyond_the_model_is_an_error_unless_the_model_scales_it() -> None:
    (found,) = checked(DOLLY_12B, max_context_tokens=4096)
    assert (found.level, found.hint) == ("error", "set at most 2048")
    assert "4,096" in found.what and "2,048" in found.what
    assert checked(DOLLY_12B, max_context_tokens=2048) == []
    scaled = DOLLY_12B | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert [found.level for found in checked(scaled, max_context_tokens=4096)] == ["warn"]
    assert [found.level for found in checked(GEMMA3_12B, max_context_tokens=200_000)] == ["error"]


def test_the_heads_must_be_divisible_by_the_number_of_gpus() -> None:
    (found,) = checked(dict(LLAMA.config), gpus=3)
    assert found.topic == "gpus" and "1, 2, 4, 8, 16" in (found.hint or "")


def test_settings_of_another_task_are_a_warning_only_if_they_are_set() -> None:
    assert list(generation_fit.check_settings(spec(), "generate")) == []
    (found,) = generation_fit.check_settings(spec(max_input_tokens=2048, gpus=1), "generate")
    assert found.level == "warn" and "serve.max_input_tokens" in found.what
    (found,) = generation_fit.check_settings(spec(gpus=2, kv_cache="4GB"), "embed")
    assert "serve.kv_cache, serve.gpus" in found.what


@pytest.mark.parametrize(
    ("task", "processes", "error"),
    [("generate", 1, False), ("generate", "auto", False), ("generate", 2, True), ("embed", 2, False)],
)
def test_several_api_processes_are_an_error_for_generation(task: str, processes: int | str, error: bool) -> None:
    found = list(generation_fit.check_settings(spec(api_processes=processes), task))
    assert [each.level for each in found] == ["error"] * error


def test_the_cost_of_the_api_process_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "peers-generation-api.json").read_text())["cost_us"]
    assert measured["stream"] == pytest.approx(vllm_api.STREAM_US, rel=0.01)
    assert measured["token"] == pytest.approx(vllm_api.TOKEN_US, abs=0.06)
    assert measured["event"] == pytest.approx(vllm_api.EVENT_US, abs=0.06)
    assert vllm_api.tokens_per_s(100, 10) == pytest.approx(
        100 / (1e-6 * (vllm_api.STREAM_US + 100 * vllm_api.TOKEN_US + 10 * vllm_api.EVENT_US))
    )
