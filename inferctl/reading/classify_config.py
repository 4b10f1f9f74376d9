"""The configuration of a classifier: labels, longest input, and how logits become scores. Read without torch.

The formats are those of transformers' `config.json`: `id2label` and `problem_type`. The scores are those of its
pipeline `text-classification`. An activation that sentence-transformers stored does not count for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.models import model
from inferctl.reading import modules
from inferctl.reading.embedding_config import input_settings
from inferctl.reading.modules import Layer, PoolingMode, read_object
from inferctl.reading.prompts import NO_PROMPTS, Prompts
from inferctl.reading.rerank_config import sigmoid
from inferctl.reading.rows import Vectors


def _softmax(logits: Vectors) -> Vectors:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


# By the names that the pipeline has for them.
_ACTIVATIONS: dict[str, Callable[[Vectors], Vectors]] = {
    "softmax": _softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}
_BY_PROBLEM = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


@dataclass(frozen=True)
class ClassifyConfig:
    """How a classifier scores a text or a pair of texts.

    `activation`: softmax, sigmoid or none. `labels`: one for each logit. `max_tokens`: of a text or a pair, with its
    special tokens. `prompts` and `lower_case`: as in `RerankConfig`. The model of transformers has the head, so there
    are no `pooling` and `layers`.
    """

    task: ClassVar[Task] = "classify"
    takes_texts: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    pooling: ClassVar[tuple[PoolingMode, ...]] = ()
    layers: ClassVar[tuple[Layer, ...]] = ()
    takes_instruction: ClassVar[bool] = False
    activation: str
    labels: tuple[str, ...]
    max_tokens: int
    prompts: Prompts = NO_PROMPTS
    lower_case: bool = False

    def scores(self, logits: Vectors) -> Vectors:
        """Return the scores (float32, same shape) for the logits that an engine returns ([sequences, labels])."""
        with np.errstate(over="ignore"):
            return _ACTIVATIONS[self.activation](logits)

    @property
    def facts(self) -> dict[str, Any]:
        """What `GET /info` says of it, besides what all tasks have."""
        return {"activation": self.activation, "labels": self.labels}

    @property
    def tei_type(self) -> dict[str, Any]:
        """What clients of text-embeddings-inference choose by."""
        by_number = enumerate(self.labels)
        names = {str(number): label for number, label in enumerate(self.labels)}
        return {"classifier": {"id2label": names, "label2id": {label: number for number, label in by_number}}}


def read(folder: Path, max_input_tokens: int | None = None) -> ClassifyConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a head or an activation without support."""
    if modules.read(folder, "classify") is not None:
        raise UsageError(
            f"{folder} has modules after its transformer, which classification does not support",
            "use a model whose `...ForSequenceClassification` has the head",
        )
    config = read_object(folder / "config.json")
    labels = tuple(model.labels(config))
    return ClassifyConfig(
        _activation(folder, config, len(labels)), labels, **input_settings(folder, max_input_tokens, pooled=True)
    )


def _activation(folder: Path, config: dict[str, Any], labels: int) -> str:
    """Return the name of the activation. The pipeline reads `function_to_apply` last, which is never."""
    problem = config.get("problem_type")
    if problem is not None and problem not in _BY_PROBLEM:
        raise UsageError(f"`problem_type` of {folder} is {problem!r}", f"use one of {', '.join(_BY_PROBLEM)}")
    found = "sigmoid" if labels == 1 and problem != "regression" else _BY_PROBLEM.get(str(problem), "softmax")
    wanted = config.get("function_to_apply")
    if wanted is not None and str(wanted).lower() != found:
        raise UsageError(
            f"`function_to_apply` of {folder} is {wanted!r}, but transformers applies {found} to its logits",
            "set `problem_type` in config.json to what the model was trained for, and remove `function_to_apply`",
        )
    return found
