"""Computes the duration of a batch: launches, one read of the weights, and a roofline for each kernel.

The roofline model is that of Williams, Waterman and Patterson (CACM 2009). Arithmetic and memory traffic overlap in a
kernel, so the longer one counts. Kernels run one after the other, so their times add. Traffic counts each input of a
kernel read once and each output written once, as Ivanov et al. do for transformers ("Data Movement Is All You Need",
MLSys 2021), with the best available fusion: bias and activation in the matrix product, softmax in one attention kernel.
The traffic is therefore a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferctl.core.errors import UsageError
from inferctl.models.flops import ModelFlops

_GATED = ("silu", "swish", "swiglu", "geglu", "gelu_gated", "gated-gelu")
_GATED_FAMILIES = (
    "modernbert",
    "nomic_bert",
    "gte",
    "new",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a layer. Per token: its FLOP, and the activation values that it reads and writes."""

    flop: float
    values: int


@dataclass(frozen=True, kw_only=True)
class Transformer(ModelFlops):
    """The FLOP and memory traffic of one forward pass, from the configuration of a model.

    `weights`: number of parameters that each pass reads, which excludes the embedding tables. `kernels`: kernels of one
    layer without attention. `attention_values`: activation values per token that the attention kernel of one layer
    reads and writes.
    """

    name: str
    layers: int
    weights: int
    width: int
    kernels: tuple[Kernel, ...] = ()
    attention_values: int = 0

    @property
    def values_per_token(self) -> int:
        """Activation values that a forward pass reads and writes per token."""
        return self.layers * (self.attention_values + sum(kernel.values for kernel in self.kernels))

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as plain data."""
        names = ("name", "per_token", "per_token2", "layers", "weights", "width", "values_per_token")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Transformer:
        """Read the `config.json` of an encoder, or of a decoder for embeddings, in Hugging Face format.

        Sliding-window attention counts as full attention, which is an upper bound. Raises `UsageError` for a missing
        size.
        """
        hidden = _required_int(config, "hidden_size", "dim", "n_embd", "d_model")
        layers = _required_int(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
        heads = _required_int(config, "num_attention_heads", "n_heads", "n_head", "num_heads")
        width = _first_int(config, "intermediate_size", "hidden_dim", "n_inner", "d_ff") or 4 * hidden
        kv_heads = _first_int(config, "num_key_value_heads") or heads
        head = _first_int(config, "head_dim") or hidden // heads
        query, key = heads * head, kv_heads * head
        up = (2 if _gated(config) else 1) * hidden * width
        weights = layers * (2 * hidden * query + 2 * hidden * key + up + width * hidden)
        kernels = (
            Kernel(2.0 * hidden * (query + 2 * key), hidden + query + 2 * key),  # queries, keys and values
            Kernel(2.0 * query * hidden, query + hidden),  # output projection
            Kernel(0.0, 3 * hidden),  # residual and normalization: two inputs, one output
            Kernel(2.0 * up, hidden + width),  # feed-forward, up; the activation is part of it
            Kernel(2.0 * width * hidden, width + hidden),  # feed-forward, down
            Kernel(0.0, 3 * hidden),  # residual and normalization
        )
        return cls(
            name=str(config.get("model_type", "transformer")),
            per_token=2.0 * weights,
            per_token2=4.0 * layers * query,
            layers=layers,
            weights=weights,
            width=hidden,
            kernels=kernels,
            attention_values=2 * query + 2 * key,  # queries, keys and values in, one output
        )


@dataclass(frozen=True)
class Cost:
    """The duration of a batch in seconds.

    It is `fixed` plus, for each sequence of s tokens, s x (`per_token` + max(s x `per_token2`, `attention`)).
    `attention` is the memory traffic of the attention kernels per token, in seconds.
    """

    fixed: float
    per_token: float
    per_token2: float = 0.0
    attention: float = 0.0
    _seconds_by_length: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, model: Transformer, flop_per_s: float, fixed: float, values_per_s: float = math.inf) -> Cost:
        """Return the cost of `model` on hardware that sustains `flop_per_s` and moves `values_per_s` activation values.

        Without `values_per_s`, memory traffic takes no time.
        """
        linear = sum(max(kernel.flop / flop_per_s, kernel.values / values_per_s) for kernel in model.kernels)
        traffic = model.layers * model.attention_values / values_per_s
        return cls(fixed, model.layers * linear, model.per_token2 / flop_per_s, traffic)

    def times(self, factor: float) -> Cost:
        """Return the cost with all times multiplied by `factor`."""
        return Cost(self.fixed * factor, self.per_token * factor, self.per_token2 * factor, self.attention * factor)

    def sequence(self, tokens: int) -> float:
        """Return the seconds that one sequence adds to its batch."""
        if (seconds := self._seconds_by_length.get(tokens)) is None:
            attention = max(tokens * self.per_token2, self.attention)
            seconds = self._seconds_by_length[tokens] = tokens * (self.per_token + attention)
        return seconds

    def batch(self, lengths: Iterable[int]) -> float:
        """Return the seconds of a batch of sequences with these lengths in tokens."""
        return self.fixed + sum(map(self.sequence, lengths))


def _gated(config: Mapping[str, Any]) -> bool:
    """Return whether the feed-forward block is gated, with three matrices instead of two."""
    act = str(
        config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function") or ""
    ).lower()
    return act in _GATED or str(config.get("model_type", "")).lower() in _GATED_FAMILIES


def _first_int(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def _required_int(config: Mapping[str, Any], *names: str) -> int:
    if not (value := _first_int(config, *names)):
        raise UsageError(
            f"cannot estimate this model: its configuration has no {names[0]}",
            "use the config.json of a transformer, with hidden_size, num_hidden_layers and num_attention_heads",
        )
    return value


# The model of the calibration rows: bert-large-uncased.
BERT_LARGE = Transformer.of(
    {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
)
