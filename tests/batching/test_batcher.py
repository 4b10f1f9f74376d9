"""Properties of the batcher for random requests, on a virtual clock."""

from __future__ import annotations

import contextlib
import heapq
import random
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.batching.batcher import AdmissionError, Batcher, QueuedSequence, QueueLimits
from inferctl.batching.latency_model import LatencyModel
from tests.latency_models import learned

# (bulk, lengths of the sequences)
REQUESTS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(1, 40), min_size=1, max_size=12)), max_size=20)
Requests = list[tuple[bool, list[int]]]


def batcher(batch_tokens: int = 64, queue_tokens: int = 1_000_000, window: int = 256) -> Batcher:
    return Batcher(QueueLimits(batch_tokens, queue_tokens, window))


def filled(queue: Batcher, requests: Requests, spacing: float = 0.0) -> Batcher:
    for number, (bulk, lengths) in enumerate(requests):
        queue.submit(number, lengths, now=number * spacing, bulk=bulk)
    return queue


def drain(queue: Batcher, now: float = 0.0) -> list[list[QueuedSequence]]:
    batches = []
    while batch := queue.next_batch(now):
        batches.append(batch)
    return batches


@given(REQUESTS, st.integers(1, 100), st.integers(1, 30), st.floats(0, 10))
def test_every_sequence_comes_out_exactly_once(requests: Requests, batch_tokens: int, window: int, now: float) -> None:
    queue = filled(batcher(batch_tokens, window=window), requests)
    out = sorted((item.request, item.position, item.tokens) for batch in drain(queue, now) for item in batch)
    assert out == [(r, i, n) for r, (_, lengths) in enumerate(requests) for i, n in enumerate(lengths)]
    assert queue.waiting_tokens == 0
    assert len(queue) == 0


@given(REQUESTS, st.integers(1, 100), st.floats(0, 10))
def test_a_batch_keeps_the_limit_unless_a_single_sequence_exceeds_it(
    requests: Requests, limit: int, now: float
) -> None:
    for batch in drain(filled(batcher(limit), requests), now):
        assert len(batch) == 1 or sum(item.tokens for item in batch) <= limit


@given(REQUESTS, st.integers(1, 100), st.integers(1, 30))
def test_the_oldest_sequence_of_the_highest_priority_is_in_the_next_batch(
    requests: Requests, limit: int, window: int
) -> None:
    queue = filled(batcher(limit, window=window), requests)
    waiting = sorted((bulk, r, i) for r, (bulk, lengths) in enumerate(requests) for i in range(len(lengths)))
    while batch := queue.next_batch(0.0):
        assert (batch[0].bulk, batch[0].request, batch[0].position) == waiting[0]
        taken = {(item.bulk, item.request, item.position) for item in batch}
        waiting = [w for w in waiting if w not in taken]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=30), st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_bulk_requests_do_not_starve_under_constant_interactive_load(bulk: list[int], flood: list[int]) -> None:
    queue = batcher(64)
    queue.submit(0, bulk, now=0.0, bulk=True)
    served, done, turn = 0, {0: len(bulk)}, 0
    while done.get(0):
        turn += 1
        queue.submit(turn, flood, now=float(turn))
        done[turn] = len(flood)
        for item in queue.next_batch(float(turn)):
            done[item.request] -= 1
            served += not item.bulk
        # There is a batch each second, so some bulk runs in each.
        assert turn <= len(bulk) + 2, "bulk requests starve"
    # The others are for interactive requests: at least one sequence per batch that bulk does not fill.
    assert served >= turn - len(bulk) - 1


@pytest.mark.parametrize(("idle_slots", "patience_s"), [(False, 1.0), (True, 10.0)])
def test_bulk_requests_that_get_nothing_for_long_get_a_quarter_of_a_batch(idle_slots: bool, patience_s: float) -> None:
    queue = filled(batcher(64), [(True, [16] * 40), (False, [16] * 40)])
    queue.idle_slots = idle_slots
    batches = [queue.next_batch(patience_s * (1 + number / 2)) for number in range(8)]
    assert [sum(item.tokens for item in batch if item.bulk) for batch in batches] == [16, 0] * 4
    assert [sum(item.tokens for item in batch) for batch in batches] == [64] * 8


def test_bulk_requests_run_in_the_slots_for_idle_time_if_there_are_some() -> None:
    queue = filled(batcher(128), [(True, [64] * 4), (False, [64] * 3)])
    queue.idle_slots = True
    assert queue.has_full_batch()
    assert [[item.bulk for item in queue.next_batch(0.0, idle=idle)] for idle in (False, True)] == [[0, 0], [1, 1]]
    assert not queue.has_full_batch()
    assert [len(batch) for batch in drain(queue)] == [1], "the interactive one only"
    assert [len(queue.next_batch(0.0, 2, idle=True)) for _ in range(2)] == [1, 1], "divided between two slots"


