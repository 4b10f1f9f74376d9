"""Replicas over an hour with a spike: the larger of offered rate and backlog, against the backlog alone.

A fluid model of the loop: requests are a continuous flow, replicas serve at their rate, new ones start after a cold
start, and the autoscaler computes ceil(queries) every 15 s, as a HorizontalPodAutoscaler does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

RATE, UTILIZATION, BACKLOG_S = 100_000.0, 0.7, 1.0
STEP_S, COLD_START_S, MINIMUM, MAXIMUM = 15, 60, 2, 20


@dataclass(frozen=True)
class Hour:
    """What an hour costs and how it feels: direction changes, replica hours, share of tokens that waited over 1 s."""

    changes: int
    replica_hours: float
    late: float


def offered(second: int) -> float:
    """Return tokens/s: 2.4 replicas' worth, and three times as much from minute 20 to 30."""
    return 2.4 * RATE * (3 if 1200 <= second < 1800 else 1)


def hour(*, with_offered: bool, window_s: int) -> Hour:
    """Simulate one hour. `window_s`: the largest need of this time counts before replicas are removed."""
    ready, starting, queue = 3, [], 0.0
    needs: list[tuple[int, int]] = []
    path = [ready]
    seconds = served_late = total = 0.0
    for second in range(3600):
        ready += sum(1 for at in starting if at == second)
        starting = [at for at in starting if at > second]
        flow = offered(second)
        late = queue / (ready * RATE) > 1.0
        queue = max(0.0, queue + flow - ready * RATE)
        total += flow
        served_late += flow if late else 0.0
        seconds += ready + len(starting)
        if second % STEP_S:
            continue
        need = queue / RATE / BACKLOG_S
        if with_offered:
            need = max(need, flow / (UTILIZATION * RATE))
        wanted = min(MAXIMUM, max(MINIMUM, math.ceil(need - 1e-9)))
        needs = [(at, each) for at, each in needs if at > second - window_s] + [(second, wanted)]
        have = ready + len(starting)
        if wanted > have:
            starting += [second + COLD_START_S] * (wanted - have)
        elif (kept := max(each for _, each in needs)) < have:
            removed = have - max(kept, math.ceil(have * 0.75))
            ready -= min(removed, ready - 1)
        path.append(ready + len(starting))
    moves = [later - earlier for earlier, later in itertools.pairwise(path) if later != earlier]
    turns = sum((first > 0) != (second > 0) for first, second in itertools.pairwise(moves))
    return Hour(turns, seconds / 3600, served_late / total)


def test_the_larger_of_both_follows_a_spike_once_and_the_backlog_alone_swings() -> None:
    both = hour(with_offered=True, window_s=300)
    alone = hour(with_offered=False, window_s=300)
    assert (both.changes, alone.changes) == (1, 3)
    assert alone.late > 2 * both.late
    assert alone.replica_hours > both.replica_hours


def test_without_a_window_the_backlog_alone_swings_more() -> None:
    both = hour(with_offered=True, window_s=STEP_S)
    alone = hour(with_offered=False, window_s=STEP_S)
    assert (both.changes, alone.changes) == (1, 7)
    assert alone.late > 3 * both.late
