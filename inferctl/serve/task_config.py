"""The configuration of a model folder for its task."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.serve import architecture, embedding_config, rerank_config
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.rerank_config import RerankConfig

TaskConfig: TypeAlias = EmbeddingConfig | RerankConfig


def read(task: Task, folder: Path, max_input_tokens: int | None = None) -> TaskConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a model that is not supported."""
    try:
        architecture.native_config(folder)
        if task == "rerank":
            return rerank_config.read(folder, max_input_tokens)
        return embedding_config.read(folder, max_input_tokens)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:  # others wrote these files
        raise UsageError(
            f"a JSON file of {folder} has a value of a wrong type: {error}", "download the model again"
        ) from None
