"""Limits: never above the limit in any 60 s, and counters that survive lost, doubled and reordered messages."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferctl.batching.fairness import Shares
from inferctl.tenancy.access import limits
from inferctl.tenancy.access.limits import CELL_S, Charge, Counters, KeyUsage, LimitError

START = 1_700_000_000.0
KEY = "aaaaaaaaaaaa"


class Limiter(limits.Limiter):
    """One for keys that have all the same limits."""

    def __init__(self, requests: int | None = None, tokens: int | None = None, replicas: int = 1, **more: bool) -> None:
        super().__init__(replicas, **more)
        self.limits = requests, tokens

    def of(self, key_id: str, now: float) -> KeyUsage:
        return self.usage(key_id, self.limits, now)


def charge(limiter: Limiter, who: str, now: float, tokens: int = 0) -> Charge | None:
    """Charge a request and its tokens; None if a limit rejects it."""
    usage = limiter.of(who, now)
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


@given(ARRIVALS, st.integers(1, 100), st.booleans())
def test_never_above_the_limit_in_any_minute(arrivals: list[tuple[float, int]], limit: int, of_tokens: bool) -> None:
    limiter = Limiter(tokens=limit) if of_tokens else Limiter(requests=limit, tokens=100_000)
    who, now = KEY, START
    admitted = []
    for gap, amount in arrivals:
        now += gap
        if charge(limiter, who, now, amount):
            admitted.append((now, amount if of_tokens else 1))
    assert worst(admitted) <= limit
    # A request is rejected only if others used the limit.
    assert of_tokens or len(admitted) >= min(limit, len(arrivals))


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50), st.integers(0, 50), st.floats(0, 90)), max_size=40))
def test_generation_never_uses_more_than_the_limit(requests: list[tuple[float, int, int, float]]) -> None:
    """A request reserves the most that it can use, and settles less, some time later."""
    limiter, who, now = Limiter(tokens=100), KEY, START
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
    after = limiter.of(who, now + 1000)
    assert after.quotas(now + 1000) == (None, (100, 100, 0))  # nothing stays reserved


@pytest.mark.parametrize(
    ("size", "tokens", "left"),
    [(255, 0, 100), (0, 30, 70), (2_560, 0, 90), (2_560, 4, 90), (2_560, 30, 70), (25_600, 7, 0)],
)
def test_a_body_costs_at_least_a_token_for_256_bytes(size: int, tokens: int, left: int) -> None:
    """333 bodies of 4 MB were read and parsed for 999 tokens."""
    limiter, who = Limiter(tokens=100), KEY
    found = charge(limiter, who, START)
    usage = limiter.of(who, START)
    assert found
    found.charge_body(0, START)  # of a client that did not declare it
    found.charge_body(size, START)
    found.tokens(tokens, START + 1)
    assert (usage.quotas(START + 1)[1] or ())[:2] == (100, left)
    found.close(give_back=True, computed=tokens)
    assert (usage.quotas(START + 1)[1] or ())[:2] == (100, 100 - tokens)


def test_a_reservation_and_its_end_replace_what_a_body_cost() -> None:
    limiter, who = Limiter(tokens=100), KEY
    found = charge(limiter, who, START)
    usage = limiter.of(who, START)
    assert found
    found.charge_body(2_560, START)
    found.reserve(50, START)
    assert (usage.quotas(START)[1] or ())[:2] == (100, 50)
    found.settle(20, START)
    assert (usage.quotas(START)[1] or ())[:2] == (100, 80)
    with pytest.raises(LimitError, match="about 98 tokens for its 25300 bytes"):
        Charge(usage, START).charge_body(25_300, START)


def test_the_wait_is_exact() -> None:
    limiter, who = Limiter(tokens=100), KEY
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


def test_no_more_than_the_limit_is_tokenized_in_vain() -> None:
    limiter, who = Limiter(tokens=1000), KEY
    usage = limiter.of(who, START)
    assert charge(limiter, who, START, 400)
    usage.check_size(1_000_000, START)  # tokenized, and rejected
    assert charge(limiter, who, START, 900) is None
    usage.check_size(1_000_000, START + 5)
    assert charge(limiter, who, START + 5, 900) is None
    for size in (601, 1_000_000):
        with pytest.raises(LimitError, match="the request needs about") as error:
            usage.check_size(size, START + 10)
        assert error.value.retry_after == 65 - 10
    usage.check_size(600, START + 10)  # fits for sure
    assert charge(limiter, who, START + 10, 600)
    usage.check_size(1_000_000, START + 65)


def test_a_request_of_a_key_without_tokens_is_not_tokenized() -> None:
    limiter, who = Limiter(tokens=1000), KEY
    usage = limiter.of(who, START)
    assert charge(limiter, who, START, 600)
    assert charge(limiter, who, START + 20, 400)
    for size, wait in ((0, 45), (40, 45), (2400, 45), (2404, 65), (1_000_000, 65)):
        with pytest.raises(LimitError) as error:
            usage.check_size(size, START + 20)
        assert error.value.retry_after == wait


def test_the_limits_of_a_key_may_change() -> None:
    limiter = Limiter(requests=2)
    assert charge(limiter, KEY, START)
    assert charge(limiter, KEY, START)
    assert charge(limiter, KEY, START) is None
    assert charge(limiter, "bbbbbbbbbbbb", START)
    limiter.limits = (3, None)
    assert charge(limiter, KEY, START)
    assert charge(limiter, KEY, START) is None


@pytest.mark.parametrize("step", [-30.0, -3600.0, 3600.0])
def test_a_clock_that_is_set_does_not_block_a_key(step: float) -> None:
    limiter, who = Limiter(requests=10), KEY
    assert sum(bool(charge(limiter, who, START)) for _ in range(20)) == 10
    assert sum(bool(charge(limiter, who, START + step)) for _ in range(20)) == (0 if abs(step) < 60 else 10)
    assert charge(limiter, who, START + step + 130)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2), st.integers(1, 40)), max_size=60))
def test_without_exchange_three_servers_together_stay_below_the_limit(
    arrivals: list[tuple[float, int, int]],
) -> None:
    servers, who, now = [Limiter(tokens=100, replicas=3) for _ in range(3)], KEY, START
    admitted = []
    for gap, server, amount in arrivals:
        now += gap
        if charge(servers[server], who, now, amount):
            admitted.append((now, amount))
    assert worst(admitted) <= 100


class Replica:
    """A server that charges, gives back, and sends its counters."""

    def __init__(self) -> None:
        self.limiter, self.open = Limiter(tokens=10**9, exchanges=True), list[Charge]()

    def act(self, amount: int, give_back: bool, now: float) -> None:
        if give_back and self.open:
            self.open.pop().close(give_back=True)
        else:
            found = charge(self.limiter, KEY, now, amount)
            assert found
            self.open.append(found)

    def total(self, now: float) -> int:
        found = self.limiter.next_counters(now).get("", {}).get(KEY)
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
        limiter = replicas[index].limiter
        messages += [
            (f"r{index}.boot", counters) for counters in (limiter.changes(now), limiter.next_counters(now)[""])
        ]
    delivered = data.draw(st.lists(st.sampled_from(messages), max_size=60)) if messages else []
    seen: dict[tuple[str, int], tuple[int, int]] = {}
    for name, counters in delivered:
        receiver.merge(name, counters, now)
        usage = receiver._usages[KEY]
        for replica, cells in usage.windows[1].foreign.items():
            for cell, counts in cells.items():
                before = seen.get((replica, cell), (0, 0))
                assert counts[0] >= before[0]
                assert counts[1] >= before[1]
                seen[replica, cell] = counts
    for index, replica in enumerate(replicas):  # the last state of each arrives, twice
        for _ in range(2):
            receiver.merge(f"r{index}.boot", replica.limiter.next_counters(now).get("", {}), now)
    if KEY in receiver._usages:
        window = receiver._usages[KEY].windows[1]
        window.advance(int(now // CELL_S))
        assert window.foreign_total == sum(replica.total(now) for replica in replicas)
        assert window.own_total == 0  # what was imported is never published again
    assert receiver.changes(now) == {}
    assert "" not in receiver.next_counters(now)


class Fleet:
    """Servers that send each other their counters, in messages of (sender, server that charged, counters)."""

    def __init__(self, replicas: int, **limits: int) -> None:
        self.servers = [Limiter(**limits, replicas=replicas, exchanges=True) for _ in range(replicas)]
        self.names = [f"r{number}" for number in range(replicas)]

    def messages(self, index: int, now: float) -> list[tuple[str, str, Counters]]:
        limiter, name = self.servers[index], self.names[index]
        found = [(name, name, limiter.changes(now))]
        return found + [(name, server or name, counters) for server, counters in limiter.next_counters(now).items()]

    def deliver(self, index: int, messages: list[tuple[str, str, Counters]], sent: float, now: float) -> None:
        for sender, server, counters in messages:
            if server != self.names[index]:
                self.servers[index].merge(server, counters, now)
            self.servers[index].heard(sender, sent, now)
        self.servers[index].update(now)

    def exchange(self, now: float) -> None:
        """Let every server hear of all others."""
        every = [self.messages(index, now) for index in range(len(self.servers))]
        for to, sender in itertools.permutations(range(len(self.servers)), 2):
            self.deliver(to, every[sender], now, now)


def admitted(server: Limiter, now: float, requests: int = 50) -> int:
    return sum(bool(charge(server, KEY, now)) for _ in range(requests))


def test_with_exchange_the_whole_limit_is_shared() -> None:
    fleet = Fleet(3, requests=90)
    a, b, c = fleet.servers
    fleet.exchange(START)
    assert admitted(a, START) == 30, "the others may have admitted as many since they were heard"
    usage = a.of(KEY, START)
    assert usage and usage.quotas(START)[0] == (90, 60, 65)
    with pytest.raises(LimitError, match="used its share") as error:
        Charge(usage, START)
    assert error.value.retry_after == 1
    for step in range(1, 40):  # all requests of the key go to one server, which gets the whole limit
        fleet.exchange(START + step / 4)
        admitted(a, START + step / 4, 20)
    end = START + 10
    assert a.of(KEY, end).quotas(end)[0][:2] == (90, 0)  # type: ignore[index]
    assert admitted(b, end) == admitted(c, end) == 0


def test_a_request_larger_than_the_share_of_a_server_fits_with_exchange_only() -> None:
    fleet = Fleet(3, tokens=90)
    with pytest.raises(LimitError, match="is 30 tokens per minute") as error:
        fleet.servers[0].of(KEY, START).check(1, 80, START)
    assert error.value.retry_after is None
    fleet.exchange(START)
    assert charge(fleet.servers[0], KEY, START, 80)
    fleet.exchange(START + 1)
    assert charge(fleet.servers[1], KEY, START + 1, 80) is None
    assert charge(fleet.servers[1], KEY, START + 1, 10)


def test_without_the_broker_what_was_heard_still_counts() -> None:
    fleet = Fleet(3, requests=90)
    for step in range(60):
        fleet.exchange(START + step / 10)
        admitted(fleet.servers[0], START + step / 10, 1)
    total = 60
    for second in range(6, 64):  # nobody hears of the others any more
        total += sum(admitted(server, START + second) for server in fleet.servers)
    assert 60 < total <= 90
    total = sum(admitted(server, START + 200) for server in fleet.servers)
    assert total == 90, "30 on each server"


def test_a_silent_server_counts_as_busy_and_one_that_was_started_again_does_not() -> None:
    fleet = Fleet(3, requests=90)
    fleet.exchange(START)
    fleet.servers.pop()
    for step in range(200):
        now = START + step / 4
        fleet.exchange(now)
        admitted(fleet.servers[step % 2], now, 2)
    used = sum(usage.windows[0].own_total for server in fleet.servers for usage in server._usages.values())
    assert 50 <= used <= 60, "30 are left for the server that is not heard"
    fleet.servers.append(Limiter(requests=90, replicas=3, exchanges=True))
    fleet.names[2] = "r2.again"
    for step in range(200, 230):
        fleet.exchange(START + step / 4)
        admitted(fleet.servers[0], START + step / 4, 2)
    assert 85 <= sum(usage.windows[0].own_total for each in fleet.servers for usage in each._usages.values()) <= 90


def test_a_server_that_starts_hears_of_those_that_ended() -> None:
    fleet = Fleet(2, requests=90)
    ended = Limiter(requests=90)
    assert admitted(ended, START, 50) == 50
    for index in range(2):
        fleet.deliver(index, [("ended", "ended", ended_counters(ended))], START, START)
    for server in fleet.servers:
        assert server.of(KEY, START)
    started = Fleet(1, requests=90)
    started.names = ["started"]
    for step in range(1, 100):
        now = START + step / 10
        fleet.exchange(now)
        started.deliver(0, fleet.messages(0, now), now, now)
    usage = started.servers[0].of(KEY, START + 10)
    assert usage and usage.windows[0].foreign_total == 50


def ended_counters(limiter: Limiter) -> Counters:
    return limiter.next_counters(START)[""]


@given(
    st.integers(0, 10**9),
    st.sampled_from(["even", "one server", "bursts"]),
    st.floats(0.01, 0.3),
    st.floats(0, 0.5),
    st.sampled_from([(0.0, 0.0), (3.0, 30.0), (20.0, 90.0)]),
    st.integers(1, 8),
)
@settings(max_examples=15, deadline=None)
def test_ten_times_the_limit_on_three_servers_stays_within_a_request_each(
    seed: int, shape: str, delay: float, loss: float, outage: tuple[float, float], largest: int
) -> None:
    """Messages arrive late, in any order, twice or not at all, and for some time none arrives."""
    draw, fleet, limit = random.Random(seed), Fleet(3, tokens=200), 200
    acts: list[tuple[float, int, str, object]] = []
    for number in range(int(85 * 10 * limit / 60 / (largest + 1) * 2)):
        at = draw.uniform(0, 85) if shape != "bursts" else draw.randrange(0, 85, 8) + draw.uniform(0, 0.01)
        server = 0 if shape == "one server" else draw.randrange(3)
        acts.append((at, number, "request", (server, draw.randint(1, largest))))
    acts += [(tick / 10 + each / 30, -1 - 3 * tick - each, "send", each) for tick in range(850) for each in range(3)]
    heapq.heapify(acts)
    found, count = list[tuple[float, int]](), itertools.count(10**6)
    while acts:
        at, _, what, detail = heapq.heappop(acts)
        now = START + at
        if what == "request":
            server, amount = detail  # type: ignore[misc]
            if charge(fleet.servers[server], KEY, now, amount):
                found.append((now, amount))
        elif what == "send":
            sender: int = detail  # type: ignore[assignment]
            messages = fleet.messages(sender, now)
            for to in {0, 1, 2} - {sender}:
                for _ in range(draw.choice([1, 1, 2])):
                    if draw.random() >= loss / 4 and not outage[0] <= at < outage[1]:
                        heapq.heappush(acts, (at + draw.uniform(0, delay), next(count), "hear", (to, messages, now)))
        else:
            to, messages, sent = detail  # type: ignore[misc]
            fleet.deliver(to, messages, sent, now)
    assert worst(found) <= limit + 2 * largest


@pytest.mark.parametrize("heard_after", [0, 20])
def test_a_clock_that_is_set_back_before_the_others_are_silent_does_not_multiply_the_limit(heard_after: int) -> None:
    fleet, now = Fleet(3, requests=300), START - 3600
    fleet.exchange(START)
    for step in range(heard_after):
        fleet.exchange(now + step / 10)
    now += 32 if heard_after else 0
    for server in fleet.servers:
        server.update(now)
    assert [admitted(server, now, 1000) for server in fleet.servers] == [100] * 3


def test_many_changes_are_sent_in_parts_and_the_time_says_up_to_when() -> None:
    limiter = Limiter(requests=5, exchanges=True, replicas=2)
    limiter.changes(START)
    for number in range(1200):
        charge(limiter, f"{number:012}", START + 0.05)
    found, times = list[Counters](), list[float]()
    for step in range(1, 4):
        found.append(limiter.changes(START + step / 10))
        times.append(limiter.sent_up_to(START + step / 10))
        if step == 1:  # again, while others wait: its turn comes after theirs
            charge(limiter, "0" * 12, START + 0.15)
    assert [len(each) for each in found] == [500, 500, 201]
    assert times == [START, START, START + 0.3]
    assert found[2]["0" * 12] == ({int(START // CELL_S): (2, 0)}, {})


def test_what_was_left_out_of_changes_is_sent_with_the_rest() -> None:
    limiter = Limiter(requests=5, exchanges=True, replicas=2)
    limiter.changes(START)
    for number in range(1200):
        charge(limiter, f"{number:012}", START + 0.05)
    limiter.send_all()
    seen = set[str]()
    for step in range(1, 4):
        limiter.send_all()  # any number of messages: all keys get their turn
        assert limiter.changes(START + step / 10) == {}
        seen |= set(limiter.next_counters(START + step / 10)[""])
        assert limiter.sent_up_to(START + step / 10) == (START if step < 3 else START + 0.3)
    assert len(seen) == 1200


def test_forged_servers_do_not_take_the_whole_limit() -> None:
    limiter = Limiter(requests=6000, exchanges=True, replicas=3)
    limiter.heard("peer", START, START)
    for number in range(5000):
        limiter.heard(f"f{number}", START, START)
        limiter.merge(f"f{number}", {KEY: ({int(START // CELL_S): (1, 0)}, {})}, START)
    limiter.update(START)
    assert limiter.others == 22
    assert "peer" in limiter._heard
    assert limiter._usages[KEY].windows[0].foreign_total == 44
    limiter.heard("new", START + 4, START + 4)  # silent ones make room
    assert "new" in limiter._heard


def test_many_keys_do_not_stay_in_memory() -> None:
    limiter = Limiter(requests=5)
    for number, now in itertools.product(range(3), [START]):
        for each in range(9_000):
            charge(limiter, f"{number:03}{each:09}", now + 100 * number)
    assert len(limiter._usages) <= 20_000


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.booleans()), max_size=80), st.booleans())
def test_a_tenant_that_holds_nothing_finds_room(acts: list[tuple[str, int, bool]], strict: bool) -> None:
    shares, taken = Shares(100), list[tuple[str, int]]()
    for tenant, amount, release in acts:
        if release and taken:
            shares.release(*taken.pop())
            continue
        held = sum(each for name, each in taken if name == tenant)
        free = 100 - sum(each for _, each in taken)
        accepted = shares.take(tenant, amount, strict=strict)
        fits = held + amount <= 4 * (free - amount + 1) if strict else held == 0 or held + amount <= 4 * free
        assert accepted == fits
        if accepted:
            taken.append((tenant, amount))
    while taken:
        shares.release(*taken.pop())
    assert shares._held == {}
    assert shares._total == 0
