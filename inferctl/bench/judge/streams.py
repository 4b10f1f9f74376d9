"""The streams of generation servers: first tokens, gaps between events, and tokens over time, from exact records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.load import records

Floats = npt.NDArray[np.float64]
# From this number of gaps on, the p99 of a request's gaps is compared with the bound, else the largest gap.
_GAPS_FOR_P99 = 100


@dataclass(frozen=True)
class Streams:
    """The events of the requests in `rows`. Arrays of shape (n,) have one value per request, in the order of `rows`.

    Events of requests without a record are left out: those that were in flight when the load generator was killed.
    """

    rows: records.Rows
    events: records.Rows

    @cached_property
    def _sorted(self) -> tuple[npt.NDArray[np.int64], records.Rows]:
        """The events by request and time, and the position of their request in `rows`."""
        keys, wanted = (_keys(table) for table in (self.rows, self.events))
        order = np.argsort(keys, kind="stable")
        places = np.minimum(np.searchsorted(keys, wanted, sorter=order), max(0, len(keys) - 1))
        owners = order[places] if len(keys) else places
        known = keys[owners] == wanted if len(keys) else np.zeros(len(wanted), bool)
        owners, events = owners[known], self.events[known]
        by_request = np.argsort(owners, kind="stable")
        return owners[by_request], events[by_request]

    @cached_property
    def _bounds(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The first event of each request, and the one after its last."""
        numbers = np.arange(len(self.rows))
        owners = self._sorted[0]
        return np.searchsorted(owners, numbers), np.searchsorted(owners, numbers, side="right")

    @cached_property
    def weights(self) -> Floats:
        """Tokens of each event, in the order of `owners` and `times_ns`.

        If the server counts tokens for the whole response only, each of its events has an equal share.
        """
        owners, events = self._sorted
        first, end = self._bounds
        counted, reported = self.rows["counted"].astype(bool), self.rows["output_tokens"]
        share = np.where(~counted & (reported > 0), reported / np.maximum(1, end - first), 0.0)
        return np.where(share[owners] > 0, share[owners], events["tokens"])

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """The position in `rows` of the request of each event."""
        return self._sorted[0]

    @property
    def times_ns(self) -> npt.NDArray[np.int64]:
        """The time of each event, in the order of `owners`."""
        return self._sorted[1]["time_ns"].astype(np.int64)

    @cached_property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Output tokens of each request, shape (n,): those of the server's usage, else those of its events."""
        summed = np.bincount(self.owners, weights=self._sorted[1]["tokens"], minlength=len(self.rows))
        return np.where(self.rows["output_tokens"] > 0, self.rows["output_tokens"], summed).astype(np.int64)

    @cached_property
    def ttft_ms(self) -> Floats:
        """Milliseconds from the intended send to the first event with a token, shape (n,); NaN without one."""
        first, end = self._bounds
        times = np.append(self.times_ns, 0)[first]
        elapsed = (times - self.rows["intended_ns"].astype(np.int64)) / 1e6
        return np.where(end > first, elapsed, np.nan)

    @cached_property
    def tpot_ms(self) -> Floats:
        """Milliseconds per output token after the first event, shape (n,); NaN if no token follows it."""
        first, end = self._bounds
        times, counts = np.append(self.times_ns, 0), np.append(self._sorted[1]["tokens"].astype(np.int64), 0)
        following = self.tokens - counts[first]
        elapsed = (times[np.maximum(end - 1, 0)] - times[first]) / 1e6
        return np.where((end - first > 1) & (following > 0), elapsed / np.maximum(1, following), np.nan)

    @cached_property
    def gaps(self) -> records.Rows:
        """Gaps between the events of a request, ordered by their end: `owner` (position in `rows`), `ms`, `end_ns`."""
        times, same = self.times_ns, np.diff(self.owners) == 0
        found = np.zeros(int(same.sum()), [("owner", "<i8"), ("ms", "<f8"), ("end_ns", "<i8")])
        found["owner"], found["ms"], found["end_ns"] = (
            self.owners[1:][same],
            np.diff(times)[same] / 1e6,
            times[1:][same],
        )
        ordered: records.Rows = found[np.argsort(found["end_ns"], kind="stable")]
        return ordered

    @cached_property
    def worst_gap_ms(self) -> Floats:
        """The largest gap of each request, shape (n,): its p99 from 100 gaps on, 0 without gaps."""
        gaps = self.gaps[np.argsort(self.gaps["owner"], kind="stable")]
        worst = np.zeros(len(self.rows))
        np.maximum.at(worst, gaps["owner"], gaps["ms"])
        counts = np.bincount(gaps["owner"], minlength=len(self.rows))
        ends = np.cumsum(counts)
        for number in np.flatnonzero(counts >= _GAPS_FOR_P99):
            own = np.sort(gaps["ms"][ends[number] - counts[number] : ends[number]])
            worst[number] = own[stats.rank(len(own), 0.99) - 1]
        return worst

    def bounds_percent(self, bounds: dict[str, float]) -> Floats:
        """Return the larger of TTFT and worst gap, each in percent of its bound, shape (n,).

        It is infinite for requests without a token or without a good response.
        """
        shares = np.zeros(len(self.rows))
        if limit := bounds.get("ttft"):
            shares = np.maximum(shares, self.ttft_ms / limit)
        if limit := bounds.get("itl"):
            shares = np.maximum(shares, self.worst_gap_ms / limit)
        bad = np.isnan(self.ttft_ms) | (self.rows["error"] != records.OK)
        return np.where(bad, np.inf, 100 * shares)

    def tokens_between(self, start_ns: int, end_ns: int, requests: npt.NDArray[np.bool_]) -> Floats:
        """Return the tokens of `requests` that arrived in each second from `start_ns` to `end_ns`.

        The last value is that of the rest of a second.
        """
        times, mine = self.times_ns, requests[self.owners]
        inside = mine & (times >= start_ns) & (times < end_ns)
        seconds = (times[inside] - start_ns) // 1_000_000_000
        length = -(-(end_ns - start_ns) // 1_000_000_000)
        return np.bincount(seconds, weights=self.weights[inside], minlength=length).astype(np.float64)


def _keys(table: records.Rows) -> npt.NDArray[Any]:
    """Return the phase and the number of the request of each row as one integer."""
    return table["phase"].astype(np.int64) << 32 | table["index"].astype(np.int64)
