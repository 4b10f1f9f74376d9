"""Small random models, saved by sentence-transformers itself, so that its files and its vectors are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tests import tiny_models

Modules: TypeAlias = Callable[[], list[Any]]

WIDTH = 32
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 130}
_DECODER = {"num_key_value_heads": 2, "head_dim": 8}
# Settings of architectures with random weights, next to those of `tiny_models.TINY`.
MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": WIDTH, "initializer_range": 0.25},
    "big_bird": {"attention_type": "original_full", "block_size": 4, "num_random_blocks": 1},
    "camembert": {"pad_token_id": 1},
    "canine": {"num_hash_buckets": 64, "downsampling_rate": 2, "upsampling_kernel_size": 2},
    "codegen": {**_GPT, "rotary_dim": 4},
    "ctrl": {**_GPT, "dff": 64},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "esm": {"position_embedding_type": "rotary", "token_dropout": True},
    "eurobert": {"num_key_value_heads": 2},
    "fnet": {},
    "gemma": _DECODER,
    "gemma2": {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 12, "attn_logit_softcapping": 1.0},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "gte": {},
    "llama": _DECODER,
    "llama4_text": {**_DECODER, "num_local_experts": 2, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]},
    "longformer": {"attention_window": 16, "pad_token_id": 1},
    "mt5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "nystromformer": {"num_landmarks": 64, "segment_means_seq_len": 64},
    "phi3": {"num_key_value_heads": 2},
    "phimoe": {"num_key_value_heads": 2, "num_local_experts": 2},
    "qwen2": {"num_key_value_heads": 2},
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}
# Whose kind of tokenizer an architecture has, if not its own; without either, that of BERT.
_TOKENIZERS = {"camembert": "roberta", "longformer": "roberta", "eurobert": "modernbert"} | dict.fromkeys(
    ("gemma", "gemma2", "llama", "phi3", "qwen2"), "qwen3"
)
# Each is one case of raw text that implementations treat differently.
TEXTS = [
    "Which river flows through Vienna?",
    "SHOUTED WORDS",
    "naïve café, Ångström, ﬁne",
    "机器学习模型把文本变成向量。",
    "a",
    "the end [SEP] [CLS] </s> <s> [MASK] of it",
    "  blanks \n\t around  ",
    "🚀 emoji and\u00a0non-breaking space",
    "a text that is far too long " * 40,
    "",
]


def write(folder: Path, architecture: str, auto: str = "AutoModel", mask: bool = False, **settings: Any) -> Path:
    """Write a model with random weights of a class of transformers, and a tokenizer of its kind, which may have a mask.

    Returns the folder.
    """
    import torch
    import transformers

    tokenizer = tiny_models.make_tokenizer(_TOKENIZERS.get(architecture, architecture))
    if mask and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    known = tiny_models.TINY.get(architecture) or MORE[architecture]
    ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 130}
    options = {**_SIZES, "initializer_range": 0.4, **known, **ids, **settings}
    config = transformers.AutoConfig.for_model(architecture, **options)
    of_t5 = "t5" in architecture
    model = transformers.T5EncoderModel(config) if of_t5 else getattr(transformers, auto).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def transformer(folder: Path, architecture: str, **settings: Any) -> Any:
    """Write a model into `folder`, and return it as a module."""
    import torch
    from sentence_transformers.base.modules import Transformer

    return Transformer(str(write(folder, architecture, **settings)), model_kwargs={"dtype": torch.float32})


def save(folder: Path, architecture: str, modules: Modules, options: dict[str, Any], **settings: Any) -> Path:
    """Write a model of these modules after its transformer. `options` go to SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    first = transformer(folder / "transformer", architecture, **settings)
    whole = SentenceTransformer(modules=[first, *modules()], device="cpu", **options)
    whole.save(str(folder / "saved"))
    return folder / "saved"


def vectors(folder: Path, texts: list[str], **options: Any) -> Any:
    """Return what sentence-transformers computes in fp32 for the texts. `options` go to transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32, **options})
    return model.encode(texts, convert_to_numpy=True)
