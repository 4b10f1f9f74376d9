"""How often the verdict is wrong, in hundreds of simulated comparisons with the noise of a shared machine (two cores).

Runs differ by a few percent, periods of time are slower, and sometimes a neighbor uses a core during one run. The noise
affects all figures of a run together. The p99 has additional noise that is twice as large. At `SEEN`, the spread of the
repeats is that of benchmarks/results/same.json (runs of 1.6 s, two cores).
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from compare_samples import runs

from inferctl.bench.judge import comparable, compare
from inferctl.receipts import receipt

PAIRS = 400
SEEN = 0.025
# With this share of false alarms or less, 20 comparisons give at most one with a probability of 95 %.
MOST_FALSE_ALARMS = 0.0178


def one_run(random: Random, slower: float, noise: float, stretch: float, burst: float) -> dict[str, float]:
    own = random.gauss(0, noise) + stretch + (random.uniform(0.1, 0.5) if random.random() < burst else 0)
    body, tail = math.exp(own) * slower, math.exp(random.gauss(0, 2 * noise))
    return {
        "p50": 20 * body,
        "p90": 27 * body * math.exp(random.gauss(0, noise / 2)),
        "p99": 36 * body * tail,
        "rate": 200 / (body * math.exp(random.gauss(0, noise / 4))),
        "n": 1000,
        "memory": 500 * math.exp(random.gauss(0, 0.01)),
    }


def compared(random: Random, repeats: int, slower: float, noise: float, burst: float) -> tuple[str, int | None]:
    """Outcome and needed repeats of an interleaved comparison with a server that takes `slower` times as long."""
    stretch, sides = 0.0, ([], [])  # type: tuple[float, tuple[list[dict[str, float]], list[dict[str, float]]]]
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            stretch = 0.8 * stretch + random.gauss(0, noise / 2)
            sides[side].append(one_run(random, slower if side else 1.0, noise, stretch, burst))
    shared = {
        "validity": {"valid": True, "reasons": [], "cautions": []},
        "hardware": {"name": "Test CPU", "key": "cpu"},
        "configuration": {"name": "bf16", "url": None, "this_machine": True},
        "environment": {},
        "plan": {},
        "summary": {},
        "workload": {"sha256": ""},
        "precision": {"effective": "bf16"},
        "model": {},
        "quality": {"checked": False, "reason": "simulated"},
        "created": "",
    }
    old, new = (
        receipt.Receipt(Path(), shared | {"seal": f"{side}", "runs": runs(values, side == 0)})
        for side, values in enumerate(sides)
    )
    result = compare.compare([comparable.ReceiptPair(old, new)], [], compare.CompareOptions())
    return result.outcome, result.repeats_needed


def outcomes(repeats: int, slower: float, noise: float, burst: float, pairs: int = PAIRS) -> dict[str, float]:
    """Share of each outcome."""
    random = Random(f"{repeats} {slower} {noise} {burst}")
    found = Counter(compared(random, repeats, slower, noise, burst)[0] for _ in range(pairs))
    return {name: count / pairs for name, count in found.items()}


@pytest.mark.parametrize("burst", [0.0, 0.1])
@pytest.mark.parametrize("noise", [0.01, SEEN, 0.08])
@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_equal_servers_are_rarely_called_a_regression(repeats: int, noise: float, burst: float) -> None:
    # Of 1,200 pairs: a rate of 1.6 % is then known to 0.4 %. The seed is fixed.
    assert outcomes(repeats, 1.0, noise, burst, pairs=3 * PAIRS).get("regression", 0) <= MOST_FALSE_ALARMS


@pytest.mark.parametrize(("repeats", "noise", "least"), [(5, 0.01, 0.99), (5, SEEN, 0.6), (10, SEEN, 0.95)])
def test_ten_percent_are_found_if_the_machine_is_steady(repeats: int, noise: float, least: float) -> None:
    assert outcomes(repeats, 1.1, noise, 0.0).get("regression", 0) >= least


@pytest.mark.parametrize("burst", [0.0, 0.1])
@pytest.mark.parametrize("noise", [0.01, SEEN, 0.08])
def test_ten_percent_never_pass_because_of_noise(noise: float, burst: float) -> None:
    found = outcomes(5, 1.1, noise, burst)
    assert found.get("no regression", 0) + found.get("improvement", 0) <= 0.05


@pytest.mark.parametrize("slower", [1.0, 1.1])
def test_the_needed_repeats_decide(slower: float) -> None:
    """The number is an estimate from few runs: it must decide most comparisons, and correctly."""
    random, decided, right = Random(1), 0, 0
    asked = []
    while len(asked) < 60:
        outcome, needed = compared(random, 6, slower, SEEN, 0.0)
        if outcome == "not enough evidence" and needed:
            asked.append(needed)
    for needed in asked:
        outcome, _ = compared(random, needed, slower, SEEN, 0.0)
        decided += outcome != "not enough evidence"
        right += (outcome == "regression") == (slower > 1)
    assert decided >= 0.7 * len(asked)
    assert right >= 0.9 * decided
