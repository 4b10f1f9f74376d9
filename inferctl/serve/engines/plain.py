"""The reference implementation that other paths are compared with: transformers, fp32, CPU, one text at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferctl.config.spec import Task
from inferctl.serve.embedding_config import EmbeddingConfig, Pooling
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors
from inferctl.serve.engines import weights
from inferctl.serve.tokenizer_pool import Pair


def load_model(folder: Path, dtype: torch.dtype = torch.float32, *, task: Task = "embed") -> Any:
    """Return the encoder of a model folder, or for `rerank` the whole cross-encoder, in evaluation mode.

    Raises `UsageError` as `weights.load` does.
    """
    silence_libraries()
    from transformers import AutoModel, AutoModelForSequenceClassification

    model = weights.load(AutoModelForSequenceClassification if task == "rerank" else AutoModel, folder, task, dtype)
    if task == "embed" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # sentence embeddings do not use it
    model.config.use_cache = False  # there is no next token, for which a decoder would keep all keys and values
    return model


def silence_libraries() -> None:
    """Keep what transformers logs while it loads a model out of the log: errors remain."""
    # transformers imports torchao if it is installed, which logs errors about kernels for absent GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def pool(hidden: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return the pooled vector of one sequence: [tokens, dimensions] -> [dimensions]."""
    if pooling == "cls":
        return hidden[0]
    return hidden[-1] if pooling == "last" else hidden.mean(dim=0)


@torch.inference_mode()
def embed(model: Any, sequences: list[Tokens], config: EmbeddingConfig) -> Vectors:
    """Return float32 [sequences, dimensions]. Each sequence is a forward of its own with an explicit attention mask."""
    rows = []
    for ids in sequences:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].float()
        vector = pool(hidden, config.pooling)
        rows.append(torch.nn.functional.normalize(vector, dim=0) if config.normalize else vector)
    return torch.stack(rows).numpy()


@torch.inference_mode()
def score(model: Any, pairs: list[Pair]) -> Vectors:
    """Return the logits of a cross-encoder: float32 [pairs, labels]. Each pair is a forward of its own."""
    rows = []
    for ids, second_start in pairs:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if has_segments(model):
            inputs["token_type_ids"] = (torch.arange(len(ids)) >= second_start).long()[None]
        rows.append(model(**inputs).logits[0].float())
    return torch.stack(rows).numpy()


def has_segments(model: Any) -> bool:
    """Return whether the model distinguishes the segments of a pair."""
    return int(getattr(model.config, "type_vocab_size", None) or 0) > 1
