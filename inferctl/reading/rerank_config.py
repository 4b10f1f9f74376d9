"""The configuration of a reranker: how pairs become text, longest input, and how logits become scores.

Read without torch.

The formats are those of transformers' `config.json` and of the files that `CrossEncoder` of sentence-transformers
writes: `sentence_transformers.activation_fn` (before version 4 `sbert_ce_default_activation_function`) in `config.json`
or, if there are modules, `activation_fn` in `config_sentence_transformers.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from inferctl.config.spec import Task
from inferctl.core.errors import UsageError
from inferctl.reading import modules, pair_template
from inferctl.reading.embedding_config import input_settings
from inferctl.reading.modules import Dense, Layer, LogitScore, PoolingMode, read_object
from inferctl.reading.pair_template import PairTemplate
from inferctl.reading.prompts import NO_PROMPTS, Prompts
from inferctl.reading.rows import Vectors


def sigmoid(logits: Vectors) -> Vectors:
    """Return 1 / (1 + e^-x) of each logit, without loss of precision by fp32."""
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), dtype=np.float32)


_ACTIVATIONS: dict[str, Callable[[Vectors], Vectors]] = {
    "Identity": lambda logits: logits,
    "Sigmoid": sigmoid,
    "Tanh": np.tanh,
}


@dataclass(frozen=True)
class RerankConfig:
    """How a reranker scores a pair of texts.

    `max_tokens`: of a pair, with its special tokens. `template` makes one text of a pair; without one, the tokenizer
    joins the texts. The default of `prompts` is the instruction for the template, else it precedes the first text.
    `activation` is the name of a class of torch: Sigmoid, Identity or Tanh. `pooling` and `layers` are those of
    `EmbeddingConfig`; the last layer returns the logits. They are empty if the model of transformers has the head.
    """

    task: ClassVar[Task] = "rerank"
    takes_texts: ClassVar[bool] = False
    takes_pairs: ClassVar[bool] = True
    labels: ClassVar[tuple[str, ...]] = ()
    activation: str
    max_tokens: int
    pooling: tuple[PoolingMode, ...] = ()
    layers: tuple[Layer, ...] = ()
    prompts: Prompts = NO_PROMPTS
    lower_case: bool = False
    template: PairTemplate | None = None

    def scores(self, logits: Vectors) -> Vectors:
        """Return the scores (float32, same shape) for the logits that an engine returns ([pairs, 1])."""
        with np.errstate(over="ignore"):
            return _ACTIVATIONS[self.activation](logits)

    @property
    def takes_instruction(self) -> bool:
        """Whether the model reads an instruction with each pair."""
        return self.template is not None and self.template.takes_instruction

    @property
    def facts(self) -> dict[str, Any]:
        """What `GET /info` says of it, besides what all tasks have."""
        return {
            "activation": self.activation,
            "logit_score": next((asdict(layer) for layer in self.layers if isinstance(layer, LogitScore)), None),
            "template": self.template is not None,
            "takes_instruction": self.takes_instruction,
        }

    @property
    def tei_type(self) -> dict[str, Any]:
        """What clients of text-embeddings-inference choose by."""
        return {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}


def read(folder: Path, max_input_tokens: int | None = None) -> RerankConfig:
    """Return the configuration of a model folder. Raises `UsageError` for a module or activation without support."""
    found = modules.read(folder, "rerank")
    name = _activation_name(folder)
    package, _, activation = name.rpartition(".")
    if package not in modules.ACTIVATION_PACKAGES or activation not in _ACTIVATIONS:
        raise UsageError(
            f"the activation {name} of {folder} is not supported", f"use a model with {', '.join(_ACTIVATIONS)}"
        )
    pooled = found is None or found.include_prompt
    settings = input_settings(folder, max_input_tokens, pooled=pooled) | {"template": pair_template.read(folder)}
    if found is None:
        return RerankConfig(activation, **settings)
    *_, last = found.layers
    if not isinstance(last, LogitScore) and not (isinstance(last, Dense) and last.out_features == 1):
        raise UsageError(f"{folder} returns several scores for a pair", "use a reranker with one score")
    return RerankConfig(activation, pooling=found.pooling, layers=found.layers, **settings)


def _activation_name(folder: Path) -> str:
    """Return the class that `CrossEncoder` applies to the logits. A null in the newer key hides the older one."""
    config = read_object(folder / "config.json")
    found = modules.library_settings(folder).get("activation_fn")
    if found is None:
        own = config.get("sentence_transformers", {})
        found = own["activation_fn"] if "activation_fn" in own else config.get("sbert_ce_default_activation_function")
    return "torch.nn.Sigmoid" if found is None else str(found)
