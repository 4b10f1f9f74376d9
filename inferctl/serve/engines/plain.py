"""The reference: transformers in fp32 on the CPU, padded attention, one text at a time. What every faster path is compared with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferctl.serve.recipe import Pooling, Recipe
from inferctl.serve.types import Tokens, Vectors


def load_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """The bare encoder of a model folder, in evaluation mode; `attention` None lets transformers choose.

    Only safetensors, only local files, no code from the folder.
    """
    # transformers imports torchao where it is installed, and that one complains about kernels for GPUs that are not there.
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
        model.pooler = None  # computed for every text and used by no sentence embedding
    return model.eval()


def pool(hidden: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector of one sequence: [tokens, dimensions] -> [dimensions]."""
    if pooling == "cls":
        return hidden[0]
    return hidden[-1] if pooling == "last" else hidden.mean(dim=0)


@torch.inference_mode()
def embed(model: Any, sequences: list[Tokens], recipe: Recipe) -> Vectors:
    """float32 [sequences, dimensions], each computed alone with an explicit attention mask."""
    rows = []
    for ids in sequences:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].float()
        vector = pool(hidden, recipe.pooling)
        rows.append(torch.nn.functional.normalize(vector, dim=0) if recipe.normalize else vector)
    return torch.stack(rows).numpy()
