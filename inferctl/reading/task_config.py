"""The configuration of a model folder for its task: the part of a head that needs no torch.

All encoder tasks share tokenization, queue, batches and the packed forward pass. A head is what differs:

- `task`; `takes_texts` and `takes_pairs`: whether one of its sequences can be a text, or a pair of texts.
- `max_tokens`, `prompts` and `lower_case`: how texts become token ids.
- `pooling` and `layers`: what follows the transformer. Without a pooling, the model of transformers has the head
  (`engines/head.py`). A sequence gives one row of numbers. All rows of logits or dense vectors have the same width
  (`EngineInfo.dimensions`); those with other outputs differ (`outputs.py`).
- `scores(rows)`, if the rows are logits: what clients get of them. `labels`: the names of them, if it has some.
- `facts` and `tei_type`: what `GET /info` says of it.

A module of `serve/api` has the endpoints of a task, which make the responses. `reference.py` has its oracles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, get_args

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.reading import architecture, classify_config, embedding_config, rerank_config
from inferctl.reading.classify_config import ClassifyConfig
from inferctl.reading.embedding_config import EmbeddingConfig
from inferctl.reading.rerank_config import RerankConfig

TaskConfig: TypeAlias = EmbeddingConfig | RerankConfig | ClassifyConfig
HEADS: Mapping[Task, type[TaskConfig]] = {kind.task: kind for kind in get_args(TaskConfig)}
_READ: Mapping[Task, Callable[[Path, int | None], TaskConfig]] = {
    "embed": embedding_config.read,
    "rerank": rerank_config.read,
    "classify": classify_config.read,
}


def read(task: Task, folder: Path, max_input_tokens: int | None = None) -> TaskConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a model that is not supported."""
    try:
        architecture.native_config(folder)
        return _READ[task](folder, max_input_tokens)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:  # others wrote these files
        raise UsageError(
            f"a JSON file of {folder} has a value of a wrong type: {error}", "download the model again"
        ) from None
