"""Writes model folders with tensors of given shapes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 100,
}


def write_model(folder: Path, shapes: dict[str, list[int]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(packed)) + packed + bytes(end))
    return folder


def stand_in(folder: Path) -> Path:
    """Write a generative model with one tensor, which nothing can compute."""
    write_model(folder, {"w": [1]})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder
