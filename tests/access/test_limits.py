"""Limits: never above the limit in any 60 s, and counters that survive lost, doubled and reordered messages."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferctl.access.fairness import Shares
from inferctl.access.key_file import ApiKey
from inferctl.access.limits import CELL_S, Charge, Counters, Limiter, LimitError

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
START = 1_700_000_000.0


def key(key_id: str = "aaaaaaaaaaaa", **fields: object) -> ApiKey:
    return ApiKey.model_validate({"id": key_id, "name": "k", "digests": [], "created": CREATED, **fields})


def charge(limiter: Limiter, who: ApiKey, now: float, tokens: int = 0) -> Charge | None:
    """Charge a request and its tokens; None if a limit rejects it."""
    usage = limiter.usage(who, now)
    assert usage is not None
    try:
        found = Charge(usage, now)
    except LimitError:
        return None
    if tokens:
        try:
            found.tokens(tokens, now)
        except LimitError:
            found.close(give_back=True)
            return None
    return found


def worst(admitted: list[tuple[float, int]]) -> int:
    """Return the largest sum of any 60 s."""
    return max((sum(n for t, n in admitted if end - 60 < t <= end) for end, _ in admitted), default=0)


ARRIVALS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60)


@given(ARRIVALS, st.integers(1, 100))
def test_never_above_the_limit_in_any_minute(arrivals: list[tuple[float, int]], limit: int) -> None:
    limiter, who, now = Limiter(tokens=limit), key(), START
    admitted = []
    for gap, amount in arrivals:
        now += gap
        if charge(limiter, who, now, amount):
            admitted.append((now, amount))
    assert worst(admitted) <= limit


@given(ARRIVALS, st.integers(1, 30))
def test_requests_and_tokens_have_windows_of_their_own(arrivals: list[tuple[float, int]], limit: int) -> None:
    limiter, who, now = Limiter(requests=limit, tokens=100_000), key(), START
    admitted = []
    for gap, amount in arrivals:
        now += gap
        if charge(limiter, who, now, amount):
            admitted.append((now, 1))
    assert worst(admitted) <= limit
    # A request is rejected only if the limit is used in the 65 s before it.
    rejected = len(arrivals) - len(admitted)
    assert rejected == 0 or len(admitted) >= limit


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50), st.integers(0, 50), st.floats(0, 90)), max_size=40))
def test_generation_never_uses_more_than_the_limit(requests: list[tuple[float, int, int, float]]) -> None:
    """A request reserves the most that it can use, and settles less, some time later."""
    limiter, who, now = Limiter(tokens=100), key(), START
    running: list[tuple[float, int, Charge]] = []
    used = []

    def settle(until: float) -> None:
        for end, amount, each in sorted(running, key=lambda item: item[0]):
            if end <= until:
                each.settle(amount, end)
                each.close(give_back=False)
                used.append((end, amount))
                running.remove((end, amount, each))

    for gap, reserved, share, seconds in requests:
        now += gap
        settle(now)
        found = charge(limiter, who, now)
        assert found
        try:
            found.reserve(reserved, now)
        except LimitError:
            found.close(give_back=True)
        else:
            running.append((now + seconds, reserved * share // 50, found))
    settle(float("inf"))
    assert worst(used) <= 100
    after = limiter.usage(who, now + 1000)
    assert after and after.quotas(now + 1000) == (None, (100, 100, 0))  # nothing stays reserved


def test_what_was_not_computed_is_given_back() -> None:
    limiter, who = Limiter(requests=2, tokens=10), key()
    for _ in range(5):
        found = charge(limiter, who, START, 10)
        assert found
        found.close(give_back=True)
    assert charge(limiter, who, START, 10)
    assert charge(limiter, who, START)
    full = limiter.usage(who, START)
    assert full
    with pytest.raises(LimitError) as error:
        Charge(full, START)
    assert error.value.resource == "requests"


def test_the_wait_is_exact() -> None:
    limiter, who = Limiter(tokens=100), key()
    assert charge(limiter, who, START, 60)
    assert charge(limiter, who, START + 20, 40)
    found = charge(limiter, who, START + 30)
    assert found
    with pytest.raises(LimitError) as error:
        found.tokens(50, START + 30)
    wait = error.value.retry_after
    assert wait == 65 - 30
    assert charge(limiter, who, START + 30 + wait - 0.001, 50) is None
    assert charge(limiter, who, START + 30 + wait, 50)


def test_what_never_fits_says_so() -> None:
    found = charge(Limiter(tokens=100), key(), START)
    assert found
    with pytest.raises(LimitError, match="needs 101 tokens") as error:
        found.tokens(101, START)
    assert error.value.retry_after is None


def test_a_key_has_its_own_limits_which_may_change() -> None:
    limiter = Limiter(requests=1)
    assert charge(limiter, key(requests_per_minute=2), START)
    assert charge(limiter, key(requests_per_minute=2), START)
    assert charge(limiter, key(requests_per_minute=2), START) is None
    assert charge(limiter, key(requests_per_minute=3), START)
    assert charge(limiter, key(), START) is None
    assert charge(limiter, key("bbbbbbbbbbbb"), START)
    assert Limiter().usage(key(), START) is None


@pytest.mark.parametrize("step", [-30.0, -3600.0, 3600.0])
def test_a_clock_that_is_set_does_not_block_a_key(step: float) -> None:
    limiter, who = Limiter(requests=10), key()
    assert sum(bool(charge(limiter, who, START)) for _ in range(20)) == 10
    assert sum(bool(charge(limiter, who, START + step)) for _ in range(20)) == (0 if abs(step) < 60 else 10)
    assert charge(limiter, who, START + step + 130)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2), st.integers(1, 40)), max_size=60))
def test_without_exchange_three_servers_together_stay_below_the_limit(
    arrivals: list[tuple[float, int, int]],
) -> None:
    servers, who, now = [Limiter(tokens=100, replicas=3) for _ in range(3)], key(), START
    admitted = []
    for gap, server, amount in arrivals:
        now += gap
        if charge(servers[server], who, now, amount):
            admitted.append((now, amount))
    assert worst(admitted) <= 100


class Replica:
    """A server that charges, gives back, and sends its counters."""

    def __init__(self) -> None:
        self.limiter, self.open = Limiter(tokens=10**9), list[Charge]()

    def act(self, amount: int, give_back: bool, now: float) -> None:
        if give_back and self.open:
            self.open.pop().close(give_back=True)
        else:
            found = charge(self.limiter, key(), now, amount)
            assert found
            self.open.append(found)

    def total(self, now: float) -> int:
        found = self.limiter.counters(now).get(key().id)
        return sum(charged - returned for charged, returned in found[1].values()) if found else 0


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 50), st.booleans(), st.floats(0, 4)), max_size=30),
    st.data(),
)
def test_lost_doubled_and_reordered_counters_never_count_twice(
    acts: list[tuple[int, int, bool, float]], data: st.DataObject
) -> None:
    replicas, receiver, now = [Replica(), Replica()], Limiter(tokens=10**9), START
    messages: list[tuple[str, Counters]] = []
    for index, amount, give_back, gap in acts:
        now += gap
        replicas[index].act(amount, give_back, now)
        messages.append((f"r{index}.boot", replicas[index].limiter.counters(now)))
    delivered = data.draw(st.lists(st.sampled_from(messages), max_size=60)) if messages else []
    seen: dict[tuple[str, int], tuple[int, int]] = {}
    for name, counters in delivered:
        receiver.merge(name, counters, now, lambda _: key())
        usage = receiver._usages[key().id]
        for replica, cells in usage.windows[1]._foreign.items():
            for cell, counts in cells.items():
                before = seen.get((replica, cell), (0, 0))
                assert counts[0] >= before[0]
                assert counts[1] >= before[1]
                seen[replica, cell] = counts
    for index, replica in enumerate(replicas):  # the last state of each arrives, twice
        for _ in range(2):
            receiver.merge(f"r{index}.boot", replica.limiter.counters(now), now, lambda _: key())
    if key().id in receiver._usages:
        window = receiver._usages[key().id].windows[1]
        window.advance(int(now // CELL_S))
        assert window.foreign_total == sum(replica.total(now) for replica in replicas)
        assert window.own_total == 0  # what was imported is never published again
    assert receiver.counters(now) == {}


def test_with_exchange_the_whole_limit_is_shared_until_it_stops() -> None:
    a, b, who = Limiter(tokens=90, replicas=3), Limiter(tokens=90, replicas=3), key()
    assert charge(a, who, START, 30)
    assert charge(a, who, START, 1) is None
    b.merge("a.1", a.counters(START), START, lambda _: who)
    assert charge(b, who, START, 60)
    assert charge(b, who, START, 1) is None
    a.merge("b.1", b.counters(START), START, lambda _: who)
    assert charge(a, who, START, 1) is None
    # No more counters arrive: each server applies its share again.
    assert charge(b, who, START + 66, 30)
    assert charge(b, who, START + 66, 1) is None


def test_many_keys_do_not_stay_in_memory() -> None:
    limiter = Limiter(requests=5)
    for number, now in itertools.product(range(3), [START]):
        for each in range(9_000):
            charge(limiter, key(f"{number:03}{each:09}"), now + 100 * number)
    assert len(limiter._usages) <= 20_000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.booleans()), max_size=80))
def test_a_tenant_that_holds_nothing_finds_room(acts: list[tuple[str, int, bool]]) -> None:
    shares, taken = Shares(100), list[tuple[str, int]]()
    for tenant, amount, release in acts:
        if release and taken:
            shares.release(*taken.pop())
            continue
        held = sum(each for name, each in taken if name == tenant)
        free = 100 - sum(each for _, each in taken)
        accepted = shares.take(tenant, amount)
        assert accepted == (held == 0 or held + amount <= 4 * free)
        if accepted:
            taken.append((tenant, amount))
    while taken:
        shares.release(*taken.pop())
    assert shares._held == {}
    assert shares._total == 0
