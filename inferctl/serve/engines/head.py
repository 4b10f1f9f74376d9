"""The head of a classification model: pooled states of the encoder -> logits, computed by the model's own code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from inferctl.reading.modules import PoolingMode


class _Pooled(torch.nn.Module):
    """Takes the place of the encoder in a classification model. Returns its input as the states of the last layer."""

    def __init__(self, pooler: Any) -> None:
        super().__init__()
        self._pooler = pooler

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        pooled = None if self._pooler is None else self._pooler(inputs_embeds)
        output: Any = BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)
        output.cache = output.past_key_values = None  # decoders return these too
        return output


class MaskedLanguageHead:
    """The head of a masked language model of transformers: states of tokens -> logits of the vocabulary.

    It shares its weights with the model, in the same format. `size`: tokens of the vocabulary.
    """

    def __init__(self, model: Any) -> None:
        encoder = model.base_model
        self._model = copy.copy(model)
        self._model._modules = {
            name: _Pooled(None) if child is encoder else child for name, child in model.named_children()
        }
        self.size = int(model.config.vocab_size)

    @property
    def module(self) -> Any:
        """The model without its encoder."""
        return self._model

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits: [tokens, width] -> [tokens, vocabulary]."""
        logits: torch.Tensor = self._model(inputs_embeds=states[None]).logits[0]
        return logits


class Head:
    """The head of a classification model of transformers, in fp32 on `device`. `pooling`: the state that it uses.

    It treats each pooled state as a sequence of one token. Not every architecture allows this, so the check at the
    start compares the result with the whole model.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        encoder = model.base_model
        self._model = copy.copy(model)
        self._model._modules = {
            name: _Pooled(copy.deepcopy(getattr(encoder, "pooler", None))) if child is encoder else copy.deepcopy(child)
            for name, child in model.named_children()
        }
        self._model.float().to(device)
        self.pooling: PoolingMode = "cls"
        if hasattr(model, "score"):  # decoders
            self.pooling = "last"
        elif getattr(model.config, "classifier_pooling", None) == "mean":  # ModernBERT
            self.pooling = "mean"

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits: [sequences, width] -> [sequences, labels]."""
        logits: torch.Tensor = self._model(inputs_embeds=states[:, None]).logits
        return logits
