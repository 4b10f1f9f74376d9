"""What a client that left is charged for, from what vLLM knows of its request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from inferctl.serve.generate.engine_requests import Computed, EngineRequests


def engine(*states: Any) -> EngineRequests:
    processor = SimpleNamespace(request_states=dict(enumerate(states)))
    return EngineRequests(SimpleNamespace(output_processor=processor), None)


def state(tokens: int, number: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        external_req_id=f"cmpl-a-{number}",
        parent_req=None,
        is_prefilling=not tokens,
        prompt_len=1900,
        num_cached_tokens=0,
        detokenizer=SimpleNamespace(num_output_tokens=lambda: tokens),
    )


def test_a_prompt_counts_before_its_first_token() -> None:
    # The engine caches it in parts, and the same prompt would pay the price of cached tokens a moment later.
    assert engine(state(0)).computed("completions", "a", 100, 1) == Computed(1900, 0, 0)


def test_prompts_that_wait_count_without_an_answer() -> None:
    assert engine(state(0), state(0, 1)).computed("completions", "a", 100, 4) == Computed(3800, 0, 0)
    assert engine(state(5), state(0, 1)).computed("completions", "a", 100, 2) == Computed(3800, 5, 0)


def test_an_unknown_version_of_vllm_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    other = EngineRequests(SimpleNamespace(), None)
    assert [other.computed("completions", "a", 100, 1) for _ in range(2)] == [None, None]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
