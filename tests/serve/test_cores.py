"""The choice of threads per batch from measured times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def test_more_threads_are_used_as_long_as_they_are_much_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferctl.serve.engines import cores

    state = SimpleNamespace(now=0.0, threads=0)
    seconds = {1: 0.05, 2: 0.03, 4: 0.025}
    forward: Any = lambda _: setattr(state, "now", state.now + seconds[state.threads])  # noqa: E731
    forward.max_tokens = 512
    monkeypatch.setattr(cores.torch, "set_num_threads", lambda threads: setattr(state, "threads", threads))
    monkeypatch.setattr(cores.time, "perf_counter", lambda: state.now)
    assert cores.choose_threads(forward, cores=4) == 2
