"""Small random models of many architectures, with MiniLM's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "bert": {"num_attention_heads": 4},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2},
    "electra": {"num_attention_heads": 4, "embedding_size": 32},
    "roberta": {"num_attention_heads": 4, "pad_token_id": 1},
    "xlm-roberta": {"num_attention_heads": 4, "pad_token_id": 1},
    "mpnet": {"num_attention_heads": 4, "pad_token_id": 1},
    "modernbert": {"num_attention_heads": 4, "local_attention": 16, "global_attn_every_n_layers": 2},
    "nomic_bert": {"num_attention_heads": 4, "head_dim": 8},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
}


def make(minilm: Path, folder: Path, architecture: str, pooling: str, normalize: bool = True) -> Path:
    """Write a model of `architecture` into `folder`. `pooling` is a mode of sentence-transformers: `mean_tokens`."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 30522}
    settings = {"max_position_embeddings": 130, "pad_token_id": 0, "initializer_range": 0.5, **TINY[architecture]}
    config = AutoConfig.for_model(architecture, **sizes, **settings)
    model = AutoModel.from_config(config)
    # Random positions and tokens of a size that attention notices: near-zero weights would hide a wrong mask.
    model.save_pretrained(folder)
    shutil.copy(minilm / "tokenizer.json", folder)
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    listing = [
        {"path": f"{i}_{m}" if i else "", "type": f"sentence_transformers.models.{m}"} for i, m in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listing))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder
