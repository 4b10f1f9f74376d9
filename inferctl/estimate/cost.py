"""What a batch costs: `seconds = fixed + work / (peak x sustained fraction)`, with the work taken from the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferctl.errors import UsageError

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
class Transformer:
    """The arithmetic of one forward pass, in FLOP (a multiply-add counts two): `per_token` x s + `per_token2` x s x s for s tokens.

    `layers` and `weights` (parameters that every pass reads: all but the embedding tables) say what a pass costs whatever is in it.
    """

    name: str
    per_token: float
    per_token2: float
    layers: int
    weights: int

    def flop(self, tokens: int) -> float:
        """FLOP of one sequence of `tokens`."""
        return self.per_token * tokens + self.per_token2 * tokens * tokens

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Transformer:
        """From a Hugging Face `config.json` of an encoder, or of a decoder that embeds. Raises `UsageError` when a size is missing.

        Attention over a window counts as attention over everything, which is an upper bound for it.
        """
        hidden = _size(config, "hidden_size", "dim", "n_embd", "d_model")
        layers = _size(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
        heads = _size(config, "num_attention_heads", "n_heads", "n_head", "num_heads")
        width = _first(config, "intermediate_size", "hidden_dim", "n_inner", "d_ff") or 4 * hidden
        kv_heads = _first(config, "num_key_value_heads") or heads
        head = _first(config, "head_dim") or hidden // heads
        projections = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        weights = layers * (projections + (3 if _gated(config) else 2) * hidden * width)
        return cls(
            str(config.get("model_type", "transformer")), 2.0 * weights, 4.0 * layers * heads * head, layers, weights
        )


@dataclass(frozen=True)
class Cost:
    """Seconds of a batch: `fixed`, and for each sequence of s tokens `per_token` x s + `per_token2` x s x s."""

    fixed: float
    per_token: float
    per_token2: float = 0.0
    _known: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, model: Transformer, flop_per_s: float, fixed: float) -> Cost:
        """`flop_per_s`: peak x sustained fraction."""
        return cls(fixed, model.per_token / flop_per_s, model.per_token2 / flop_per_s)

    def times(self, factor: float) -> Cost:
        """The cost on a part that takes `factor` times as long for everything."""
        return Cost(self.fixed * factor, self.per_token * factor, self.per_token2 * factor)

    def sequence(self, tokens: int) -> float:
        """Seconds that one sequence adds to its batch."""
        if (known := self._known.get(tokens)) is None:
            known = self._known[tokens] = tokens * (self.per_token + tokens * self.per_token2)
        return known

    def batch(self, lengths: Iterable[int]) -> float:
        """Seconds of a batch of sequences of these lengths (tokens)."""
        return self.fixed + sum(map(self.sequence, lengths))


def _gated(config: Mapping[str, Any]) -> bool:
    """Whether the feed-forward block has three matrices (a gate), not two."""
    act = str(
        config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function") or ""
    ).lower()
    return act in _GATED or str(config.get("model_type", "")).lower() in _GATED_FAMILIES


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def _size(config: Mapping[str, Any], *names: str) -> int:
    if not (value := _first(config, *names)):
        raise UsageError(
            f"the model's configuration has no {names[0]}, so its work cannot be counted",
            "an estimate needs the config.json of a transformer: hidden_size, num_hidden_layers, num_attention_heads",
        )
    return value


# What the calibration rows ran: bert-large-uncased.
BERT_LARGE = Transformer.of(
    {
        "model_type": "bert",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
)
