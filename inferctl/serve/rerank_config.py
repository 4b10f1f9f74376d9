"""The configuration of a cross-encoder: longest input, and how logits become scores. Read without torch.

The formats are those of transformers' `config.json` and of the files that `CrossEncoder` of sentence-transformers
writes: `sentence_transformers.activation_fn` (before version 4 `sbert_ce_default_activation_function`) in `config.json`
or `activation_fn` in `config_sentence_transformers.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inferctl.core.errors import UsageError
from inferctl.models.model import ModelFolder
from inferctl.serve.embedding_config import input_settings, read_object
from inferctl.serve.engine_process.engine_protocol import Vectors


def _sigmoid(logits: Vectors) -> Vectors:
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), dtype=np.float32)


_ACTIVATIONS: dict[str, Callable[[Vectors], Vectors]] = {
    "Identity": lambda logits: logits,
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
}


@dataclass(frozen=True)
class RerankConfig:
    """How a cross-encoder scores a pair of texts.

    `max_tokens`: of a pair, with its special tokens. `prompt` precedes the first text. `activation` is the name of a
    class of torch: Sigmoid, Identity or Tanh.
    """

    activation: str
    max_tokens: int
    prompt: str = ""
    lower_case: bool = False

    def scores(self, logits: Vectors) -> Vectors:
        """Return the scores (float32, same shape) for the logits that an engine returns ([pairs, 1])."""
        with np.errstate(over="ignore"):
            return _ACTIVATIONS[self.activation](logits)


def read(folder: Path, max_input_tokens: int | None = None) -> RerankConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a module or activation without support."""
    config = read_object(folder / "config.json")
    if other := [m for m in ModelFolder(folder).modules if not str(m.get("type", "")).endswith(".Transformer")]:
        raise UsageError(
            f"{folder} has a module {other[0].get('type')}, which is not supported", "use a model without it"
        )
    name = str(
        read_object(folder / "config_sentence_transformers.json").get("activation_fn")
        or (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or "torch.nn.Sigmoid"
    )
    activation = name.rpartition(".")[2]
    if not name.startswith("torch.") or activation not in _ACTIVATIONS:
        raise UsageError(
            f"the activation {name} of {folder} is not supported", f"use a model with {', '.join(_ACTIVATIONS)}"
        )
    return RerankConfig(activation, **input_settings(folder, max_input_tokens))