def test_without_slots_for_idle_time_bulk_batches_are_short_while_others_may_arrive() -> None:
    limits = QueueLimits(1024, 10_000, slo_s=1.0)
    queue = filled(Batcher(limits, learned(0.0, 1000.0)), [(True, [10] * 200), (False, [10])])
    sizes = [sum(item.tokens for item in queue.next_batch(now)) for now in (0.0, 0.5, 0.9, 1.0)]
    assert sizes == [10, 100, 100, 1020]


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 0.1)), min_size=1, max_size=60))
def test_requests_past_the_maximum_wait_run_in_arrival_order(arrivals: list[tuple[int, float]]) -> None:
    queue, now = batcher(64), 0.0
    for number, (tokens, pause) in enumerate(arrivals):
        now += pause
        queue.submit(number, [tokens], now=now)
    late = now + queue.limits.overdue_s
    firsts = [batch[0].request for batch in drain(queue, late)]
    assert firsts == sorted(firsts)


@given(REQUESTS, st.data())
def test_cancelled_requests_do_not_run_and_others_are_unaffected(requests: Requests, data: st.DataObject) -> None:
    queue = filled(batcher(), requests)
    before = [item for _ in range(data.draw(st.integers(0, 3))) for item in queue.next_batch(0.0)]
    cancelled = data.draw(st.sets(st.integers(0, max(0, len(requests) - 1))))
    for number in cancelled:
        queue.cancel(number)
    ran = {(item.request, item.position) for item in before}
    expected = {(r, i) for r, (_, ns) in enumerate(requests) if r not in cancelled for i in range(len(ns))} - ran
    assert queue.waiting_tokens == sum(requests[r][1][i] for r, i in expected)
    assert len(queue) == len(expected)
    assert sorted((item.request, item.position) for batch in drain(queue) for item in batch) == sorted(expected)


def test_a_queue_of_cancelled_requests_stays_small() -> None:
    queue = batcher(window=16)
    for number in range(10_000):
        queue.submit(number, [5] * 10, now=0.0)
        queue.cancel(number)
    assert len(queue._interactive.sequences) < 100
    assert queue.next_batch(0.0) == []


