"""What the batcher promises, whatever is thrown at it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.serve.batcher import Batcher, Limits, QueueFullError, Work

REQUESTS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), max_size=20)


def batcher(batch_tokens: int = 64, queue_tokens: int = 1_000_000, window: int = 256) -> Batcher:
    return Batcher(Limits(batch_tokens, queue_tokens, window))


def drain(queue: Batcher) -> list[list[Work]]:
    batches = []
    while batch := queue.next_batch():
        batches.append(batch)
    return batches


@given(REQUESTS, st.integers(1, 100), st.integers(1, 30))
def test_every_sequence_comes_out_exactly_once(requests: list[list[int]], batch_tokens: int, window: int) -> None:
    queue = batcher(batch_tokens, window=window)
    for number, lengths in enumerate(requests):
        queue.submit(number, lengths, now=0.0)
    out = sorted((work.request, work.index, work.tokens) for batch in drain(queue) for work in batch)
    assert out == [(r, i, n) for r, lengths in enumerate(requests) for i, n in enumerate(lengths)]
    assert queue.waiting_tokens == 0
    assert len(queue) == 0


@given(REQUESTS, st.integers(1, 100))
def test_a_batch_keeps_the_limit_unless_one_sequence_alone_is_longer(requests: list[list[int]], limit: int) -> None:
    queue = batcher(limit)
    for number, lengths in enumerate(requests):
        queue.submit(number, lengths, now=0.0)
    for batch in drain(queue):
        assert len(batch) == 1 or sum(work.tokens for work in batch) <= limit


@given(REQUESTS, st.integers(1, 100), st.integers(1, 30))
def test_the_oldest_sequence_is_in_the_next_batch(requests: list[list[int]], limit: int, window: int) -> None:
    queue = batcher(limit, window=window)
    for number, lengths in enumerate(requests):
        queue.submit(number, lengths, now=float(number))
    waiting = [(r, i) for r, lengths in enumerate(requests) for i in range(len(lengths))]
    while batch := queue.next_batch():
        assert (batch[0].request, batch[0].index) == waiting[0]
        taken = {(work.request, work.index) for work in batch}
        waiting = [w for w in waiting if w not in taken]


@given(REQUESTS, st.data())
def test_cancelled_requests_cost_nothing_and_the_rest_is_untouched(
    requests: list[list[int]], data: st.DataObject
) -> None:
    queue = batcher()
    for number, lengths in enumerate(requests):
        queue.submit(number, lengths, now=0.0)
    gone = data.draw(st.sets(st.integers(0, max(0, len(requests) - 1))))
    for number in gone:
        queue.cancel(number)
    kept = [(r, i) for r, lengths in enumerate(requests) if r not in gone for i in range(len(lengths))]
    assert queue.waiting_tokens == sum(requests[r][i] for r, i in kept)
    assert sorted((work.request, work.index) for batch in drain(queue) for work in batch) == kept


@given(REQUESTS, st.integers(1, 200))
def test_the_queue_never_holds_more_than_its_limit_except_for_one_request(
    requests: list[list[int]], limit: int
) -> None:
    queue = batcher(queue_tokens=limit)
    for number, lengths in enumerate(requests):
        before = queue.waiting_tokens
        try:
            queue.submit(number, lengths, now=0.0)
        except QueueFullError as error:
            assert before + sum(lengths) > limit
            assert queue.waiting_tokens == before == error.waiting
        else:
            assert before == 0 or queue.waiting_tokens <= limit


@given(REQUESTS, st.integers(1, 100))
def test_the_same_calls_give_the_same_batches(requests: list[list[int]], limit: int) -> None:
    def run() -> list[list[Work]]:
        queue = batcher(limit)
        batches = []
        for number, lengths in enumerate(requests):
            queue.submit(number, lengths, now=float(number))
            if number % 3 == 0:
                batches.append(queue.next_batch())
        return batches + drain(queue)

    assert run() == run()


@given(REQUESTS.filter(bool), st.integers(20, 100))
def test_a_lost_batch_comes_back_first_and_in_order(requests: list[list[int]], limit: int) -> None:
    queue = batcher(limit)
    for number, lengths in enumerate(requests):
        queue.submit(number, lengths, now=0.0)
    waiting = queue.waiting_tokens
    lost = queue.next_batch()
    queue.requeue(lost)
    assert queue.waiting_tokens == waiting
    again = queue.next_batch()
    assert [(w.request, w.index, w.attempt) for w in again[: len(lost)]] == [(w.request, w.index, 1) for w in lost]


def test_shorter_sequences_fill_the_room_that_a_long_one_leaves() -> None:
    queue = batcher(batch_tokens=10)
    queue.submit(1, [7, 7, 3], now=0.0)
    assert [[work.tokens for work in batch] for batch in drain(queue)] == [[7, 3], [7]]


def test_a_batch_that_cannot_grow_is_full() -> None:
    queue = batcher(batch_tokens=10)
    queue.submit(1, [9], now=0.0)
    assert not queue.has_full_batch()
    queue.submit(2, [1], now=0.0)
    assert queue.has_full_batch()


def test_the_wait_to_expect_follows_the_speed_seen() -> None:
    queue = batcher(queue_tokens=100)
    queue.submit(1, [50], now=0.0)
    queue.observe(tokens=1000, seconds=10.0)
    assert queue.expected_wait() == pytest.approx(0.5)
    with pytest.raises(QueueFullError) as refused:
        queue.submit(2, [60], now=0.0)
    assert refused.value.retry_after == pytest.approx(0.5)
