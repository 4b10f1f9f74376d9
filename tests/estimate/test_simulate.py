"""Tests the batcher on a virtual clock: exact times of small cases, queueing theory for large ones."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferctl.batching.batcher import QueueLimits
from inferctl.estimate.cost import Cost
from inferctl.estimate.search import SimulatedServer
from inferctl.estimate.simulate import UNBOUNDED, Simulation, percentile

LIMITS = QueueLimits(16_384, UNBOUNDED)
COST = Cost(1.0, 0.01)  # a batch with one text of 100 tokens takes 2 s


def test_requests_that_arrive_during_a_batch_run_together() -> None:
    answers = Simulation(COST, LIMITS, [[100], [100], [100]]).open([0.0, 0.5, 1.9])
    # The first runs alone from 0 to 2, then the other two run from 2 to 5.
    assert answers.latencies == pytest.approx([2.0, 4.5, 3.1])
    assert answers.seconds == pytest.approx(5.0)


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=30))
def test_the_latency_alone_is_that_of_one_request_after_the_other(requests: list[list[int]]) -> None:
    limits = QueueLimits(400, UNBOUNDED)
    alone = [Simulation(COST, limits, [each], front=0.1).open([0.0]).latencies[0] for each in requests]
    server = SimulatedServer(COST, limits, requests, front=0.1)
    for q in (0.0, 0.5, 0.9, 1.0):
        assert percentile(server.single(), q) == pytest.approx(percentile(alone, q))


def test_a_request_ends_with_its_last_text() -> None:
    assert Simulation(COST, QueueLimits(100, UNBOUNDED), [[100, 100]]).open([0.0]).latencies == pytest.approx([4.0])


def test_waiting_times_match_an_md1_queue() -> None:
    """The mean wait in M/D/1 is load x service / (2 (1 - load)). With batches of one text, the server is M/D/1."""
    service, load = 2.0, 0.7
    draw, now, arrivals = random.Random(5), 0.0, []
    for _ in range(60_000):
        now += draw.expovariate(load / service)
        arrivals.append(now)
    answers = Simulation(COST, QueueLimits(100, UNBOUNDED), [[100]] * len(arrivals)).open(arrivals)
    wait = sum(answers.latencies) / len(answers.latencies) - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.lists(st.integers(1, 400), min_size=1, max_size=4)), min_size=1, max_size=40
    )
)
def test_all_requests_complete_and_none_is_faster_than_alone(coming: list[tuple[float, list[int]]]) -> None:
    coming.sort(key=lambda one: one[0])
    requests = [lengths for _, lengths in coming]
    answers = Simulation(COST, QueueLimits(500, UNBOUNDED), requests).open([now for now, _ in coming])
    assert len(answers.latencies) == len(requests)
    for lengths, latency in zip(requests, answers.latencies, strict=True):
        assert latency >= COST.fixed + COST.per_token * max(lengths) - 1e-9


def test_the_highest_rate_meets_the_slo_and_a_higher_one_does_not() -> None:
    server = SimulatedServer(Cost(0.003, 1e-5), LIMITS, [[100 + i % 100] for i in range(5000)])
    rate = server.highest_rate(0.1)
    assert 0 < rate < server.offline().per_second
    assert server.meets_slo(rate, 0.1)
    assert not server.meets_slo(rate * 1.03, 0.1)


def test_no_rate_meets_an_slo_that_a_single_request_exceeds() -> None:
    assert SimulatedServer(COST, LIMITS, [[100]] * 100).highest_rate(1.5) == 0


def test_requests_pass_the_front_end_one_after_the_other() -> None:
    answers = Simulation(Cost(0.0, 0.0), LIMITS, [[100]] * 3, front=0.5).open([0.0, 0.0, 0.1])
    assert answers.latencies == pytest.approx([0.5, 1.0, 1.4])


@pytest.mark.parametrize(("engine", "front"), [(0.01, 0.02), (0.02, 0.01), (0.02, 0.0)])
def test_the_slower_of_front_end_and_engine_sets_the_throughput(engine: float, front: float) -> None:
    server = SimulatedServer(Cost(engine, 0.0), QueueLimits(100, UNBOUNDED), [[100]] * 500, front=front)
    assert server.offline().per_second == pytest.approx(50, rel=0.01)


def test_waiting_for_the_front_end_counts_toward_the_slo() -> None:
    free, busy = (SimulatedServer(Cost(0.001, 0.0), LIMITS, [[100]] * 3000, front=front) for front in (0.0, 0.01))
    assert busy.highest_rate(0.1) < 100 < free.highest_rate(0.1)
