"""The number of users that saturates a server: `users: auto` in a plan.

    for each configuration:  start its server ─► 8, 16, 32, ... users ─► requests/s stop growing ─► stop it
    for all of them:         the most users that one of them needs

Configurations tie where the load saturates none of them: each then answers as fast as its clients ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inferctl.bench.judge.validity import CLIENT_CPU_LIMIT
from inferctl.errors import InferctlError

FIRST, MOST = 8, 1024
# Growth of requests/s that does not count, with twice the users and again twice.
GROWTH = 0.05
# Seconds of a step, and of its warm-up. They are longer where a request takes longer.
STEP_S, LONGEST_S, WINDOW_S = 2.0, 8.0, 0.3
SERVER, GENERATOR, USERS = "server", "load generator", "users"


@dataclass(frozen=True)
class Step:
    """A short closed loop."""

    users: int
    requests_per_s: float
    client_cpu_percent: float | None


@dataclass(frozen=True)
class Found:
    """The users that a server needs. `limited_by` ended the steps: server (saturated), load generator or users."""

    users: int
    limited_by: str
    steps: tuple[Step, ...]

    @property
    def saturated(self) -> bool:
        return self.limited_by == SERVER

    def as_dict(self, users: int) -> dict[str, Any]:
        """Return the `concurrency` key of a receipt; `users` is the load of all configurations."""
        return {
            "users": users,
            "needed_users": self.users,
            "saturated": self.saturated,
            "limited_by": self.limited_by,
            "steps": [asdict(step) for step in self.steps],
        }


def seconds(users: int, steps: Sequence[Step]) -> float:
    """Return how long a step lasts: each user should send ten requests."""
    known = steps[-1].requests_per_s if steps else 0
    return min(max(STEP_S, 10 * users / known), LONGEST_S) if known else STEP_S


def find(measure: Callable[[int, float], Step]) -> Found:
    """Double the users until requests/s no longer grow; `measure` receives users and seconds.

    Raises `InferctlError` if the server answers nothing.
    """
    steps: list[Step] = []
    users = FIRST
    while users <= MOST:
        made = measure(users, seconds(users, steps))
        steps.append(made if made.requests_per_s else measure(users, LONGEST_S))
        if not any(step.requests_per_s for step in steps):
            raise InferctlError(f"the server answered nothing to {users} users", "see the server's own log")
        if (steps[-1].client_cpu_percent or 0) > CLIENT_CPU_LIMIT:
            return Found(steps[max(0, len(steps) - 2)].users, GENERATOR, tuple(steps))
        if _flat(steps):
            return Found(_needed(steps), SERVER, tuple(steps))
        users *= 2
    return Found(steps[-1].users, USERS, tuple(steps))


def _flat(steps: Sequence[Step]) -> bool:
    """Return whether the last two steps bring no more than those before. One alone may have had bad luck."""
    if len(steps) < 3:
        return False
    before = max(step.requests_per_s for step in steps[:-2])
    return all(step.requests_per_s < before * (1 + GROWTH) for step in steps[-2:])


def _needed(steps: Sequence[Step]) -> int:
    most = max(step.requests_per_s for step in steps)
    return next(step.users for step in steps if step.requests_per_s * (1 + GROWTH) >= most)


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which servers the load saturated, by the rows of a result; nothing if the plan gives the number of users."""
    found = [(row["configuration"], row["concurrency"]) for row in rows if row.get("concurrency")]
    if not found:
        return []
    loads = " or ".join(dict.fromkeys(str(one["users"]) for _, one in found))
    full = [name for name, one in found if one["saturated"]]
    said = []
    if full:
        whom = (
            "All servers are"
            if len(full) == len(found) > 1
            else f"{', '.join(full)} {'is' if len(full) == 1 else 'are'}"
        )
        said.append(
            f"{whom} saturated by {loads} users: with twice as many, and four times, requests/s grew by under "
            f"{GROWTH:.0%}."
        )
    for name, one in found:
        last = one["steps"][-1]
        if one["limited_by"] == GENERATOR:
            said.append(
                f"{name} may not be saturated: with {last['users']} users the load generator used "
                f"{last['client_cpu_percent']:.0f} % of its core. Give it more processes with `--workers`."
            )
        elif one["limited_by"] == USERS:
            said.append(f"{name} is not saturated: requests/s still grew with {last['users']} users.")
    if len(found) > len(full):
        said.append("Configurations that are not saturated can show no difference although they differ.")
    return said
