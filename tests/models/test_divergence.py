"""The divergence of next-token distributions: a lower bound, equal to the KL divergence if both lists are complete."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from inferctl.core.errors import InferctlError
from inferctl.models import divergence
from inferctl.models.divergence import Limits, Scored


def distribution(seed: int, size: int = 200, near: list[float] | None = None) -> list[float]:
    """Return log-probabilities of `size` tokens, close to those of `near` if given."""
    draw = random.Random(seed)
    logits = [draw.gauss(0, 3) for _ in range(size)] if near is None else [x + draw.gauss(0, 0.2) for x in near]
    total = math.log(math.fsum(math.exp(x) for x in logits))
    return [x - total for x in logits]


def top(logprobs: list[float], count: int) -> dict[int, float]:
    best = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[:count]
    return {token: logprobs[token] for token in best}


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_lower_bound_that_grows_with_the_lists(seed: int) -> None:
    p = distribution(seed)
    q = distribution(seed + 100, near=p)
    exact = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    bounds = [divergence.kl_bound(top(p, 64), top(q, count)) for count in (5, 20, 60)]
    assert 0 < bounds[0] <= bounds[1] <= bounds[2] <= exact
    assert bounds[1] > exact / 2
    assert divergence.kl_bound(top(p, 200), top(q, 200)) == pytest.approx(exact, rel=1e-3)
    assert divergence.kl_bound(top(p, 64), top(p, 20)) == pytest.approx(0, abs=1e-9)


def scored(*rows: dict[int, float]) -> Scored:
    return Scored([0] * (len(rows) + 1), rows)


def test_of_equally_likely_tokens_greedy_decoding_takes_the_first() -> None:
    expected = scored({0: math.log(0.5), 7: math.log(0.3)}, {0: math.log(0.6), 7: math.log(0.3)})
    found = scored({7: math.log(0.4), 0: math.log(0.4)}, {0: math.log(0.2), 7: math.log(0.7)})
    result = divergence.compare([expected], [found])
    assert (result.positions, result.top_1) == (2, 0.5)
    assert result.texts[0].same_top == [True, False]
    assert result.perplexity_fp32 == pytest.approx(1 / math.sqrt(0.5 * 0.6))
    assert result.perplexity == pytest.approx(1 / math.sqrt(0.4 * 0.2))
    assert result.kl_p99 == max(result.texts[0].kl)


@pytest.mark.parametrize(
    ("kl", "top_1", "reason"),
    [
        (0.01, 0.9, None),
        (0.0101, 0.9, "mean KL divergence 0.0101 nats, the limit is 0.01"),
        (0.01, 0.899, "top-1 agreement 89.9%, required 90%"),
        (math.nan, 0.9, "mean KL divergence nan nats, the limit is 0.01"),
    ],
)
def test_both_limits_must_hold(kl: float, top_1: float, reason: str | None) -> None:
    found = divergence.Divergence(10, kl, kl, top_1, 2.0, 2.0, [])
    assert divergence.failure(found, Limits(0.01, 0.9)) == reason


def response(*rows: Any) -> dict[str, Any]:
    return {"choices": [{"prompt_logprobs": [None, *rows]}]}


def row(token: int, logprob: Any = -1.5) -> dict[str, Any]:
    return {str(token): {"logprob": logprob, "rank": 1, "decoded_token": "x"}}


def test_the_log_probabilities_of_vllm_are_read() -> None:
    found = divergence.read_served(response(row(5), row(6) | row(9, -0.5)), [4, 5, 6])
    assert found == Scored([4, 5, 6], [{5: -1.5}, {6: -1.5, 9: -0.5}])
    chat = {"choices": [{"message": {}}], "prompt_logprobs": [None, row(5)]}
    assert divergence.read_served(chat, [4, 5]).logprobs == [{5: -1.5}]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"choices": []}, "invalid prompt_logprobs: IndexError"),
        (response(row(5)), "of 2 tokens; the prompt has 3"),
        (response(row(5), row(7)), "no log-probability of token 6"),
        (response(row(5), row(6, math.nan)), "NaN"),
        (response(row(5), row(6, None)), "invalid prompt_logprobs: TypeError"),
    ],
)
def test_invalid_log_probabilities_are_an_error(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(InferctlError, match=reason) as error:
        divergence.read_served(body, [4, 5, 6])
    assert not isinstance(error.value, divergence.NoLogprobsError)


def test_a_server_without_log_probabilities_of_a_prompt_is_not_measured() -> None:
    with pytest.raises(divergence.NoLogprobsError):
        divergence.read_served({"choices": [{"text": "a"}]}, [4, 5])
