"""The number of users that saturates a server: `users: auto` in a plan.

    for each configuration:  start its server ─► 8, 16, 32, ... users ─► requests/s stop growing ─► stop it
    for all configurations:  the largest number of users that one of the fast ones needs

A load that saturates no server shows no difference between configurations: each responds as fast as its clients send.
A server that is far slower than another one does not decide, because it loses with any number of users, and its noisy
steps would set the load of all. A server that rejects requests does not decide either: its users wait. One that emulates
its precision is not searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inferctl.bench.judge.validity import CLIENT_CPU_LIMIT
from inferctl.core.errors import InferctlError
from inferctl.receipts.shares import P99_SHARE

FIRST_USERS, MAX_USERS = 8, 1024
# The load is saturating if requests/s grow by less than this share, with twice the users and again with four times.
GROWTH = 0.05
# Measurements of each step that decides. With noise of 10% per step and a server that needs 40 users for half of its
# rate, a second one lowers false saturation from 32% to 13% of the searches, and results under 85% of the highest rate
# from 10% to 3%.
REPEATS = 2
# Duration of a step and of its warm-up, in seconds. A step is longer if a request takes longer.
STEP_S, MAX_STEP_S, WINDOW_S = 2.0, 8.0, 0.3
# After three numbers of users, the users are not doubled if a request would then take longer than this. The longest
# step has fewer than four requests per user there, and on a busy machine its noise looks like growth: up to 1024 users.
MAX_LATENCY_S = 2.0
# What ended the steps.
SERVER, GENERATOR, USERS, REJECTIONS, LATENCY = "server", "load generator", "users", "rejections", "latency"
# Of a server that was not searched.
EMULATED = "emulated"
# A server with less than this share of the requests/s of the fastest one does not decide the users of all.
FAR_SLOWER = 0.5


@dataclass(frozen=True)
class Step:
    """The result of a short closed loop."""

    users: int
    requests_per_s: float
    client_cpu_percent: float | None
    rejected_percent: float = 0.0


@dataclass(frozen=True)
class Concurrency:
    """The users that a server needs (`needed_users`), and the users of the load that all configurations receive.

    `limited_by` says what ended the steps: the server (it is saturated), the load generator, the limit of users, the
    latency, or rejections: then `needed_users` is the last number without them. An emulated server has no steps, and
    the users of the others.
    """

    users: int
    needed_users: int
    limited_by: str
    steps: tuple[Step, ...]

    @property
    def saturated(self) -> bool:
        return self.limited_by == SERVER and self.users >= self.needed_users

    @property
    def highest_rate(self) -> float:
        """The highest requests/s of a step."""
        return max(step.requests_per_s for step in _means(self.steps))

    def as_dict(self) -> dict[str, Any]:
        """Return the `concurrency` key of a receipt."""
        return asdict(self) | {"saturated": self.saturated}


def step_seconds(users: int, steps: Sequence[Step]) -> float:
    """Return the duration of a step: long enough for ten requests per user at the last requests/s."""
    rate = steps[-1].requests_per_s if steps else 0
    return min(max(STEP_S, 10 * users / rate), MAX_STEP_S) if rate else STEP_S


def find(measure: Callable[[int, float], Step]) -> Concurrency:
    """Double the users until requests/s no longer grow; `measure` receives users and seconds.

    Raises `InferctlError` if the server completes no request.
    """
    steps: list[Step] = []
    users = FIRST_USERS
    while users <= MAX_USERS:
        step = measure(users, step_seconds(users, steps))
        steps.append(step if step.requests_per_s else measure(users, MAX_STEP_S))
        if not any(step.requests_per_s for step in steps):
            raise InferctlError(f"the server completed no request of {users} users", "see the server's own log")
        if steps[-1].rejected_percent > 100 * P99_SHARE:
            return _result(steps[max(0, len(steps) - 2)].users, REJECTIONS, steps)
        if (steps[-1].client_cpu_percent or 0) > CLIENT_CPU_LIMIT:
            return _result(steps[max(0, len(steps) - 2)].users, GENERATOR, steps)
        if _stopped_growing(_means(steps)):
            # These steps were chosen because they grew little, so some of them are low by chance: repeat them.
            seconds = min(2 * step_seconds(users, steps), MAX_STEP_S)
            steps += [measure(step.users, seconds) for step in _decisive(steps) for _ in range(REPEATS - 1)]
            means = _means(steps)
            if _stopped_growing(means):
                return _result(_needed(means), SERVER, steps)
        users *= 2
        means = _means(steps)
        if len(means) >= 3 and users > MAX_LATENCY_S * max(step.requests_per_s for step in means):
            return _result(_needed(means), LATENCY, steps)
    return _result(steps[-1].users, USERS, steps)


def shared(every: Sequence[Concurrency | None]) -> list[Concurrency]:
    """Return the results of configurations with equal loads, with the number of users that all receive.

    None stands for a server that was not searched; at least one was. If all servers reject requests, it is the largest
    number that none rejects.
    """
    found = [each for each in every if each]
    accepting = [each for each in found if each.limited_by != REJECTIONS]
    least = FAR_SLOWER * max((each.highest_rate for each in accepting), default=0)
    deciding = [each.needed_users for each in accepting if each.highest_rate >= least]
    users = max(deciding) if deciding else min(each.needed_users for each in found)
    return [replace(each, users=users) if each else _result(users, EMULATED, ()) for each in every]


def _result(users: int, limited_by: str, steps: Sequence[Step]) -> Concurrency:
    return Concurrency(users, users, limited_by, tuple(steps))


def _decisive(steps: Sequence[Step]) -> list[Step]:
    """Return the steps that decide whether requests/s grow: the best one before the last two, and the last two."""
    means = _means(steps)
    return [max(means[:-2], key=lambda step: step.requests_per_s), *means[-2:]]


def _means(steps: Sequence[Step]) -> list[Step]:
    """Return one step per number of users, in ascending order, with the mean of its requests/s."""
    rates: dict[int, list[float]] = {}
    for step in steps:
        rates.setdefault(step.users, []).append(step.requests_per_s)
    return [Step(users, sum(values) / len(values), None) for users, values in sorted(rates.items())]


def _stopped_growing(steps: Sequence[Step]) -> bool:
    """Return whether neither of the last two steps exceeds the earlier ones. One slow step may be a disturbance."""
    if len(steps) < 3:
        return False
    before = max(step.requests_per_s for step in steps[:-2])
    return all(step.requests_per_s < before * (1 + GROWTH) for step in steps[-2:])


def _needed(steps: Sequence[Step]) -> int:
    most = max(step.requests_per_s for step in steps)
    return next(step.users for step in steps if step.requests_per_s * (1 + GROWTH) >= most)
