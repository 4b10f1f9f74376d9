"""The configuration of a model folder for its task."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from inferctl.config.spec import Task
from inferctl.serve import architecture, embedding_config, rerank_config
from inferctl.serve.embedding_config import EmbeddingConfig
from inferctl.serve.rerank_config import RerankConfig

TaskConfig: TypeAlias = EmbeddingConfig | RerankConfig


def read(task: Task, folder: Path, max_input_tokens: int | None = None) -> TaskConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a model that is not supported."""
    architecture.native_config(folder)
    if task == "rerank":
        return rerank_config.read(folder, max_input_tokens)
    return embedding_config.read(folder, max_input_tokens)
