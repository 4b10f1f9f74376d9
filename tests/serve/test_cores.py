"""The choice of threads per batch from measured times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [
        ({1: 0.001, 2: 0.0006, 4: 0.0005}, {1: 8, 2: 8, 4: 8}),  # fast texts are repeated eight times
        ({1: 0.05, 2: 0.03, 4: 0.025}, {1: 6, 2: 8, 4: 8}),  # for 0.3 s
        ({1: 9.0, 2: 5.0, 4: 4.9}, {1: 4, 2: 4, 4: 4}),  # and at least four times
    ],
)
def test_a_text_is_repeated_until_it_took_some_time(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], runs: dict[int, int]
) -> None:
    from inferctl.serve.engines import cores

    counted, state = dict.fromkeys(seconds, 0), SimpleNamespace(now=0.0, threads=0)

    def forward(_: Any) -> None:
        counted[state.threads] += 1
        state.now += seconds[state.threads] * (10 if counted[state.threads] == 1 and seconds[1] < 0.01 else 1)

    forward_of_model: Any = forward
    forward_of_model.max_tokens = 512
    monkeypatch.setattr(cores.torch, "set_num_threads", lambda threads: setattr(state, "threads", threads))
    monkeypatch.setattr(cores.time, "perf_counter", lambda: state.now)
    # Twice the threads are 1.6 times faster, and four times the threads only a little more.
    assert cores.choose_threads(forward_of_model, cores=4) == 2
    assert counted == runs
