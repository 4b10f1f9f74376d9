"""Describes a generative model from its `config.json`: layers, KV cache and context. Pure functions, without torch.

The rules are those of vLLM 0.32 (`transformers_utils/model_arch_config_convertor.py`, `v1/kv_cache_interface.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# vLLM gives the KV cache to sequences in blocks of this many tokens, on GPUs.
BLOCK_TOKENS = 16
# The most tokens of one step on CPUs and small GPUs (`engine/arg_utils.py`).
STEP_TOKENS = 2048
# The KV cache on a CPU without `serve.kv_cache`, unless one longest context requires more.
CPU_KV_CACHE_BYTES = 4 * 2**30

# Mean of the conversations in the Azure LLM inference trace 2023: 1,152 tokens in and 212 out (Patel et al., Splitwise,
# ISCA 2024; CC BY 4.0; 5,000 of 19,366 requests).
TYPICAL_PROMPT, TYPICAL_ANSWER = 1152, 212
TYPICAL_TOKENS = TYPICAL_PROMPT + TYPICAL_ANSWER

# Architectures that vLLM does not run: removed, or with an encoder whose output the decoder attends to.
NOT_RUN = {
    "MPTForCausalLM": "vLLM removed it after 0.28",
    "MptForCausalLM": "vLLM removed it after 0.28",
    **dict.fromkeys(
        (
            "BartForConditionalGeneration",
            "EncoderDecoderModel",
            "LongT5ForConditionalGeneration",
            "M2M100ForConditionalGeneration",
            "MBartForConditionalGeneration",
            "MT5ForConditionalGeneration",
            "PegasusForConditionalGeneration",
            "T5ForConditionalGeneration",
            "UMT5ForConditionalGeneration",
        ),
        "vLLM has no text models with an encoder and a decoder",
    ),
}
# The hint for them.
RUN_INSTEAD = "choose a decoder that vLLM runs, such as Llama, Mistral, Qwen, Falcon or GPT-NeoX"

# Values of transformers' configuration classes that published `config.json` files leave out.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
    "falcon": {"multi_query": True, "max_position_embeddings": 2048},
    "gpt_bigcode": {"multi_query": True},
    "mistral": {"sliding_window": 4096},
}
# One of so many layers sees the whole sequence, the others a window.
_PERIOD_OF_FULL_LAYERS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4, "cohere2": 4}
# Model types whose attention vLLM runs as MLA: one vector per token and layer for all heads.
_LATENT = frozenset(
    {"deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "longcat_flash", "pangu_ultra_moe", "axk1"}
)
# Keys of models with states in addition to the KV cache, or with layers of several shapes.
_OTHER_STATE = (
    "attn_layer_period",
    "block_configs",
    "compress_ratios",
    "conv_L_cache",
    "hybrid_override_pattern",
    "index_head_dim",
    "layers_block_type",
    "linear_attn_config",
    "mamba_d_state",
    "ssm_cfg",
    "state_size",
)
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
_MOST_LAYERS = 10_000
# No size in a `config.json` is larger. Others write these files.
_MAX_SIZE = 2**40
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len")


@dataclass(frozen=True)
class KvCapacity:
    """What a KV cache holds, estimated. Sizes in bytes on each GPU, lengths in tokens of prompt and answer together.

    `context_tokens`: what each sequence may have, from the spec or the model. `longest_context_tokens`: the longest
    single sequence that fits. `sequences` of `context_tokens`, or `typical_sequences` of `TYPICAL_TOKENS`, run at once.
    """

    gpus: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    context_tokens: int | None
    longest_context_tokens: int
    sequences: int
    typical_sequences: int


@dataclass(frozen=True)
class UnknownDecoder:
    """Why the KV cache of a generative model cannot be computed from its `config.json`."""

    why: str


@dataclass(frozen=True)
class Decoder:
    """The shape of a generative model.

    `windows` has one entry per layer with a KV cache: the tokens that it sees, None for all. `kv_vectors`: vectors of
    `head_size` that a layer keeps per token; 1 for multi-head latent attention (`latent`), which GPUs do not share.
    `context`: the longest sequence that the model was made for; None if its `config.json` does not state it.
    `width`: feed-forward width that one token uses. `multimodal`: it also has an encoder of images or audio.
    """

    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    width: int
    vocabulary: int
    context: int | None
    latent: bool = False
    tied: bool = False
    multimodal: bool = False
    scaled_context: bool = False

    def kv_bytes_per_token(self, cell_bytes: int = 2, gpus: int = 1) -> int:
        """Return the bytes on each of `gpus` GPUs that one token takes in the layers together."""
        return len(self.windows) * self._layer_bytes(cell_bytes, gpus)

    def kv_bytes(self, tokens: int, cell_bytes: int = 2, gpus: int = 1, step_tokens: int = 0) -> int:
        """Return the bytes of the KV cache of a sequence of `tokens` tokens on each GPU, in whole blocks.

        A layer with a window keeps the window and the tokens of one step (`step_tokens`), never more than the sequence.
        """
        blocks = 0
        for window in self.windows:
            kept = tokens if window is None else min(tokens, window - 1 + step_tokens)
            blocks += math.ceil(kept / BLOCK_TOKENS) + (window is not None and kept < tokens)
        return blocks * BLOCK_TOKENS * self._layer_bytes(cell_bytes, gpus)

    def longest_context(self, available_bytes: int, cell_bytes: int = 2, gpus: int = 1, step_tokens: int = 0) -> int:
        """Return the most tokens of one sequence that fit into `available_bytes`, at most the model's context.

        Without a known context, the limit is 16,777,216 tokens. 0 if not even one block fits.
        """
        low, high = 0, self.context or 16_777_216
        while low < high:
            middle = (low + high + 1) // 2
            if self.kv_bytes(middle, cell_bytes, gpus, step_tokens) <= available_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def capacity(
        self, available_bytes: int, context: int | None, most: int, *, cell_bytes: int, gpus: int, step_tokens: int
    ) -> KvCapacity:
        """Return what `available_bytes` on each GPU hold: sequences of `context` tokens, at most `most` at a time."""

        def at_once(tokens: int) -> int:
            return min(most, available_bytes // self.kv_bytes(tokens, cell_bytes, gpus, step_tokens))

        longest = self.longest_context(available_bytes, cell_bytes, gpus, step_tokens)
        return KvCapacity(
            gpus=gpus,
            kv_cache_bytes=available_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token(cell_bytes, gpus),
            context_tokens=context,
            longest_context_tokens=longest,
            sequences=at_once(context or longest) if longest else 0,
            typical_sequences=at_once(min(TYPICAL_TOKENS, context or longest)) if longest else 0,
        )

    def _layer_bytes(self, cell_bytes: int, gpus: int) -> int:
        vectors = 1 if self.latent else 2 * max(1, self.kv_heads // gpus)
        return vectors * self.head_size * cell_bytes


def describe(config: Mapping[str, Any]) -> Decoder | UnknownDecoder:
    """Return the shape of a generative model, or which fact its `config.json` does not state."""
    nested = next(
        (config[key] for key in ("text_config", "llm_config", "language_config") if isinstance(config.get(key), dict)),
        None,
    )
    text: Mapping[str, Any] = {**config, **nested} if nested else config
    kind = str(text.get("model_type", ""))
    text = {**_CLASS_DEFAULTS.get(kind, {}), **text}

    def first(*names: str) -> int | None:
        found = (text.get(name) for name in names)
        return next((value for value in found if type(value) is int and value < _MAX_SIZE), None)

    if found := [key for key in _OTHER_STATE if text.get(key) is not None]:
        return UnknownDecoder(f"its layers keep a state that is not estimated (`{found[0]}` in config.json)")
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first("num_attention_heads", "n_head", "n_heads")
    hidden = first("hidden_size", "n_embd", "n_embed", "d_model")
    vocabulary = first("vocab_size")
    named = {"number of layers": layers, "number of heads": heads, "hidden size": hidden, "vocabulary": vocabulary}
    if missing := [name for name, value in named.items() if not value]:
        return UnknownDecoder(f"config.json does not state the {missing[0]}")
    assert layers and heads and hidden and vocabulary
    if layers > _MOST_LAYERS or any(isinstance(text.get(name), list) for name in _KV_HEADS):
        return UnknownDecoder("its layers have several shapes" if layers <= _MOST_LAYERS else f"it has {layers} layers")
    windows = _windows(text, kind, layers - (first("num_kv_shared_layers") or 0))
    if windows is None:
        return UnknownDecoder("config.json lists kinds of layers whose state is not estimated (`layer_types`)")
    contexts = [value for name in _CONTEXT if (value := first(name)) is not None]
    lora, rope = first("kv_lora_rank"), first("qk_rope_head_dim")
    if lora is not None and (kind not in _LATENT or rope is None):
        return UnknownDecoder(f"how vLLM keeps the KV cache of the model type {kind or 'unknown'} is not known here")
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    return Decoder(
        windows=windows,
        heads=heads,
        kv_heads=_kv_heads(text, kind, heads, first),
        head_size=lora + rope if lora and rope else first("head_dim", "hidden_size_per_head") or hidden // heads,
        hidden_size=hidden,
        width=_width(hidden, first),
        vocabulary=vocabulary,
        context=min(contexts, default=None),
        latent=lora is not None,
        tied=text.get("tie_word_embeddings") is True,
        multimodal=nested is not None or any(key in config for key in ("vision_config", "audio_config")),
        scaled_context=isinstance(scaling, Mapping) and bool(scaling.get("factor")) and "gemma3" not in kind,
    )


def _kv_heads(text: Mapping[str, Any], kind: str, heads: int, first: Callable[..., int | None]) -> int:
    if kind in ("falcon", "gpt_bigcode") and text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    attention = text.get("attn_config")  # DBRX
    if isinstance(attention, Mapping) and isinstance(kept := attention.get("kv_n_heads"), int):
        return kept
    return first(*_KV_HEADS) or heads


def _width(hidden: int, first: Callable[..., int | None]) -> int:
    dense = first("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    expert = first("moe_intermediate_size") or dense
    return max(dense, expert * (first("num_experts_per_tok", "num_experts_per_token") or 1))


def _windows(text: Mapping[str, Any], kind: str, layers: int) -> tuple[int | None, ...] | None:
    """Return the window of each layer; None if a kind of layer has another state than a KV cache."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or window <= 0 or text.get("use_sliding_window") is False:
        window = None
    chunk = text.get("attention_chunk_size")
    by_type = {"full_attention": None, "sliding_attention": window, "chunked_attention": chunk}
    types = text.get("layer_types")
    if isinstance(types, list):
        if not all(kind in by_type for kind in types):
            return None
        return tuple(by_type[kind] for kind in types[:layers])
    if window is None:
        return (None,) * layers
    period = text.get("sliding_window_pattern") or _PERIOD_OF_FULL_LAYERS.get(kind)
    if isinstance(period, str):  # EXAONE: LLLG, local and global layers
        return tuple(window if period[index % len(period)] == "L" else None for index in range(layers))
    if not isinstance(period, int):
        first = text.get("max_window_layers")  # Qwen2: the first layer with a window
        return tuple(None if isinstance(first, int) and index < first else window for index in range(layers))
    return tuple(None if (index + 1) % period == 0 else window for index in range(layers))
