"""A small model with two shards of random numbers, as a folder in Hugging Face layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD_BYTES = 400_000
CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"


def write_shard(file: Path, seed: int) -> None:
    """Write random numbers, which gzip cannot make smaller."""
    bits = np.random.default_rng(seed).integers(0, 2**32, SHARD_BYTES // 4, dtype=np.uint32)
    save_file({f"layer.{file.name[6:11]}": bits.view(np.float32)}, file)


def write(folder: Path, **config: object) -> Path:
    """Write the model to the new `folder`, with values for its config.json, and return the folder."""
    (folder / "1_Pooling").mkdir(parents=True)
    texts = {
        "config.json": {"architectures": ["BertModel"], "model_type": "bert", **config},
        "tokenizer.json": {"version": "1.0"},
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "modules.json": [{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
        "model.safetensors.index.json": {"weight_map": {f"layer.{name[6:11]}": name for name in SHARDS}},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "README.md").write_text(CARD)
    for seed, name in enumerate(SHARDS):
        write_shard(folder / name, seed)
    return folder


def copy(source: Path, target: Path) -> Path:
    """Copy a model, with other times and modes."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for file in target.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    return target