@given(REQUESTS, st.integers(1, 200))
def test_the_queue_keeps_its_limit_except_for_one_request_per_priority(requests: Requests, limit: int) -> None:
    queue = batcher(queue_tokens=limit)
    waiting = {False: 0, True: 0}
    for number, (bulk, lengths) in enumerate(requests):
        before = queue.waiting_tokens
        try:
            queue.submit(number, lengths, now=0.0, bulk=bulk)
        except AdmissionError as error:
            assert error.reason == "queue_full"
            assert queue.waiting_tokens == before, "rejected as a whole"
            assert before + sum(lengths) > limit // 2
        else:
            assert queue.waiting_tokens == before + sum(lengths), "accepted as a whole"
            first = not waiting[bulk]
            waiting[bulk] += sum(lengths)
            assert first or waiting[bulk] <= (limit // 2 if bulk else limit)


@given(REQUESTS.filter(bool), st.integers(20, 100))
def test_requeued_sequences_run_first(requests: Requests, limit: int) -> None:
    queue = filled(batcher(limit), requests)
    waiting = queue.waiting_tokens
    lost = queue.next_batch(0.0)
    queue.requeue(lost)
    assert queue.waiting_tokens == waiting
    assert lost[0] in queue.next_batch(0.0)


# Token limit, requests, and the lengths of the sequences in each batch.
BATCHES: dict[str, tuple[int, Requests, list[list[int]]]] = {
    "shorter sequences fill a batch": (10, [(False, [7, 7, 3])], [[7, 3], [7]]),
    "sequences of one length are together": (30, [(False, [10, 2, 2, 30, 11, 9])], [[10, 11, 9], [2, 2], [30]]),
    "bulk is last and makes no batch longer": (30, [(True, [10] * 4), (False, [9, 9])], [[9, 9], [10] * 3, [10]]),
    "any number of short sequences": (
        16_384,
        [(False, [40])] * 500 + [(True, [40] * 500)],
        [[40] * 409, [40] * 91] * 2,
    ),
    # More would stop the event loop.
    "tiny sequences": (65_536, [(False, [1] * 2000)] * 3, [[1] * 512] * 11 + [[1] * 368]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_sequences_of_a_batch(name: str) -> None:
    limit, requests, batches = BATCHES[name]
    assert [[item.tokens for item in batch] for batch in drain(filled(batcher(limit), requests))] == batches


def test_a_batch_at_the_token_limit_is_full() -> None:
    queue = batcher(batch_tokens=10)
    queue.submit(1, [9], now=0.0)
    assert not queue.has_full_batch()
    queue.submit(2, [1], now=0.0)
    assert queue.has_full_batch()
    assert filled(batcher(65_536), [(False, [1] * 2000)] * 3).has_full_batch(), "with as many sequences as one may have"


def test_a_rejection_by_a_full_queue_has_a_retry_time() -> None:
    queue = Batcher(QueueLimits(1000, 100), learned(0.0, 100.0))
    queue.submit(1, [50], now=0.0)
    assert queue.expected_wait() == pytest.approx(0.5)
    with pytest.raises(AdmissionError) as rejected:
        queue.submit(2, [60], now=0.0, busy_s=0.25)
    assert rejected.value.retry_after == pytest.approx(0.75)


def test_a_request_that_would_miss_the_slo_is_rejected_with_a_retry_time() -> None:
    queue = Batcher(QueueLimits(100, 10_000, slo_s=1.0), learned(0.1, 1000.0))
    queue.submit(1, [100] * 4, now=0.0)  # 4 batches of 0.2 s
    queue.predict_latency(50, busy_s=0.0)  # 0.8 s + 0.15 s
    with pytest.raises(AdmissionError) as rejected:
        queue.submit(2, [50], now=0.0, busy_s=0.2)
    assert rejected.value.reason == "slo"
    assert rejected.value.retry_after == pytest.approx(0.15)
    queue.submit(3, [50], now=0.0, bulk=True, busy_s=0.2)  # bulk has no deadline
    queue.slots = 2
    queue.submit(4, [50], now=0.0, busy_s=0.2)


@pytest.mark.parametrize("bulk", [False, True])
def test_a_request_that_would_wait_too_long_is_rejected_with_a_retry_time(bulk: bool) -> None:
    queue = Batcher(QueueLimits(100, 10_000, max_wait_s=1.0), learned(0.1, 1000.0))
    queue.submit(1, [100] * 5, now=0.0, bulk=bulk)  # 5 batches of 0.2 s
    queue.predict_latency(5000 - 500, bulk=bulk)  # the request's own time does not count
    with pytest.raises(AdmissionError) as rejected:
        queue.submit(2, [50], now=0.0, bulk=bulk, busy_s=0.25)
    assert (rejected.value.reason, rejected.value.retry_after) == ("max_wait", pytest.approx(0.25))
    queue.slots = 2
    queue.submit(2, [50], now=0.0, bulk=bulk, busy_s=0.25)


def waits(slots: int, max_wait_s: float | None, count: int = 30_000) -> tuple[list[float], float]:
    """Return the latencies of accepted requests at three times the load that simulated engines serve, and a rate."""
    draw, per_token, fixed = random.Random(5), 1e-4, 4e-3
    lengths = [min(256, 1 + int(draw.lognormvariate(3.7, 0.75))) for _ in range(count)]
    capacity = slots / (sum(lengths) / count * (per_token + fixed / 1024))  # requests per second
    queue = Batcher(QueueLimits(1024, 1 << 60, max_wait_s=max_wait_s), LatencyModel())
    queue.slots = slots
    events: list[tuple[float, int, int, list[QueuedSequence]]] = []  # time, number, tokens of a batch, batch
    arrivals = list(accumulate(draw.expovariate(3 * capacity) for _ in lengths))
    for number, arrival in enumerate(arrivals):
        heapq.heappush(events, (arrival, number, 0, []))
    running: list[float] = []
    latencies: list[float] = []
    now = 0.0
    while events:
        now, number, tokens, batch = heapq.heappop(events)
        if batch:
            running.remove(now)
            queue.latency.observe(tokens, fixed + per_token * tokens)
            latencies += [now - arrivals[item.request] for item in batch]
        else:
            busy_s = min(running) - now if len(running) == slots else 0.0
            with contextlib.suppress(AdmissionError):
                queue.submit(number, [lengths[number]], now, busy_s=busy_s)
        while len(running) < slots and (batch := queue.next_batch(now, free_slots=slots - len(running))):
            tokens = sum(item.tokens for item in batch)
            running.append(now + fixed + per_token * tokens)
            heapq.heappush(events, (running[-1], count + number, tokens, batch))
    return sorted(latencies), len(latencies) / now


@pytest.mark.parametrize("slots", [1, 3])
def test_accepted_requests_wait_at_most_about_the_limit_at_three_times_the_load(slots: int) -> None:
    """The latency model starts without data and is fitted to the batches of the simulated engines."""
    (bounded, rate), (unbounded, full_rate) = waits(slots, 10.0), waits(slots, None)
    assert unbounded[-1] > 30, "the load is too low for this test"
    assert 9 < bounded[int(0.99 * len(bounded))] <= bounded[-1] < 10.5
    assert rate > 0.98 * full_rate, "the engines are busy all the time"


def test_a_request_that_takes_longer_than_the_longest_wait_does_not_delay_others() -> None:
    limits = QueueLimits(64, 1_000_000, max_wait_s=10.0)
    queue = Batcher(limits, learned(0.0, 100))
    queue.submit(1, [10] * 200, now=0.0)  # 20 s
    queue.submit(2, [10], now=0.1)
    assert 2 in {item.request for item in queue.next_batch(0.2)}


def test_an_empty_queue_accepts_a_request_that_will_miss_the_slo() -> None:
    queue = Batcher(QueueLimits(100, 200, slo_s=0.1), learned(0.1, 1000.0))
    queue.submit(1, [100] * 9, now=0.0)
    assert queue.waiting_tokens == 900


def test_late_responses_make_admission_stricter_and_timely_ones_relax_it() -> None:
    queue = Batcher(QueueLimits(100, 10_000, slo_s=1.0), learned(0.0, 1000.0))
    queue.submit(1, [100] * 6, now=0.0)
    queue.predict_latency(50)
    for _ in range(100):
        queue.observe(0.5, 1.0)
    with pytest.raises(AdmissionError):
        queue.predict_latency(50)
    for _ in range(1000):
        queue.observe(0.2, 0.2)
    assert queue.predict_latency(50) == pytest.approx(0.65)


def test_the_prediction_runs_one_sequence_on_one_engine() -> None:
    queue = Batcher(QueueLimits(16_384, 100_000, slo_s=0.3), learned(0.0, 1_000.0), slots=8)
    assert queue.predict_latency(512, longest=64) == pytest.approx(0.064)
    with pytest.raises(AdmissionError):
        queue.predict_latency(512, longest=512, busy_s=0.01)


def _flooded(limits: QueueLimits, tenants: bool) -> dict[str, float]:
    """Return the share of accepted requests of a client at ten times the capacity, and of one at a tenth of it."""
    queue = Batcher(limits, learned(0.001, 64_000))
    sent, accepted = {"flood": 0, "other": 0}, {"flood": 0, "other": 0}
    busy, number = 0.0, 0
    for tick in range(4_000):
        now = tick / 1000
        for client in ["flood"] * 10 + ["other"] * (tick % 10 == 0):
            number += 1
            sent[client] += 1
            try:
                queue.submit(number, [64], now, busy_s=max(0.0, busy - now), tenant=client if tenants else None)
                accepted[client] += 1
            except AdmissionError:
                pass
        if now >= busy and (batch := queue.next_batch(now)):
            busy = now + queue.latency.seconds(sum(item.tokens for item in batch))
    return {client: accepted[client] / sent[client] for client in sent}


@pytest.mark.parametrize(
    "limits",
    [
        QueueLimits(1024, 8192),
        QueueLimits(1024, 10_000_000, max_wait_s=0.2),
        QueueLimits(1024, 10_000_000, max_wait_s=10, slo_s=0.1),
    ],
    ids=["queue_full", "max_wait", "slo"],
)
def test_one_key_does_not_take_the_queue_from_the_others(limits: QueueLimits) -> None:
    assert _flooded(limits, tenants=False)["other"] < 0.5
    shares = _flooded(limits, tenants=True)
    assert shares["other"] > 0.95
    assert shares["flood"] > 0.05


@given(REQUESTS, st.integers(0, 20))
def test_nothing_stays_held_when_the_queue_is_empty(requests: Requests, cancelled: int) -> None:
    queue = batcher()
    for number, (bulk, lengths) in enumerate(requests):
        queue.submit(number, lengths, now=0.0, bulk=bulk, tenant=f"t{number % 3}")
    queue.cancel(cancelled)
    if batch := queue.next_batch(0.0):
        queue.requeue(batch)
    drain(queue)
    assert queue._interactive.held == {} == queue._bulk.held


def test_a_key_that_waits_alone_gets_most_of_the_queue() -> None:
    queue = batcher(queue_tokens=1000)
    accepted = 0
    with pytest.raises(AdmissionError) as error:
        for number in range(100):
            queue.submit(number, [10], now=0.0, tenant="a")
            accepted += 10
    assert error.value.reason == "key_share"
    assert 700 <= accepted <= 800
    queue.submit(1000, [100], now=0.0, tenant="b")
