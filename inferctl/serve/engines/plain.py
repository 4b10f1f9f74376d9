"""The reference implementation that other paths are compared with: transformers, fp32, CPU, one text at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferctl.serve.embedding_config import EmbeddingConfig, Pooling
from inferctl.serve.engine_process.engine_protocol import Tokens, Vectors


def load_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """Return the encoder of a model folder in evaluation mode. `attention` None lets transformers select one.

    It loads only local safetensors files and runs no code of the folder.
    """
    # transformers imports torchao if it is installed, which logs errors about kernels for absent GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # sentence embeddings do not use it
    return model.eval()


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
