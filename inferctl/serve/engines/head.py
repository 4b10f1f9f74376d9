"""The heads of models: states of the encoder -> logits, computed by the model's own code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from inferctl.reading.modules import LogitScore, PoolingMode


class _Pooled(torch.nn.Module):
    """Takes the place of the encoder in a model. Returns its input as the states of the last layer.

    Other attributes are those of the encoder: Falcon H1 has the factor of its logits there.
    """

    def __init__(self, encoder: Any, pooler: Any = None) -> None:
        super().__init__()
        self._encoder, self._pooler = (encoder,), pooler  # in a tuple, which hides its weights

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._encoder[0], name)

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        pooled = None if self._pooler is None else self._pooler(inputs_embeds)
        output: Any = BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)
        output.cache = output.past_key_values = output.router_logits = None  # decoders return these too
        return output


class LanguageHead:
    """The head of a language model of transformers: states of tokens -> logits of the vocabulary.

    It shares its weights with the model, in the same format. `size`: tokens of the vocabulary.
    """

    def __init__(self, model: Any) -> None:
        encoder = model.base_model
        self.module = copy.copy(model)
        self.module._modules = {
            name: _Pooled(encoder) if child is encoder else child for name, child in model.named_children()
        }
        self.size = int(model.config.get_text_config().vocab_size)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits: [tokens, width] -> [tokens, vocabulary]."""
        logits: torch.Tensor = self.module(inputs_embeds=states[None]).logits[0]
        return logits


class TokenScore:
    """The score of a causal language model: the logit of a token as the next one, less that of another one, if any.

    The output embeddings of `model` become the rows of these tokens, in fp32 on `device`.
    """

    def __init__(self, model: Any, score: LogitScore, device: torch.device) -> None:
        tokens = [token for token in (score.true_token, score.false_token) if token is not None]
        stored = {name: values[tokens] for name, values in model.get_output_embeddings().state_dict().items()}
        rows = torch.nn.Linear(stored["weight"].shape[1], len(tokens), bias="bias" in stored, device=device)
        rows.load_state_dict(stored)
        model.set_output_embeddings(rows)
        self._head = LanguageHead(model)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the scores: [sequences, width] -> [sequences, 1]."""
        logits = self._head(states)
        return logits if logits.shape[1] == 1 else logits[:, :1] - logits[:, 1:]


class Head:
    """The head of a classification model of transformers, in fp32 on `device`. `pooling`: the state that it uses.

    It treats each pooled state as a sequence of one token. Not every architecture allows this, so the check at the
    start compares the result with the whole model.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        encoder = model.base_model
        self._model = copy.copy(model)
        self._model._modules = {
            name: _Pooled(encoder, copy.deepcopy(getattr(encoder, "pooler", None)))
            if child is encoder
            else copy.deepcopy(child)
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
