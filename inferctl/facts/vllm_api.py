"""What vLLM's API process needs of a core, with the edge of inferctl in it, as measured on 2026-11-30."""

from __future__ import annotations

# CPU time (us) of each stream, of each of its tokens and of each of its events, and the machine of the measurement.
STREAM_US, TOKEN_US, EVENT_US = 1464.0, 18.1, 82.4
MACHINE = "an Intel Xeon"


def tokens_per_s(answer_tokens: int, event_tokens: int = 1) -> float:
    """Return the tokens/s of streams at which the process fills a core. `event_tokens`: of each event."""
    return 1e6 / (STREAM_US / answer_tokens + TOKEN_US + EVENT_US / event_tokens)
