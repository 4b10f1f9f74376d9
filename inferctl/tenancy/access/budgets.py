"""What keys, teams and models spent and reserved in the windows of their budgets, on this server and on others.

There is no clock here, and no store in the path of a request: totals are in memory and in a `BudgetFile`.

For each run of a server (a process), three numbers only grow: what it reserved, what it spent, and what it released.
Receivers keep the maximum, so lost, doubled and reordered messages do no harm. A message has all that its sender knows
of an account, so it also confirms what the sender heard. What a server reserved, and others have not confirmed, counts
once more for each of them. Each may have reserved as much, and none knows of the others: so together they stay below
the limit. The last request that fits for sure is admitted without that, by each server once.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
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
_LIVE_S = 3.0  # a server that was heard within this time counts as another one
_BEAT_S = 1.0  # a message is sent after this time at the latest, and sent again if it is not confirmed
_PER_MESSAGE = 2000  # counters of runs, of up to 250 bytes
_MOST = 1 << 62
_KEPT_S = 2 * 86_400  # after the end of a window, whose last requests may still run
_MOST_SPENDINGS = 200_000  # accounts and windows; a hostile server could send any number


class BudgetError(Exception):
    """A budget rejects a request. `code`: one of the three above. `use`: the state of the budget, if it is known.

    `retry_after`: seconds; None if it does not help.
    """

    def __init__(self, code: str, message: str, use: BudgetUse | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code, self.use, self.retry_after = code, use, retry_after


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

    def header(self) -> str:
        """Return the value of the header of a response, such as `limit=50, spent=1.5`."""
        left = self.limit - self.spent - self.reserved
        start = _same_for_all(self.limit, self.currency, self.reset)
        text = f"{start}, spent={amount(self.spent)}, reserved={amount(self.reserved)}, left={amount(max(0, left))}"
        return f"{text}, alert={level}%" if (level := alert(self.spent, self.limit)) else text


@functools.lru_cache(maxsize=4096)
def _same_for_all(limit: int, currency: str, reset: int) -> str:
    at = f", reset={time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(reset))}" if reset else ""
    return f"limit={amount(limit)}, currency={currency}{at}"


def states(needed: Iterable[Budget], totals: Mapping[str, Any], folder: Path, now: float) -> list[BudgetUse]:
    """Return the state of budgets: of `Ledger.budgets`, and what servers in the folder `metering.data` know."""
    found = Budgets()
    for (account, label, end, run, _), values in budget_file.read_all(folder / _FOLDER):
        found._merge(found._spending(account, Window(label, end)), run, values)
    found._take_totals(totals)
    return [_use([(budget, found._spending(budget.account, budget.window(now)))]) for budget in needed]


def alert(spent: int, limit: int) -> int:
    """Return which percentage of the limit is reached: 100, 80, or 0."""
    return 100 if spent >= limit else 80 if spent * 5 >= limit * 4 else 0


class Spending:
    """One account in one window. `used`: spent, or reserved by requests in flight.

    `runs`: what each reserved, spent and released. `places`: of these counters, in the file. `gross`: what runs of this
    folder reserved that have not ended, `told`: how much of it each other server confirmed. `alerted`: as `alert`.
    """

    __slots__ = ("account", "alerted", "gross", "places", "runs", "share", "spent", "told", "used", "window")

    def __init__(self, account: str, window: Window) -> None:
        self.account, self.window, self.share = account, window, (account, *window)
        self.runs: dict[str, list[int]] = {}
        self.places: dict[str, int] = {}
        self.used = self.spent = self.gross = self.alerted = 0
        self.told: dict[str, int] = {}

    def unconfirmed(self, others: int) -> int:
        """Return how much of what this folder reserved is not known to all `others`.

        A release in between needs no care: what a server knows too late is then higher than what is true.
        """
        told = sorted(self.told.values())
        return self.gross - (told[-others] if len(told) >= others else 0) if others else 0


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
            self._budgets.change(self.spendings, max(0, cost - self.most), cost, max(cost, self.most))
            self.settled = _use(self.spendings, cost, self.admitted, self._budgets.run)
        return self.settled

    def use(self) -> BudgetUse:
        """Return the state of the budget before the end of the request."""
        return _use(self.spendings)


def _use(
    spendings: Sequence[tuple[Budget, Spending]], cost: int = 0, admitted: float = 0.0, run: str = ""
) -> BudgetUse:
    """Return the state of the budget with the least left."""
    budget, least = spendings[0]
    shares = [spending.share for _, spending in spendings] if cost else []
    if len(spendings) > 1:
        budget, least = min(spendings, key=lambda each: each[0].limit - each[1].used)
    spent = least.spent
    at, reserved, reset = int(1000 * admitted), least.used - spent, least.share[2]
    return BudgetUse(cost, budget.currency, at, run, shares, budget.limit, spent, reserved, reset)


def _log_level(budget: Budget, spending: Spending) -> None:
    level = alert(spending.spent, budget.limit)
    if level > spending.alerted:  # by this request, by other servers, or by a lower limit
        log.warning("the budget of %s (%s) has reached %d%%", spending.account, spending.window.label, level)
    spending.alerted = level


def _exceeded(budget: Budget, spending: Spending, most: int) -> BudgetError:
    _log_level(budget, spending)
    use, of = _use([(budget, spending)]), budget.account if ":" in budget.account else "this key"
    message = f"the budget of {of} is {amount(budget.limit)} {spending.window.label}, {amount(use.spent)} are spent"
    message += f", and the request can cost {amount(most)}" if most else ""
    return BudgetError(EXCEEDED, message, use)


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
        self._books, self._folder, self._replicas, self._exchanges = books, folder, replicas, exchanges
        self.of_models = any(account.startswith("model:") for account in shared)
        self.run = ""
        self._file: BudgetFile | None = None
        self._spendings: dict[tuple[str, str], Spending] = {}
        self._newest: dict[str, tuple[Budget, float, Spending]] = {}  # windows do not change within 900 s
        self._hardware: dict[str | None, str] = {}
        self._rates: dict[tuple[str, str, int], Rate | None] = {}
        self._known, self._started, self._read_at, self._forgot = False, 0.0, -1, 0.0
        self._continues = False  # this folder has what it spent earlier
        self._expired: set[tuple[str, str]] = set()
        self._totals: Mapping[str, Any] = {}
        self._locals: set[str] = set()  # runs of this folder
        self._ended: set[str] = set()  # runs of which the ledger has everything
        # To be sent (with runs that have ended?), and sent but perhaps not confirmed.
        self._changed: dict[Spending, bool] = {}
        self._sent: dict[Spending, bool] = {}
        self._sent_at = self._again_at = -math.inf
        self.others = replicas - 1
        self._heard: dict[str, float] = {}
        # Messages from `_base` to `_number` had everything, or those from `_next_base` on will have it.
        self._number, self._base, self._next_base = 0, 0, 1
        self._received: dict[str, tuple[int, int]] = {}  # server -> first and last message without a gap
        self._informs: set[str] = set()  # servers of which this one has everything

    @classmethod
    def of(cls, access: Access, metering: Metering) -> Budgets:
        """Return the budgets of a server. Raises `UsageError` for a budget without prices, as far as it is known now.

        So does a price book that is not valid.
        """
        needed = [parse(account, text) for account, text in access.budgets.items()]
        if access.key_file and (file := Path(access.key_file)).exists():
            needed += [parse(key.id, key.budget) for key in key_file.read(file).keys if key.budget and not key.revoked]
        prices = Path(metering.prices) if metering.prices and metering.mode != "off" else None
        books = read_all(prices) if prices and (needed or prices.exists()) else {}  # the spec can be that of an image
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
        self.run, self._started, self._locals = run, now, {run}
        if not self._books or self._folder is None:
            return
        self._file = BudgetFile(self._folder / _FOLDER)
        for (account, label, end, each, local), values in budget_file.take_over(self._folder / _FOLDER):
            self._known, self._continues = not self._exchanges, True
            if not end or now < end + _KEPT_S:
                if local:
                    self._locals.add(each)
                self._merge(self._spending(account, Window(label, end)), each, values)

    def ready(self, model: str | None, hardware: str) -> None:
        """Note what computes for a model, or for all (None), on which prices depend."""
        self._hardware[model] = hardware
        self._rates.clear()

    def of_model(self, model: str) -> tuple[Budget, ...]:
        """Return the budget that a model has."""
        found = self._shared.get(f"model:{model}") if self._shared else None
        return (found,) if found else ()

    def check(self, budgets: Iterable[Budget], now: float) -> None:
        """Raise `BudgetError` if nothing is left of a budget, so that the body of a request need not be read."""
        for budget in budgets:
            spending = self._current(budget, now)
            if not budget.soft and spending.spent >= budget.limit:
                raise _exceeded(budget, spending, 0)

    def reached(self, level: int, now: float) -> int:
        """Return how many budgets have reached 80 or 100 percent of their limit in a window that is not over."""
        known = [(each, limit[1]) for limit, _, each in self._newest.values() if not 0 < each.window.end <= now]
        return sum(alert(each.spent, limit) >= level for each, limit in known)

    def reserve(self, budgets: Sequence[Budget], model: str, prompt: int, output: int, now: float) -> Hold:
        """Reserve the most that a request can cost. `prompt`, `output`: its most tokens. Raises `BudgetError`."""
        rate = self._rate(budgets, model, now)
        most = rate.most(prompt, output)
        found = []
        for budget in budgets:
            spending = self._current(budget, now)
            if not (budget.soft or (self._known and not self.others and spending.used + most <= budget.limit)):
                self._check(budget, spending, most)
            found.append((budget, spending))
        self.change(found, most, 0, 0)
        return Hold(self, found, rate, most, now)

    def _check(self, budget: Budget, spending: Spending, most: int) -> None:
        if spending.spent + most > budget.limit:
            raise _exceeded(budget, spending, most)
        if not self._known:
            raise BudgetError(UNAVAILABLE, "what this budget spent is not known yet; retry after 1 s", retry_after=1)
        others, unknown = self.others, spending.unconfirmed(self.others)
        left = budget.limit - spending.used - most
        if left >= 0 and (not unknown or left >= others * (unknown + most)):
            return
        what = "requests in flight" if left < 0 else "what other servers may have spent"
        message = f"{what} may need the rest of the budget; retry after 1 s"
        raise BudgetError(PENDING, message, _use([(budget, spending)]), retry_after=1)

    def _rate(self, budgets: Sequence[Budget], model: str, now: float) -> Rate:
        """Return the prices of this moment. Raises `BudgetError` without them."""
        currency = budgets[0].currency
        if budgets[1:] and any(budget.currency != currency for budget in budgets):
            raise BudgetError(UNAVAILABLE, "the budgets of this request have different currencies")
        if self._file is None:
            raise BudgetError(UNAVAILABLE, "a budget needs `metering.mode` and `metering.prices` on this server")
        kind = (model, currency, int(now // 86_400))
        if rate := self._rates.get(kind):
            return rate
        if kind not in self._rates:
            try:
                self._rates[kind] = self._find_rate(*kind)
            except UsageError as error:
                log.error("requests with a budget are rejected: %s; %s", error.message, error.hint)
                self._rates[kind] = None
        if (rate := self._rates[kind]) is None:
            raise BudgetError(UNAVAILABLE, f"this server has no price in {currency} that a budget can use")
        return rate

    def _find_rate(self, model: str, currency: str, day: int) -> Rate:
        if currency not in self._books:
            raise UsageError(f"no prices in {currency}", f"the price book has {', '.join(self._books)}")
        date = time.strftime("%Y-%m-%d", time.gmtime(86_400 * day))
        return self._books[currency].rate(self._hardware.get(model) or self._hardware.get(None, ""), model, date)

    def change(self, spendings: Iterable[tuple[Budget, Spending]], reserved: int, spent: int, released: int) -> None:
        """Add to what this process reserved, spent and released."""
        for budget, spending in spendings:
            self._apply(spending, self.run, reserved, spent, released)
            if spent:
                _log_level(budget, spending)

    def _current(self, budget: Budget, now: float) -> Spending:
        """Return the spending of a budget in the window of `now`."""
        known = self._newest.get(budget.account)
        if known is None or known[1] != now // 900 or known[0] != budget:
            window = budget.window(now)
            spending = self._spending(budget.account, window)
            spending.window, spending.share = window, (budget.account, *window)  # others may have sent another end
            try:
                self._counts(spending, self.run)  # before anything is reserved
            except (OSError, ValueError) as error:
                message = f"what this budget spends cannot be written: {error}"
                raise BudgetError(UNAVAILABLE, message, retry_after=1) from None
            self._newest[budget.account] = known = budget, now // 900, spending
        return known[2]

    def _spending(self, account: str, window: Window) -> Spending:
        found = self._spendings.get((account, window.label))
        if found is None:
            found = self._spendings[account, window.label] = Spending(account, window)
        return found

    def _counts(self, spending: Spending, run: str) -> list[int]:
        """Return the counters of a run."""
        if (found := spending.runs.get(run)) is None:
            if self._file:
                spending.places[run] = self._file.add([*spending.share, run, run in self._locals])
            found = spending.runs[run] = [0, 0, 0]
        return found

    def _apply(self, spending: Spending, run: str, reserved: int, spent: int, released: int) -> None:
        """Add to the counters of a run."""
        counts = spending.runs.get(run) or self._counts(spending, run)
        counts[0] += reserved
        counts[1] += spent
        counts[2] += released
        spending.used += reserved + spent - released
        spending.spent += spent
        if run == self.run or run in self._locals:
            spending.gross += reserved
            if self._exchanges:
                self._changed.setdefault(spending, False)
        if self._file:
            self._file.write(spending.places[run], *counts)

    def _merge(self, spending: Spending, run: str, values: Sequence[int]) -> bool:
        """Keep the maximum of what is known of a run and of `values`. Returns whether that is new."""
        counts = self._counts(spending, run)
        reserved, spent, released = map(max, counts, values)
        added = reserved - counts[0], spent - counts[1], released - counts[2]
        if any(added):
            self._apply(spending, run, *added)
        return any(added)

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
        if now > self._forgot + 86_400:
            self._forget(now)
        if content["totals"] != self._totals:  # not most of the time
            self._take_totals(content["totals"])
            self._totals = content["totals"]
        self._known |= content["at"] >= self._started and (not self._exchanges or now > self._started + _LIVE_S)

    def _take_totals(self, totals: Mapping[str, Any]) -> None:
        final = {}
        for account, label, end, run, spent in totals["spent"]:
            spending = self._spending(account, Window(label, end))
            final[spending, run] = spent
            if run != self.run and not (run in self._ended and run in spending.runs):
                self._merge(spending, run, (0, spent, 0))
        if new := set(totals["ended"]) - self._ended - {self.run}:
            self._ended |= new
            for spending in self._spendings.values():
                for run in new & spending.runs.keys():
                    # Nothing of it is in flight any more. Events that a SIGKILL lost are on no invoice.
                    reserved, spent, released = spending.runs[run]
                    self._apply(spending, run, 0, final.get((spending, run), 0) - spent, reserved - released)
                    self._changed[spending] = True
                    if run in self._locals:
                        spending.gross -= spending.runs[run][0]
                        spending.told.clear()  # it included this run

    def _forget(self, now: float) -> None:
        """Forget windows that ended long ago, also a day ago: the clock could be set back."""
        earlier, self._expired = self._expired, set()
        self._forgot, self._newest = now, {}
        for kind, spending in list(self._spendings.items()):
            if not 0 < spending.window.end < now - _KEPT_S:
                continue
            if kind not in earlier:
                self._expired.add(kind)
            else:
                del self._spendings[kind]
                for place in spending.places.values():
                    assert self._file is not None
                    self._file.remove(place)
                self._changed.pop(spending, None)
                self._sent.pop(spending, None)

    def send_all(self) -> None:
        """Let the next messages have everything: the others may lack some of it."""
        self._next_base = self._number + 1
        self._changed.update(dict.fromkeys(self._spendings.values(), True))

    def message(self, now: float) -> dict[str, Any] | None:
        """Return what the other servers should know, if there is something. `now`: monotonic."""
        if self._file is None:
            return None
        self.others = max(self._replicas - 1, sum(at > now - _LIVE_S for at in self._heard.values()))
        if now >= self._again_at + _BEAT_S:
            again = {spending: False for spending in self._sent if spending.unconfirmed(self.others)}
            self._changed, self._sent, self._again_at = again | self._changed, {}, now
        if not self._changed and now < self._sent_at + _BEAT_S:
            return None
        self._sent_at, counters, size = now, [], 0
        while self._changed and size < _PER_MESSAGE:
            spending = next(iter(self._changed))
            whole = self._changed.pop(spending)
            runs = {run: [*counts] for run, counts in spending.runs.items() if whole or run not in self._ended}
            counters.append([*spending.share, runs])
            self._sent[spending] = whole
            size += 1 + len(runs)
        self._number += 1
        if self._next_base and not self._changed:
            self._base, self._next_base = self._next_base, 0
        state = {"known": self._known, "continues": self._continues}
        return {"run": self.run, **state, "numbers": [self._base, self._number], "counters": counters}

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Take over a message of another server. `now`: monotonic. Raises `ValueError` and others if it is not one."""
        run, (base, number) = message["run"], message["numbers"]
        if not isinstance(run, str) or not type(base) is type(number) is int:
            raise ValueError("not a server or numbers")
        if run == self.run:
            return
        for account, label, end, runs in message["counters"]:
            if (account, label) not in self._spendings and len(self._spendings) >= _MOST_SPENDINGS:
                continue
            spending, told, new = self._spending(str(account), Window(str(label), int(end))), 0, False
            for each, values in runs.items():
                if len(values) != 3 or not all(type(value) is int and 0 <= value < _MOST for value in values):
                    raise ValueError("not a counter")
                if each in self._ended:
                    continue
                if each not in self._locals:
                    new |= self._merge(spending, each, values)
                else:
                    told += min(values[0], self._counts(spending, each)[0])
            spending.told[run] = max(told, spending.told.get(run, 0))
            if new:  # this confirms it
                self._changed.setdefault(spending, False)
        self._heard[run] = now
        if not (message["known"] or self._next_base):
            self.send_all()
        first, last = self._received.get(run, (0, 0))
        self._received[run] = first, last = (first if number == last + 1 else number), number
        # Servers that all lost their folders would only tell each other that nothing is spent.
        if first <= base and (message["known"] or message["continues"]):
            self._informs.add(run)
            live = sum(self._heard[each] > now - _LIVE_S for each in self._informs)
            self._known |= live >= self._replicas - 1
