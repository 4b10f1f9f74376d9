"""What keys, teams and models spent and reserved in the windows of their budgets, on this server and on others.

There is no clock here, and no store in the path of a request: totals are in memory and in a `BudgetFile`.

For each run of a server (a process), three numbers only grow: what it reserved, what of that it released, and what it
spent. Receivers keep the maximum, so lost, doubled and reordered messages do no harm. A server counts what the others
have not confirmed once more for each of them. Each may have spent as much, and none knows of the others: so together
they stay below the limit. The last request that fits for sure is admitted without that, by each server once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inferctl.config.budget import Budget, Window, amount, parse
from inferctl.config.spec import Access, Metering
from inferctl.core.errors import UsageError
from inferctl.tenancy.access import budget_file, key_file
from inferctl.tenancy.access.budget_file import BudgetFile
from inferctl.tenancy.metering.prices import PriceBook, Rate, read_all

log = logging.getLogger("inferctl.access")

EXCEEDED, PENDING, UNAVAILABLE = "budget_exceeded", "budget_pending", "budget_unavailable"
TOTALS_FILE = "budgets.json"  # in `metering.data`, by the relay: what the ledger has
_FOLDER = "budgets"
_ALERTS = (80, 100)  # percent of the limit
_LIVE_S = 3.0  # a server that was heard within this time counts as another one
_ALONE_S = 3.0  # so long, a server without a file waits to hear the others
_BEAT_S, _FULL_S = 1.0, 1.0
_PER_MESSAGE = 500
_MOST_VERSIONS = 64
_MOST = 1 << 62
_KEPT_S = 2 * 86_400  # after the end of a window, whose last requests may still run
_MOST_SPENDINGS = 200_000  # accounts and windows; a hostile server could send any number


class BudgetError(Exception):
    """A budget rejects a request. `code`: one of the three above. `use`: the state of the budget, if it is known."""

    def __init__(self, code: str, message: str, use: BudgetUse | None = None) -> None:
        super().__init__(message)
        self.code, self.use = code, use


class BudgetUse(NamedTuple):
    """What one request cost, and the state of its budget then. Money in billionths of `currency`.

    `shares`: account, label and end of each window that it counts in; empty if it costs nothing. `run`: of the server
    process. `reset`: Unix time (s), 0 for never.
    """

    cost: int
    currency: str
    admitted_ms: int
    run: str
    shares: Sequence[Sequence[Any]]
    limit: int
    spent: int
    reserved: int
    reset: int

    def headers(self) -> dict[str, str]:
        """Return the headers of a response."""
        left = max(0, self.limit - self.spent - self.reserved)
        values = {"limit": self.limit, "spent": self.spent, "reserved": self.reserved, "left": left}
        found = {name: amount(value) for name, value in values.items()} | {"currency": self.currency}
        if self.reset:
            found["reset"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.reset))
        if level := alert(self.spent, self.limit):
            found["alert"] = f"{level}%"
        return {f"x-inferctl-budget-{name}": value for name, value in found.items()}


def states(needed: Iterable[Budget], totals: Iterable[Sequence[Any]], folder: Path, now: float) -> list[BudgetUse]:
    """Return the state of budgets, of the totals of the ledger, and what servers in the folder `metering.data` know."""
    found = Budgets()
    for names in (folder / _FOLDER).glob("*.names"):
        with contextlib.suppress(FileNotFoundError):  # its process ended, and another one took it over
            for (account, label, end, run, _), values in budget_file.read(names):
                found._merge(found._spending(account, Window(label, end)), run, values)
    found._take_totals(totals)
    return [_use([(budget, found._spending(budget.account, budget.window(now)))]) for budget in needed]


def alert(spent: int, limit: int) -> int:
    """Return the highest of the percentages of an alert that is reached; 0 for none."""
    return max((level for level in _ALERTS if spent * 100 >= limit * level), default=0)


class Spending:
    """One account in one window. `local`: what runs of this folder have reserved and spent, `foreign`: the others."""

    __slots__ = ("account", "foreign", "local", "places", "runs", "spent", "versions", "window")

    def __init__(self, account: str, window: Window) -> None:
        self.account, self.window = account, window
        self.runs: dict[str, list[int]] = {}  # reserved, spent, released
        self.places: dict[str, int] = {}
        self.local = self.foreign = self.spent = 0
        self.versions: deque[tuple[int, int]] = deque([(-1, 0)])  # message, and `local` in it

    @property
    def reserved(self) -> int:
        """What is reserved by requests in flight."""
        return self.local + self.foreign - self.spent

    def unconfirmed(self, confirmed: int) -> int:
        """Return by how much `local` exceeds what the others know, who have all messages up to `confirmed`."""
        versions = self.versions
        while len(versions) > 1 and versions[1][0] <= confirmed:
            versions.popleft()
        return max(0, self.local - min(value for _, value in versions))

    def sent(self, number: int) -> None:
        """Note that a message has what is in `local`."""
        if self.versions[-1][1] == self.local:
            return
        if len(self.versions) >= _MOST_VERSIONS:  # nobody confirms: of two, keep the careful one
            (_, one), (later, two) = self.versions[1], self.versions[2]
            del self.versions[1]
            self.versions[1] = later, min(one, two)
        self.versions.append((number, self.local))


class Hold:
    """The reservation of one request. `spendings`: of its budgets."""

    __slots__ = ("_budgets", "admitted", "most", "rate", "settled", "spendings")

    def __init__(
        self, budgets: Budgets, spendings: list[tuple[Budget, Spending]], rate: Rate, most: int, admitted: float
    ) -> None:
        self._budgets, self.spendings, self.rate, self.most, self.admitted = budgets, spendings, rate, most, admitted
        self.settled: BudgetUse | None = None

    def settle(self, computed: int, cached: int, output: int) -> BudgetUse:
        """Replace the reservation by what the request cost, once. Returns what it cost, and the state after it."""
        if self.settled is None:
            cost = self.rate.cost(computed, cached, output)
            self._budgets.change(self.spendings, 0, cost, self.most)
            self.settled = _use(self.spendings, cost, self.admitted, self._budgets.run)
        return self.settled

    def use(self) -> BudgetUse:
        """Return the state of the budget before the end of the request."""
        return _use(self.spendings)


def _use(
    spendings: Sequence[tuple[Budget, Spending]], cost: int = 0, admitted: float = 0.0, run: str = ""
) -> BudgetUse:
    """Return the state of the budget with the least left."""
    (budget, least), *others = spendings
    for each, spending in others:
        if each.limit - spending.spent - spending.reserved < budget.limit - least.spent - least.reserved:
            budget, least = each, spending
    shares = [(spending.account, *spending.window) for _, spending in spendings] if cost else []
    numbers = budget.limit, least.spent, least.reserved, least.window.end
    return BudgetUse(cost, budget.currency, int(1000 * admitted), run, shares, *numbers)


class Budgets:
    """All budgets of one server. `shared`: by `team:NAME` or `model:NAME`. `replicas`: servers that share budgets.

    `books`: prices by currency. `folder`: `metering.data`. Without them, requests with a budget are rejected.
    """

    def __init__(
        self,
        shared: Mapping[str, str] = {},
        books: Mapping[str, PriceBook] = {},
        folder: Path | None = None,
        replicas: int = 1,
        *,
        exchanges: bool = False,
    ) -> None:
        self._shared = {account: parse(account, text) for account, text in shared.items()}
        self._books, self._folder, self._replicas = books, folder, replicas
        self.run = ""
        self._file: BudgetFile | None = None
        self._spendings: dict[tuple[str, str], Spending] = {}
        self._hardware: dict[str | None, str] = {}
        self._rates: dict[tuple[str, str, int], Rate | None] = {}
        self._locals: set[str] = set()  # runs of this folder
        self._known, self._started, self._read_at = False, 0.0, -1
        self._totals: list[Any] = []
        self._exchanges = exchanges
        self._changed: dict[Spending, None] = {}
        self._number = 0  # of messages with counters
        self._base, self._whole = 0, 0  # messages that have everything
        self._full, self._full_at, self._sent_at = True, -math.inf, -math.inf
        self.others, self._confirmed = replicas - 1, -1
        self._heard: dict[str, float] = {}
        self._acks: dict[str, int] = {}
        self._acks_changed = False
        self._have: dict[str, tuple[int, int, int]] = {}  # server -> base, last message, end of everything

    @classmethod
    def of(cls, access: Access, metering: Metering) -> Budgets:
        """Return the budgets of a server. Raises `UsageError` for a budget without prices, as far as it is known now.

        So does a price book that is not valid.
        """
        recorded = metering.mode != "off" and metering.prices
        books = read_all(Path(metering.prices)) if metering.prices and recorded else {}
        needed = [parse(account, text) for account, text in access.budgets.items()]
        if access.key_file and (file := Path(access.key_file)).exists():
            needed += [parse(key.id, key.budget) for key in key_file.read(file).keys if key.budget and not key.revoked]
        for budget in needed:
            if budget.currency not in books:
                have = f"{metering.prices} has {', '.join(books)}" if books else "there are none"
                raise UsageError(
                    f"the budget of {budget.account} needs prices in {budget.currency}; {have}",
                    "set `metering.mode: required`, and `metering.prices` to a price book in this currency",
                )
        return cls(access.budgets, books, Path(metering.data), access.replicas, exchanges=access.broker is not None)

    def open(self, run: str, now: float) -> None:
        """Take over what earlier processes of this folder knew. `run`: the name of this one. Raises `OSError`."""
        self.run, self._started = run, now
        if not self._books or self._folder is None:
            return
        self._file = BudgetFile(self._folder / _FOLDER)
        for _, counters in budget_file.take_over(self._folder / _FOLDER):
            self._known = True
            for (account, label, end, each, local), values in counters:
                if not end or now < end + _KEPT_S:
                    self._merge(self._spending(account, Window(label, end)), each, values, local=local)

    def ready(self, model: str | None, hardware: str) -> None:
        """Note what computes for a model, or for all (None), on which prices depend."""
        self._hardware[model] = hardware
        self._rates.clear()

    def of_model(self, model: str) -> tuple[Budget, ...]:
        """Return the budget that a model has."""
        found = self._shared.get(f"model:{model}")
        return (found,) if found else ()

    def check(self, budgets: Iterable[Budget], now: float) -> None:
        """Raise `BudgetError` if nothing is left of a budget, so that the body of a request need not be read."""
        for budget in budgets:
            spending = self._spending(budget.account, budget.window(now))
            if not budget.soft and spending.spent >= budget.limit:
                raise self._exceeded(budget, spending, 0)

    def reserve(self, budgets: Sequence[Budget], model: str, prompt: int, output: int, now: float) -> Hold:
        """Reserve the most that a request can cost. `prompt`, `output`: its most tokens. Raises `BudgetError`."""
        rate = self._rate(budgets, model, now)
        most = rate.most(prompt, output)
        found = [(budget, self._spending(budget.account, budget.window(now))) for budget in budgets]
        for budget, spending in found:
            if not budget.soft:
                self._check(budget, spending, most)
        hold = Hold(self, found, rate, most, now)
        self.change(found, most, 0, 0)
        return hold

    def _check(self, budget: Budget, spending: Spending, most: int) -> None:
        if spending.spent + most > budget.limit:
            raise self._exceeded(budget, spending, most)
        use = _use([(budget, spending)])
        if not self._known:
            raise BudgetError(PENDING, "what this budget spent is not known yet; retry after 1 s", use)
        others, used = self.others, spending.local + spending.foreign
        unknown = spending.unconfirmed(self._confirmed) if others else 0
        if used + others * unknown + most * (1 + others) <= budget.limit or (
            used + most <= budget.limit and not unknown
        ):
            return
        what = "requests in flight" if used + most > budget.limit else "what other servers may have spent"
        raise BudgetError(PENDING, f"{what} may need the rest of the budget; retry after 1 s", use)

    def _exceeded(self, budget: Budget, spending: Spending, most: int) -> BudgetError:
        use = _use([(budget, spending)])
        of = budget.account if ":" in budget.account else "this key"
        message = f"the budget of {of} is {amount(budget.limit)} {spending.window.label}, {amount(use.spent)} are spent"
        message += f", and the request can cost {amount(most)}" if most else ""
        return BudgetError(EXCEEDED, message, use)

    def _rate(self, budgets: Sequence[Budget], model: str, now: float) -> Rate:
        """Return the prices of this moment. Raises `BudgetError` without them."""
        currency = budgets[0].currency
        if any(budget.currency != currency for budget in budgets):
            raise BudgetError(UNAVAILABLE, "the budgets of this request have different currencies")
        if self._file is None:
            raise BudgetError(UNAVAILABLE, "a budget needs `metering.mode` and `metering.prices` on this server")
        kind = (model, currency, int(now // 86_400))
        if kind not in self._rates:
            try:
                self._rates[kind] = self._find_rate(*kind)
            except UsageError as error:
                log.error("requests with a budget are rejected: %s", error.message)
                self._rates[kind] = None
        if (rate := self._rates[kind]) is None:
            raise BudgetError(UNAVAILABLE, f"this server has no price in {currency} that a budget can use")
        return rate

    def _find_rate(self, model: str, currency: str, day: int) -> Rate:
        if currency not in self._books:
            raise UsageError(f"no prices in {currency}; the price book has {', '.join(self._books)}")
        date = time.strftime("%Y-%m-%d", time.gmtime(86_400 * day))
        return self._books[currency].rate(self._hardware.get(model) or self._hardware.get(None, ""), model, date)

    def change(self, spendings: Iterable[tuple[Budget, Spending]], reserved: int, spent: int, released: int) -> None:
        """Add to what this process reserved, spent and released."""
        for budget, spending in spendings:
            counts = spending.runs.get(self.run)
            if counts is None:
                counts = self._new_run(spending, self.run, local=True)
            counts[0] += reserved
            counts[1] += spent
            counts[2] += released
            if self._file:
                self._file.write(spending.places[self.run], *counts)
            spending.local += reserved + spent - released
            before, spending.spent = spending.spent, spending.spent + spent
            if spent and (level := alert(spending.spent, budget.limit)) > alert(before, budget.limit):
                log.warning("the budget of %s (%s) has reached %d%%", spending.account, spending.window.label, level)
            if self._exchanges:
                self._changed[spending] = None

    def _spending(self, account: str, window: Window) -> Spending:
        found = self._spendings.get((account, window.label))
        if found is None:
            found = self._spendings[account, window.label] = Spending(account, window)
        return found

    def _new_run(self, spending: Spending, run: str, *, local: bool) -> list[int]:
        if self._file:
            account, window = spending.account, spending.window
            spending.places[run] = self._file.add([account, window.label, window.end, run, local])
        if local:
            self._locals.add(run)
        found = spending.runs[run] = [0, 0, 0]
        return found

    def _merge(self, spending: Spending, run: str, values: Sequence[int], *, local: bool = False) -> None:
        """Keep the maximum of what is known of a run and of `values`."""
        counts = spending.runs.get(run)
        if counts is None:
            counts = self._new_run(spending, run, local=local)
        before = counts[0] + counts[1] - counts[2]
        spending.spent += max(0, values[1] - counts[1])
        counts[:] = map(max, counts, values)
        if self._file:
            self._file.write(spending.places[run], *counts)
        change = counts[0] + counts[1] - counts[2] - before
        if run in self._locals:
            spending.local += change
        else:
            spending.foreign += change

    def _update(self, now: float) -> list[str]:
        """Compute how many others there are, and what they confirmed. Returns those that are live."""
        live = [run for run, at in self._heard.items() if at > now - _LIVE_S]
        self.others = max(self._replicas - 1, len(live))
        acks = sorted(self._acks.values(), reverse=True)
        self._confirmed = acks[self.others - 1] if 0 < self.others <= len(acks) else -1
        return live

    def read_totals(self, now: float) -> None:
        """Take over what the ledger has, if the relay wrote it anew. Raises `OSError` and `ValueError`."""
        assert self._folder is not None
        file = self._folder / TOTALS_FILE
        try:
            version = file.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if version == self._read_at:
            return
        content = json.loads(file.read_bytes())
        self._read_at = version
        if content["totals"] != self._totals:  # not most of the time
            self._totals = content["totals"]
            self._take_totals(self._totals)
        if content["at"] >= self._started:
            alone = not self._exchanges or now > self._started + _ALONE_S
            self._known = self._known or alone or len(self._have) >= self._replicas - 1

    def _take_totals(self, totals: Iterable[Sequence[Any]]) -> None:
        for account, label, end, run, spent, ended in totals:
            if run == self.run:
                continue
            spending = self._spending(account, Window(label, end))
            self._merge(spending, run, (0, spent, 0))
            if ended:  # nothing of it is in flight any more
                self._merge(spending, run, (0, 0, spending.runs[run][0]))

    def send_all(self) -> None:
        """Let the next messages have everything: the others may lack some of it."""
        self._full = True

    def messages(self, now: float) -> Iterator[dict[str, Any]]:
        """Yield what the other servers should know: what changed, or everything. `now`: monotonic."""
        if self._file is None:
            return
        lacking = any(self._acks[run] < self._whole for run in self._update(now)) or self._full
        full = lacking and now >= self._full_at + _FULL_S
        found = list(self._spendings.values() if full else self._changed)[: None if full else _PER_MESSAGE]
        if full:
            self._full, self._full_at = False, now
            self._base = self._number + 1
            self._whole = self._number + max(1, -(-len(found) // _PER_MESSAGE))
        if not (found or full) and now < self._sent_at + _BEAT_S and not self._acks_changed:
            return
        self._sent_at, self._acks_changed = now, False
        for first in range(0, max(1, len(found)), _PER_MESSAGE):
            part = found[first : first + _PER_MESSAGE]
            if part or full:
                self._number += 1
            counters = []
            for spending in part:
                spending.sent(self._number)
                self._changed.pop(spending, None)
                runs = spending.runs if full else {self.run: spending.runs[self.run]}
                counters.append([spending.account, *spending.window, {run: [*counts] for run, counts in runs.items()}])
            numbers = [self._base, self._number, self._whole]
            acks = {run: last for run, (_, last, whole) in self._have.items() if last >= whole}
            yield {"run": self.run, "numbers": numbers, "counters": counters, "acks": acks}

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Take over a message of another server. `now`: monotonic. Raises `ValueError` and others if it is not one."""
        run, (base, number, whole), acks = message["run"], message["numbers"], message["acks"]
        if not isinstance(run, str) or not type(base) is type(number) is type(whole) is int:
            raise ValueError("not a server or numbers")
        if run == self.run:
            return
        for account, label, end, runs in message["counters"]:
            if (account, label) not in self._spendings and len(self._spendings) >= _MOST_SPENDINGS:
                continue
            spending = self._spending(str(account), Window(str(label), int(end)))
            for each, values in runs.items():
                if len(values) != 3 or not all(type(value) is int and 0 <= value < _MOST for value in values):
                    raise ValueError("not a counter")
                if each != self.run:
                    self._merge(spending, each, values)
        self._heard[run] = now
        known = before = self._have.get(run)
        if known is None or known[0] != base:
            known = (base, base - 1, whole) if number == base else None
        if known is not None and number in (known[1], known[1] + 1):
            self._have[run] = base, number, whole
        else:
            self._have.pop(run, None)
        self._acks_changed |= self._have.get(run) != before
        self._acks[run] = found if type(found := acks.get(self.run)) is int else -1
        self._update(now)
