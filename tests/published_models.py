"""What the hub has of the models that documentation and templates name: the settings that decide how they are served.

`write` makes a folder of the same shape without weights. Each entry has the facts of the model's public repository:
`config.json` (the keys that matter), the pooling and the modules, and the names of its files with weights.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}
XLM_R = {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}


def _embedding(config: dict[str, Any], pooling: str, **more: Any) -> dict[str, Any]:
    return {"config": config, "pooling": pooling, "weights": ("model.safetensors",), **more}


def _other(architecture: str, model_type: str, **settings: Any) -> dict[str, Any]:
    config = {"architectures": [architecture], "model_type": model_type, **settings}
    return {"config": config, "weights": ("model.safetensors",)}


PUBLISHED: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": _embedding(BERT, "mean_tokens"),
    "BAAI/bge-base-en-v1.5": _embedding(BERT, "cls_token"),
    "intfloat/multilingual-e5-large-instruct": _embedding(XLM_R, "mean_tokens"),
    "cross-encoder/ms-marco-MiniLM-L6-v2": _other("BertForSequenceClassification", "bert", id2label={"0": "LABEL_0"}),
    "Qwen/Qwen2.5-1.5B-Instruct": _other("Qwen2ForCausalLM", "qwen2"),
    "meta-llama/Llama-3.1-8B-Instruct": _other("LlamaForCausalLM", "llama"),
    "BAAI/bge-m3": _embedding(XLM_R, "cls_token") | {"weights": ("pytorch_model.bin",)},
}


def write(name: str, folder: Path) -> Path:
    """Write the small files of a published model, and empty files in place of its weights."""
    entry = PUBLISHED[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entry["config"]))
    (folder / "tokenizer.json").write_text("{}")
    for weights in entry["weights"]:
        header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        safe = struct.pack("<Q", len(header)) + header + b"1"
        (folder / weights).write_bytes(safe if weights.endswith("safetensors") else b"x" * 1000)
    if pooling := entry.get("pooling"):
        modules = ["Transformer", "Pooling", "Normalize"]
        listing = [
            {"path": f"{i}_{m}" if i else "", "type": f"sentence_transformers.models.{m}"}
            for i, m in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listing))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder
