"""How close the next tokens of a generation server are to those of the same weights in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inferctl.bench import stats
from inferctl.models import divergence, reference_process
from inferctl.models.divergence import Divergence, Scored


def reference(
    model: Path,
    texts: Sequence[str],
    max_tokens: int,
    on_wait: Callable[[float], None],
) -> list[Scored]:
    """Return the first texts, with `max_tokens` tokens in all, with the log-probabilities of the fp32 reference.

    Raises `InferctlError` if the process fails.
    """
    options = ["--task", "generate", "--max-tokens", str(max_tokens)]
    document = reference_process.run(model, texts, options, on_wait)
    return [text for text in divergence.read_reference(document["texts"]) if text and text.logprobs]


def figures(found: Divergence) -> dict[str, Any]:
    """Return the figures of a quality result, rounded, with 95% intervals over texts (None with fewer than three).

    `kl` is the KL divergence of the reference from the server in nats per token, a lower bound, `agreement` the share
    of the positions with the same most likely token, `perplexity` that of the texts on the server and in fp32.
    """
    sizes = [len(text.kl) for text in found.texts]
    kl = stats.ratio_interval([sum(text.kl) for text in found.texts], sizes)
    same = stats.ratio_interval([sum(text.same_top) for text in found.texts], sizes)
    interval = _interval(found.kl_mean, kl)
    return {
        "kl": {"mean": round(found.kl_mean, 6), "p99": round(found.kl_p99, 6), "interval": interval},
        "agreement": {"share": round(found.top_1, 4), "interval": _interval(found.top_1, same, most=1)},
        "perplexity": {"served": round(found.perplexity, 3), "fp32": round(found.perplexity_fp32, 3)},
    }


def _interval(value: float, half_width: float | None, most: float = float("inf")) -> tuple[float, float] | None:
    if half_width is None:
        return None
    return round(max(0.0, value - half_width), 6), round(min(most, value + half_width), 6)
