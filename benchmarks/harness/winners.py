"""Check by simulation how often one of several equal configurations wins, and how often one that is 15% faster does.

    python benchmarks/harness/winners.py [--trials 1400] [--seed 1] [--json FILE]

Each trial has five repeats, in alternating order. Service times differ from run to run by a noise (standard deviation),
and by half of it from slower periods of time. A closed loop has the requests/s that follow. An open loop has the p99 of
a queue with Poisson arrivals at a load of 50%, with the same arrival times for all configurations of a repeat. The
findings are those of `inferctl bench`. It takes about three minutes.

The exit code is 1 if one of equal configurations is said to be faster in more than 4.5% of the trials.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import loads
import numpy as np
import numpy.typing as npt

from inferctl.bench import stats
from inferctl.bench.report import findings
from inferctl.bench.report.rows import MeasuredRow, RunFigures

Values = npt.NDArray[np.float64]

CONFIGURATIONS, NOISES, REPEATS, FASTER, MOST = (2, 3, 5), (0.025, 0.05, 0.08), 5, 1.15, 0.045
WARMUP, REQUESTS, LOAD = 100, 400, 0.5
ROW = MeasuredRow("", "measured", valid=True, receipt="", quality={"checked": False, "reason": "simulated"})


def service_times(random: np.random.Generator, trials: int, configurations: int, noise: float) -> Values:
    """Return the factor of the service times of each run, shape (trials, repeats, configurations)."""
    factors, period = np.zeros((trials, REPEATS, configurations)), np.zeros(trials)
    for repeat in range(REPEATS):
        for number in range(configurations)[:: 1 if repeat % 2 == 0 else -1]:
            period = 0.8 * period + random.normal(0, noise / 2, trials)
            factors[:, repeat, number] = period + random.normal(0, noise, trials)
    return np.exp(factors)


def queue_p99(random: np.random.Generator, factors: Values) -> Values:
    """Return the p99 of the time in queue and service, in service times, for each run, in the shape of `factors`."""
    found = np.empty_like(factors)
    shape = (factors.shape[0], WARMUP + REQUESTS)
    for repeat in range(factors.shape[1]):
        gaps = random.exponential(1 / LOAD, shape)
        for number in range(factors.shape[2]):
            service = random.lognormal(-0.005, 0.1, shape) * factors[:, repeat, number, None]
            steps = np.cumsum(np.pad(service[:, :-1] - gaps[:, 1:], ((0, 0), (1, 0))), axis=1)
            times = (steps - np.minimum.accumulate(steps, axis=1) + service)[:, WARMUP:]
            place = stats.rank(REQUESTS, 0.99) - 1
            found[:, repeat, number] = np.partition(times, place, axis=1)[:, place]
    return found


def finding(costs: Values, mode: str) -> str:
    """Return the first finding for the service times or latencies of one trial, shape (repeats, configurations)."""
    rows = []
    for number, values in enumerate(costs.T.tolist()):
        runs = [RunFigures(repeat, 1 / value, value, value) for repeat, value in enumerate(values)]
        figures = {"requests_per_s": 1.0, "p50_ms": 1.0, "p99_ms": 1.0}
        rows.append(replace(ROW, configuration=str(number), mode=mode, runs=runs, **figures))
    return findings.describe(rows, 0.1)[0]


def shares(configurations: int, mode: str, noise: float, faster: float, trials: int, seed: int) -> tuple[float, float]:
    """Return how often the first configuration, which is `faster` times as fast as the others, wins.

    The second share is how often any configuration is said to be faster than another one.
    """
    random = np.random.default_rng([seed, configurations, mode == "open", int(1000 * noise), int(100 * faster)])
    costs = service_times(random, trials, configurations, noise)
    costs[:, :, 0] /= faster
    said = [finding(each, mode) for each in (queue_p99(random, costs) if mode == "open" else costs)]
    claims = [text for text in said if " wins: " in text or " is faster: " in text]
    return sum(text.startswith("0 wins: ") for text in said) / trials, len(claims) / trials


def table(trials: int, seed: int) -> Iterator[dict[str, Any]]:
    for mode in ("closed", "open"):
        for configurations in CONFIGURATIONS:
            for noise in NOISES:
                _, equal = shares(configurations, mode, noise, 1.0, trials, seed)
                wins, _ = shares(configurations, mode, noise, FASTER, trials, seed)
                row = {"loop": mode, "configurations": configurations, "noise": noise}
                yield row | {"equal_said_to_be_faster": equal, "faster_wins": wins}


def main() -> int:
    options = loads.options(__doc__, trials=1400, seed=1)
    rows = []
    for row in table(options.trials, options.seed):
        rows.append(row)
        print(
            f"{row['loop']:6} loop, {row['configurations']} configurations, noise {row['noise']:.1%}: "
            f"one of equals faster {row['equal_said_to_be_faster']:.1%}, 15% faster wins {row['faster_wins']:.1%}",
            flush=True,
        )
    passed = all(row["equal_said_to_be_faster"] <= MOST for row in rows)
    loads.write(options.json, {"trials": options.trials, "seed": options.seed, "passed": passed, "rows": rows})
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
