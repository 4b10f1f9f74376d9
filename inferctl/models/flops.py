"""The floating-point operations (FLOP) of a forward pass, by the lengths of its sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class ModelFlops:
    """The FLOP of one sequence of s tokens: `per_text` + `per_token` x s + `per_token2` x s x s.

    A multiply-add counts as two, and attention as a full square, also for a causal model. Normalization, activations
    and softmax do not count, as in the counter of torch.
    """

    per_token: float
    per_token2: float
    per_text: float = 0.0

    def flop(self, tokens: int) -> float:
        """Return the FLOP of one sequence of `tokens` tokens."""
        return self.per_text + self.per_token * tokens + self.per_token2 * tokens * tokens

    def batch(self, lengths: npt.NDArray[np.int32]) -> float:
        """Return the FLOP of sequences with these lengths in tokens, without padding."""
        tokens = lengths.astype("f8")
        return float(len(tokens) * self.per_text + self.per_token * tokens.sum() + self.per_token2 * tokens @ tokens)
