"""Whether a server applies an adapter: its next tokens, compared with those of the adapter and of the base in fp32.

A server can list an adapter and respond with the base, or apply it in part or with another scale. Rounding moves the
next tokens too, so an adapter that is no farther from its base than that cannot be told apart from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.models import divergence
from inferctl.models.divergence import Divergence, Scored

_CHATS = (
    ("Name three rivers.", "Rhine, Nile and Amazon.", "Which one is the longest?", "The Nile is the longest river."),
    ("What is a container image?", "It is a list of layers, and a configuration that says what to run."),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b", "Thank you!", "You are welcome."),
    ("Translate to German: The bridge is closed today.", "Die Brücke ist heute geschlossen."),
)
TEXTS = (
    "How many replicas does a service need at 200 requests a second? It depends on the time of one request.",
    "The quick brown fox jumps over the lazy dog. Then it sleeps under the tree until the evening.",
)
# What the reference computes of each adapter: chats, which most are trained for, and texts, for a base without them.
PROMPTS: tuple[Any, ...] = (
    *([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)] for chat in _CHATS),
    *TEXTS,
)
# The adapter on the server has to be so many times closer to the adapter in fp32 than the base is. That can be seen if
# the base is at least twice as far as that, in units of its own rounding.
_CLOSER, _VISIBLE = 4, 8
# Nats per token. An adapter that changes less is none: fp32 differs so much between two machines.
_NOTHING = 1e-5


@dataclass(frozen=True)
class Effect:
    """What an adapter does on a server. Divergences are from the adapter in fp32, over the same positions.

    `applied`: of the server's adapter. `distance`: of the base in fp32. `rounding`: of the server's base, from fp32.
    """

    applied: Divergence
    distance: Divergence
    rounding: Divergence

    @classmethod
    def of(
        cls,
        reference: Sequence[Mapping[str, Any] | None],
        adapter: Sequence[Mapping[str, Any] | None],
        served_base: Sequence[Scored],
        served: Sequence[Scored],
    ) -> Effect:
        """Return the effect, from the output of the reference for the base and the adapter, and that of a server."""
        base, own = texts(reference), texts(adapter)
        return cls(
            divergence.compare(own, served), divergence.compare(own, base), divergence.compare(base, served_base)
        )

    def document(self) -> dict[str, Any]:
        """Return the figures as JSON data: mean KL divergences in nats per token, shares of equal most likely tokens."""
        found = {"": self.applied, "_base": self.distance, "_rounding": self.rounding}
        figures = {f"kl{end}": round(each.kl_mean, 6) for end, each in found.items()}
        return figures | {f"top_1{end}": round(each.top_1, 4) for end, each in found.items()}

    @property
    def is_hidden(self) -> bool:
        """Whether the adapter changes hardly more than rounding does, so that nothing is known."""
        return self.distance.kl_mean <= _VISIBLE * self.rounding.kl_mean

    def failure(self, precision: str) -> str | None:
        """Return how the server does not apply the adapter; None if it does, or if rounding hides what it changes."""
        distance = self.distance.kl_mean
        if distance < _NOTHING:
            return "changes nothing, nor in fp32"
        limit = max(divergence.limits_of(precision).kl, _CLOSER * self.rounding.kl_mean)
        if self.is_hidden or self.applied.kl_mean <= min(limit, distance / _CLOSER):
            return None
        return "is not applied as PEFT does"


def texts(reference: Sequence[Mapping[str, Any] | None]) -> list[Scored]:
    """Return the texts in the output of the reference that have tokens."""
    return [text for text in divergence.read_reference(reference) if text and text.logprobs]


def line(figures: Mapping[str, Any]) -> str:
    """Return the figures of `Effect.document`, or why they are `unknown`, as a line."""
    start = f"not compared with fp32: {figures['unknown']}; " if "unknown" in figures else ""
    if "kl" not in figures:
        return f"{start}it changes what vLLM responds"
    kl, base, rounding = (f"{figures[name]:.2g}" for name in ("kl", "kl_base", "kl_rounding"))
    tops = f"top-1 agreement {figures['top_1']:.0%}, base {figures['top_1_base']:.0%}"
    return f"{start}KL divergence from PEFT in fp32 {kl} nats, base {base}, rounding {rounding}; {tops}"
