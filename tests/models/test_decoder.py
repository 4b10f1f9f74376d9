"""Tests the KV cache and the context of published models against published figures.

KV cache per token in 16 bits: https://sebastianraschka.com/llm-architecture-gallery/ (GPT-2 XL 300 KiB, Llama 3 8B
128 KiB, DeepSeek V3 68.6 KiB). The shapes are those of the models' `config.json`.
"""

from __future__ import annotations

from typing import Any

import pytest

from inferctl.models.decoder import Decoder, UnknownDecoder, describe
from tests.models.decoder_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DOLLY_12B,
    FALCON_7B,
    FALCON_40B,
    GEMMA3_12B,
    GPT2_XL,
    LLAMA_2_7B,
    LLAMA_31_8B,
    MISTRAL_V01,
    QWEN25_05B,
    SMOLLM2_135M,
)

KIB = 1024


def decoder(config: dict[str, Any]) -> Decoder:
    found = describe(config)
    assert isinstance(found, Decoder), found
    return found


@pytest.mark.parametrize(
    ("config", "kib", "context"),
    [
        (GPT2_XL, 300, 1024),
        (LLAMA_2_7B, 512, 4096),
        (LLAMA_31_8B, 128, 131072),
        (FALCON_7B, 8, 2048),
        (FALCON_40B, 120, 2048),
        (DOLLY_12B, 720, 2048),
        (MISTRAL_V01, 128, 131072),
        (QWEN25_05B, 12, 32768),
        (SMOLLM2_135M, 22.5, 8192),
        (DEEPSEEK_V2_LITE, 30.375, 163840),
        (DEEPSEEK_V3, 68.625, 163840),
        (GEMMA3_12B, 384, 131072),
        (LLAMA_31_8B | {"max_position_embeddings": None}, 128, None),
    ],
)
def test_the_kv_cache_of_a_token(config: dict[str, Any], kib: float, context: int | None) -> None:
    found = decoder(config)
    assert found.kv_bytes_per_token() == kib * KIB
    assert found.kv_bytes_per_token(cell_bytes=4) == 2 * kib * KIB
    assert found.context == context


def test_the_kv_heads_are_divided_among_gpus_but_not_below_one() -> None:
    llama, falcon, latent = decoder(LLAMA_31_8B), decoder(FALCON_7B), decoder(DEEPSEEK_V3)
    assert [llama.kv_bytes_per_token(gpus=gpus) // KIB for gpus in (1, 2, 8, 16)] == [128, 64, 16, 16]
    assert falcon.kv_bytes_per_token(gpus=2) == falcon.kv_bytes_per_token()
    assert latent.kv_bytes_per_token(gpus=8) == latent.kv_bytes_per_token()


def test_a_sequence_takes_whole_blocks() -> None:
    llama = decoder(LLAMA_31_8B)
    assert llama.kv_bytes(1) == llama.kv_bytes(16) == 16 * 128 * KIB
    assert llama.kv_bytes(17) == 32 * 128 * KIB
    # https://developer.nvidia.com/blog/mastering-llm-techniques-inference-optimization/: 2 GB for 4,096 tokens
    assert decoder(LLAMA_2_7B).kv_bytes(4096) == 2 * 2**30


def test_a_layer_with_a_window_keeps_the_window_and_the_tokens_of_one_step() -> None:
    mistral, gemma = decoder(MISTRAL_V01), decoder(GEMMA3_12B)
    assert mistral.kv_bytes(4096, step_tokens=2048) == 4096 * 128 * KIB
    assert mistral.kv_bytes(100_000, step_tokens=2048) == (4095 + 2048 + 1 + 16) * 128 * KIB
    assert [layer is None for layer in gemma.windows].count(True) == 8
    whole = 131072 * 8 * 8 * KIB
    assert whole < gemma.kv_bytes(131072, step_tokens=2048) < 1.2 * whole
    assert gemma.kv_bytes(1000, step_tokens=2048) == 1008 * 384 * KIB


def test_the_longest_context_is_the_inverse_of_the_size() -> None:
    llama, gemma = decoder(LLAMA_31_8B), decoder(GEMMA3_12B)
    for found in (llama, gemma):
        for tokens in (16, 4096, 100_000):
            size = found.kv_bytes(tokens, step_tokens=2048)
            assert tokens <= found.longest_context(size, step_tokens=2048) < tokens + 16
            assert found.longest_context(size - 1, step_tokens=2048) < tokens
    assert llama.longest_context(10**15) == 131072
    assert llama.longest_context(0) == llama.longest_context(-1) == 0


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, (4096, 4096, 4096, None) * 8),
        ({"model_type": "cohere2", "sliding_window_pattern": 4}, (4096, 4096, 4096, None) * 8),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 30}, (None,) * 30 + (4096,) * 2),
        ({"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 30}, (None,) * 32),
        ({"model_type": "phi3"}, (4096,) * 32),
        ({"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"] * 16}, (4096, None) * 16),
    ],
)
def test_patterns_of_layers_with_a_window(options: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert decoder(LLAMA_31_8B | {"sliding_window": 4096} | options).windows == windows


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_hidden_layers": None}, "does not state the number of layers"),
        ({"vocab_size": None}, "does not state the vocabulary"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "kinds of layers whose state is not estimated"),
        ({"num_key_value_heads": [8, 4]}, "its layers have several shapes"),
        ({"num_hidden_layers": 10**9}, "it has 1000000000 layers"),
        ({"mamba_d_state": 16}, "its layers keep a state that is not estimated (`mamba_d_state` in config.json)"),
        (
            {"model_type": "minicpm3", "kv_lora_rank": 256, "qk_rope_head_dim": 32},
            "KV cache of the model type minicpm3",
        ),
    ],
)
def test_an_unknown_fact_is_stated(changes: dict[str, Any], why: str) -> None:
    found = describe(LLAMA_31_8B | changes)
    assert isinstance(found, UnknownDecoder) and why in str(found)
