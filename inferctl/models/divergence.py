"""How far the next-token distributions of a server are from those of the same weights in fp32.

Both sides read the same tokens (teacher forcing), so one different token does not change those after it. Per position,
both list the log-probabilities of the next token and of the most likely tokens. The KL divergence of the
reference from the server is computed over the tokens that both lists have, and all others as one. A coarser partition
never has a larger divergence, so it is a lower bound of the divergence over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.core.errors import InferctlError

# vLLM lists at most 20 tokens unless it is started with another `--max-logprobs`. The reference lists more, so that it
# has nearly all of them.
SERVED_TOKENS, REFERENCE_TOKENS = 20, 64
# Log-probabilities are rounded, so the probability of all other tokens is not known better than this.
_LEAST = 1e-7

Logprobs = Mapping[int, float]


@dataclass(frozen=True)
class Scored:
    """The tokens of one text, and the log-probabilities of next tokens: `logprobs[i]` are those after `ids[: i + 1]`.

    Each has the most likely tokens and the next token of the text.
    """

    ids: Sequence[int]
    logprobs: Sequence[Logprobs]


@dataclass(frozen=True)
class TextDivergence:
    """The divergence (nats, a lower bound) at each position of one text, and where both prefer the same token."""

    kl: Sequence[float]
    same_top: Sequence[bool]


@dataclass(frozen=True)
class Divergence:
    """The divergence of a server from the reference over all positions of several texts.

    `kl_mean` and `kl_p99` are in nats and lower bounds. `top_1` is the share of positions at which the most likely
    token is the same. `perplexity` is that of the server, `perplexity_fp32` that of the reference.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    top_1: float
    perplexity: float
    perplexity_fp32: float
    texts: Sequence[TextDivergence]


@dataclass(frozen=True)
class Limits:
    """The largest mean divergence (nats) and the smallest top-1 agreement of correct weights in one precision."""

    kl: float
    top_1: float


# docs/build.md has the values of vLLM and of damaged models for the texts of a verification. SmolLM2-135M is a hard
# case: rounding costs small models most. At 300 positions, its top-1 agreement is four standard errors above the limit.
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(0.001, 0.97),
    "fp16": Limits(0.01, 0.9),
    "bf16": Limits(0.01, 0.9),
    "int8": Limits(0.1, 0.8),
}


def limits_of(precision: str) -> Limits:
    """Return the limits of a precision. Those of all 8-bit and 4-bit formats are those of int8."""
    return LIMITS.get(precision, LIMITS["int8"])


class NoLogprobsError(InferctlError):
    """A server that does not report the log-probabilities of a prompt, so that its quality cannot be measured."""


def read_reference(texts: Iterable[Mapping[str, Any] | None]) -> list[Scored | None]:
    """Return `texts` in the output of `python -m inferctl.serve.reference`; None for one without tokens."""
    return [_scored(text) if text else None for text in texts]


def _scored(text: Mapping[str, Any]) -> Scored:
    rows = zip(text["ids"][1:], text["logprobs"], text["top_ids"], text["top_logprobs"], strict=True)
    return Scored(
        text["ids"],
        [dict(zip(tops, values, strict=True)) | {token: value} for token, value, tops, values in rows],
    )


def request(model: str, prompt: str | Sequence[int]) -> dict[str, Any]:
    """Return the body of a request of `/v1/completions` for the log-probabilities of a prompt, as vLLM has it."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": SERVED_TOKENS,
        "return_token_ids": True,
    }


def read_served(response: Mapping[str, Any], ids: Sequence[int]) -> Scored:
    """Return the log-probabilities of the prompt `ids` in the response to a completion or chat completion.

    Raises `NoLogprobsError` if there are none, and `InferctlError` if they do not fit the prompt or are no numbers.
    """
    try:
        rows = response["choices"][0].get("prompt_logprobs") or response.get("prompt_logprobs")
        if rows is None:
            raise NoLogprobsError("the server does not report log-probabilities of a prompt (`prompt_logprobs`)")
        found = [{int(token): float(entry["logprob"]) for token, entry in row.items()} for row in rows[1:]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InferctlError(f"the server returned invalid prompt_logprobs: {error!r}") from None
    if len(found) != len(ids) - 1:
        raise InferctlError(
            f"the server returned log-probabilities of {len(found) + 1} tokens; the prompt has {len(ids)}"
        )
    for token, row in zip(ids[1:], found, strict=True):
        if token not in row:
            raise InferctlError(f"the server returned no log-probability of token {token}, which is in the prompt")
        # vLLM writes -9999 for the logarithm of 0.
        if not all(-9999 <= value <= 1e-3 for value in row.values()):
            raise InferctlError("the server returned log-probabilities with NaN, infinity or above 0")
    return Scored(ids, found)


def compare(expected: Iterable[Scored], found: Iterable[Scored]) -> Divergence:
    """Return the divergence of the server's texts from the same texts of the reference."""
    texts: list[TextDivergence] = []
    losses: tuple[list[float], list[float]] = ([], [])
    for reference, served in zip(expected, found, strict=True):
        pairs = list(zip(reference.logprobs, served.logprobs, strict=True))
        same = [_most_likely(p) == _most_likely(q) for p, q in pairs]
        texts.append(TextDivergence([kl_bound(p, q) for p, q in pairs], same))
        for token, pair in zip(reference.ids[1:], pairs, strict=True):
            for total, logprobs in zip(losses, pair, strict=True):
                total.append(-logprobs[token])
    kl = sorted(value for text in texts for value in text.kl)
    count = len(kl)
    if not count:
        raise InferctlError("the texts have no token to predict")
    perplexities = [math.exp(min(math.fsum(values) / count, 700.0)) for values in losses]
    return Divergence(
        positions=count,
        kl_mean=math.fsum(kl) / count,
        kl_p99=kl[math.ceil(0.99 * count) - 1],
        top_1=sum(sum(text.same_top) for text in texts) / count,
        perplexity=perplexities[1],
        perplexity_fp32=perplexities[0],
        texts=texts,
    )


def kl_bound(p: Logprobs, q: Logprobs) -> float:
    """Return a lower bound in nats of the divergence of the distribution `p` from `q`: KL(p || q)."""
    total, rest_p, rest_q = 0.0, 1.0, 1.0
    for token in p.keys() & q.keys():
        share = math.exp(p[token])
        total += share * (p[token] - q[token])
        rest_p -= share
        rest_q -= math.exp(q[token])
    rest_p, rest_q = max(rest_p, _LEAST), max(rest_q, _LEAST)
    return max(0.0, total + rest_p * math.log(rest_p / rest_q))


def failure(found: Divergence, limits: Limits) -> str | None:
    """Return why the divergence exceeds the limits, None if it is within both."""
    # `not` so that NaN fails.
    if not found.kl_mean <= limits.kl:
        return f"mean KL divergence {found.kl_mean:.4f} nats, the limit is {limits.kl:g}"
    if not found.top_1 >= limits.top_1:
        return f"top-1 agreement {found.top_1:.1%}, required {limits.top_1:.0%}"
    return None


def _most_likely(logprobs: Logprobs) -> int:
    """Return the token that greedy decoding selects: of equal ones the first."""
    return min(logprobs, key=lambda token: (-logprobs[token], token))
