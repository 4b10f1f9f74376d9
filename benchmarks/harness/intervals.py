"""Check by simulation whether 95% intervals contain the true percentile, and how often an SLO verdict is wrong.

    python benchmarks/harness/intervals.py [--trials 1000] [--seed 1] [--json FILE]

The simulated queue has Poisson arrivals and one server (Lindley's recursion), service times with a spread of 10%, and
a warm-up. Its true percentiles are known. Each trial measures it once, or five times with a fifth of the requests:

- `fresh`: each repeat has its own arrival times, as in `inferctl bench`
- `same`: all repeats have the same arrival times, to show their effect
- `drift`: the speed of the server differs by 5% from run to run

A second part has a server whose true p99 is 10% above the SLO, and one whose p99 is 10% below it, at several sample
sizes. A third part has a server with rare stalls, which short samples miss: its verdicts do not change the exit code.
It takes about one minute.

The exit code is 1 if the coverage with fresh arrival times is outside 93% to 97%, plus or minus the sampling error of
the trials, or if the SLO that is missed by 10% is reported as met in 5% or more of the trials.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import loads
import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.judge import slo, summary

Values = npt.NDArray[np.float64]
Serve = Callable[[np.random.Generator, int], Values]

# Load, and number of requests of all repeats together. The effective sample size is then enough for a p99.
LOADS = {0.5: 10_000, 0.7: 25_000, 0.85: 100_000}
SLO_REQUESTS = (1000, 4000, 20_000)
QUANTILES = (0.5, 0.9, 0.99)
WARMUP, LONG = 1000, 4_000_000
GOAL = (0.93, 0.97)


def sojourn(arrivals: Values, service: Values) -> Values:
    """Return the time that each request spends in the queue and in service."""
    steps = np.concatenate([[0.0], service[:-1] - np.diff(arrivals)]).cumsum()
    return np.asarray(steps - np.minimum.accumulate(steps) + service)[WARMUP:]


def arrive(random: np.random.Generator, load: float, count: int) -> Values:
    return random.exponential(1 / load, count + WARMUP).cumsum()


def serve(random: np.random.Generator, count: int) -> Values:
    return random.lognormal(-0.005, 0.1, count + WARMUP)


def serve_with_stalls(random: np.random.Generator, count: int) -> Values:
    """Return service times of a server that stalls for 60 of them at one request in 2,000."""
    times = 0.97 * serve(random, count)
    times[random.random(len(times)) < 1 / 2000] += 60
    return times


def truth(load: float, seed: int, serve: Serve = serve) -> dict[float, float]:
    """Return the true percentiles, in service times, from one long simulation."""
    random = np.random.default_rng([seed, 99])
    ascending = np.sort(sojourn(arrive(random, load, LONG), serve(random, LONG)))
    return {q: float(ascending[stats.rank(len(ascending), q) - 1]) for q in QUANTILES}


def trial(
    random: np.random.Generator, load: float, count: int, repeats: int, how: str, serve: Serve = serve
) -> list[Values]:
    """Return the latencies of each run of one measurement."""
    each = count // repeats
    shared = arrive(random, load, each)
    return [
        sojourn(shared if how == "same" else arrive(random, load, each), serve(random, each))
        * (math.exp(random.normal(0, 0.05)) if how == "drift" else 1.0)
        for _ in range(repeats)
    ]


def coverage(load: float, repeats: int, how: str, trials: int, seed: int) -> dict[float, float]:
    """Return the share of the intervals that contain the true percentile, for each percentile."""
    known = truth(load, seed)
    random = np.random.default_rng([seed, int(100 * load), repeats])
    hits = dict.fromkeys(QUANTILES, 0)
    for _ in range(trials):
        runs = trial(random, load, LOADS[load], repeats, how)
        ascending = np.sort(np.concatenate(runs))
        for q in QUANTILES:
            found = stats.quantile(ascending, q, series=runs)
            hits[q] += found.low is not None and found.high is not None and found.low <= known[q] <= found.high
    return {q: count / trials for q, count in hits.items()}


def false_verdicts(
    load: float, count: int, repeats: int, beyond: float, trials: int, seed: int, serve: Serve = serve
) -> dict[str, float]:
    """Return how often an SLO verdict is met, missed or inconclusive if the true p99 is `beyond` times the SLO."""
    limit = truth(load, seed, serve)[0.99] / beyond
    random = np.random.default_rng([seed, int(100 * load), repeats, count])
    found = {True: 0, False: 0, None: 0}
    for _ in range(trials):
        runs = trial(random, load, count, repeats, "fresh", serve)
        found[slo.judge(summary.latency_summary(runs), limit, 0, 0).met] += 1
    return {"met": found[True] / trials, "missed": found[False] / trials, "inconclusive": found[None] / trials}


def table(trials: int, seed: int) -> Iterator[dict[str, Any]]:
    for load, count in LOADS.items():
        for repeats, how in ((1, "fresh"), (5, "fresh"), (5, "drift"), (5, "same")):
            found = coverage(load, repeats, how, trials, seed)
            yield {"load": load, "requests": count, "repeats": repeats, "schedules": how} | {
                f"p{q * 100:g}": share for q, share in found.items()
            }


def main() -> int:
    options = loads.options(__doc__, trials=1000, seed=1)
    rows = []
    for row in table(options.trials, options.seed):
        rows.append(row)
        shares = ", ".join(f"{key} {row[key]:.1%}" for key in ("p50", "p90", "p99"))
        print(f"load {row['load']:.0%}, {row['repeats']} repeats, {row['schedules']:5}: {shares}", flush=True)
    chance = 2 * math.sqrt(0.95 * 0.05 / options.trials)
    shares = [row[key] for row in rows if row["schedules"] == "fresh" for key in ("p50", "p90", "p99")]
    passed = all(GOAL[0] - chance <= share <= GOAL[1] + chance for share in shares)
    verdicts = []
    for load in LOADS:
        for count in SLO_REQUESTS:
            for repeats in (1, 5):
                for beyond in (1.1, 0.9):
                    found = false_verdicts(load, count, repeats, beyond, options.trials, options.seed)
                    verdicts.append(
                        {"load": load, "requests": count, "repeats": repeats, "p99_over_slo": beyond} | found
                    )
                    passed = passed and (beyond < 1 or found["met"] < 0.05)
                    text = ", ".join(f"{key} {share:.1%}" for key, share in found.items())
                    print(f"load {load:.0%}, {count} requests, {repeats} repeats, p99 {beyond:g} of the SLO: {text}")
    stalls = []
    for load in LOADS:
        for count in SLO_REQUESTS:
            found = false_verdicts(load, count, 1, 1.1, options.trials, options.seed, serve_with_stalls)
            stalls.append({"load": load, "requests": count} | found)
            print(f"load {load:.0%}, {count} requests, rare stalls, p99 1.1 of the SLO: met {found['met']:.1%}")
    asked = {"trials": options.trials, "seed": options.seed}
    loads.write(options.json, {**asked, "passed": passed, "rows": rows, "slo": verdicts, "stalls": stalls})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
