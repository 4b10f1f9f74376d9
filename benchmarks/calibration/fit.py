"""Fit the estimator to the published rows, cross-validate it, print every row and write `fitted.yaml`.

    python benchmarks/calibration/fit.py [--dry]

The fitted values are a fixed time (kernel launches) and a sustained fraction of the peak for each (hardware,
precision), and one mean length of the samples for all rows. Only a SingleStream row shows the fixed time. Without one,
a precision takes the launches of the same hardware in the other precision, or of the nearest hardware, and one value is
fitted instead of two.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from rows import (
    HERE,
    WITHIN,
    Row,
    Samples,
    Table,
    other_ratios,
    read,
    read_other,
    simulate,
)

from inferctl.bench import student_t
from inferctl.estimate.calibration import BASES, Calibration, FittedParameters, batch_cost
from inferctl.estimate.cost import BERT_LARGE, Cost
from inferctl.facts import catalog

SOURCE = (
    "MLPerf Inference v0.7 and v1.0, BERT-large, SQuAD v1.1, TensorRT (benchmarks/calibration/mlperf-bert-large.csv)"
)
# The share of further rows that a band should contain. Rows that are left out have the same software version as fitted
# rows, so a band is too narrow for a later round: at 0.90 the bands of MLPerf contained 23 of 26 rows of rounds 1.1 and
# 2.0, at 0.95 they contained 25.
LEVEL = 0.95
KIND = {"Offline": "throughput", "SingleStream": "latency"}
Key = tuple[str, str]


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.part, row.precision].append(row)
    # int8 first: it has the SingleStream rows.
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "int8")))


def mean_length(rows: Sequence[Row]) -> tuple[float, float, list[float]]:
    """Return the mean length that fits p50 and p90 of SingleStream, its rms error, and other lengths that fit as well.

    Those are the lengths with an error of at most 1.1 times the smallest.
    """
    offline: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        if row.scenario == "Offline":
            offline[row.part, row.precision].append(row.value)
    errors = {}
    for mean in range(100, 305, 5):
        samples = Samples(mean, 4000)
        shares = [BERT_LARGE.flop(samples.length(q)) / samples.mean_flop for q in (0.5, 0.9)]
        total, count = 0.0, 0
        for key, group in grouped(row for row in rows if row.scenario == "SingleStream").items():
            seconds = len(offline[key]) / sum(offline[key])
            points = [
                (share * seconds, given / 1000)
                for row in group
                for share, given in zip(shares, row.percentiles_ms or (), strict=False)
            ]
            fixed = sum((given - work) / given**2 for work, given in points) / sum(1 / given**2 for _, given in points)
            total += sum(((fixed + work) / given - 1) ** 2 for work, given in points)
            count += len(points)
        errors[mean] = math.sqrt(total / count)
    best = min(errors, key=errors.__getitem__)
    return float(best), errors[best], [float(mean) for mean, error in errors.items() if error <= 1.1 * errors[best]]


class Fitter:
    """Fit groups of rows. The expensive table of simulated rates is computed once."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.table = samples, Table(samples)
        self._known: dict[Any, FittedParameters] = {}

    def calibration(self, rows: Sequence[Row]) -> Calibration:
        """Return the calibration of the package."""
        groups = grouped(rows)
        fits: dict[str, dict[str, FittedParameters]] = defaultdict(dict)
        timed = {key for key, group in groups.items() if any(row.scenario == "SingleStream" for row in group)}
        for part, precision in sorted(timed):
            fits[part][precision] = self.fit(groups[part, precision])
        launches = {key[0]: Calibration(dict(fits), 0.0).of(key[0], "int8").fit.launch for key in groups}
        for key in groups.keys() - timed:
            fits[key[0]][key[1]] = self.fit(groups[key], launches[key[0]])
        return Calibration({part: fits[part] for part in sorted(fits)}, 0.0)

    def fit(self, group: Sequence[Row], launch: float | None = None) -> FittedParameters:
        """Return the least squares fit on successively finer grids. Errors are relative to the limit of each scenario.

        `launch` is the fixed time (s) if it is not to be fitted.
        """
        known = (tuple(group), launch)
        if known not in self._known:
            self._known[known] = self._fit(group, launch)
        return self._known[known]

    def _fit(self, group: Sequence[Row], given: float | None) -> FittedParameters:
        part, precision = catalog.hardware(group[0].part), group[0].precision
        peak = (part.peaks[precision] or 0.0) * 1e12
        offline = [row.value for row in group if row.scenario == "Offline"] or [row.value for row in group]
        fraction = self.samples.mean_flop * sum(offline) / len(offline) / peak
        launch = 2 * len(offline) / sum(offline) if given is None else given
        step, wide = 0.15, 3.0 if given is None else 0.0
        for _ in range(7):
            candidates = [
                FittedParameters(fraction * math.exp(step * i / 8), launch * math.exp(wide * j / 12))
                for i in range(-8, 9)
                for j in (range(-12, 13) if wide else (0,))
            ]
            best = min(candidates, key=lambda one: self._loss(group, batch_cost(part, precision, one, BERT_LARGE)))
            fraction, launch = best.fraction, best.launch
            step, wide = step / 4, wide / 4
        return FittedParameters(fraction, launch, len(group))

    def _loss(self, group: Sequence[Row], cost: Cost) -> float:
        return sum((row.error(self.table.estimate(row, cost)) / WITHIN[row.scenario]) ** 2 for row in group)


def folds(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of one hardware in groups that are left out together.

    The groups are the rounds if there are two, else the submitters, else the systems. An estimate must be right for
    rows of another round, and rows of one round share a machine, a software version and a submitter.
    """
    for key in (lambda row: row.round, lambda row: row.submitter, lambda row: row.system):
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[key(row)].append(row)
        if len(groups) > 1:
            break
    return list(groups.values())


# A row that was left out of a fit: its group, the row, and its estimate.
LeftOut = tuple[str, Row, float]


def left_out(fitter: Fitter, rows: Sequence[Row]) -> dict[str, list[LeftOut]]:
    """Return rows by basis, each with its estimate from a fit without any row of its group.

    own: fitted to other rounds, submitters or systems of the same hardware. precision: to the same hardware in the
    other precision. slice: to the whole GPU. chip: to other boards with the same chip. others: to other chips.
    """
    found: dict[str, list[LeftOut]] = {basis: [] for basis in BASES}

    def judge(omitted: Sequence[Row], rest: Sequence[Row], wanted: str, group: str) -> None:
        calibration = fitter.calibration(rest)
        for row in omitted:
            calibrated = calibration.of(row.part, row.precision)
            if calibrated.basis == wanted:
                estimated = fitter.table.estimate(row, calibrated.cost(BERT_LARGE))
                found[wanted].append((group or f"{row.part} {row.precision}", row, estimated))

    parts = sorted({row.part for row in rows})
    for part in parts:
        for omitted in folds([row for row in rows if row.part == part]):
            judge(omitted, [r for r in rows if r not in omitted], "own", f"{part} {omitted[0].system}")
    # A single system cannot be left out. Its rows show at least how well its own fit matches them.
    judged = {id(row) for _, row, _ in found["own"]}
    alone = [row for row in rows if id(row) not in judged]
    judge(alone, rows, "own", "")
    for part, precision in grouped(rows):
        omitted = [r for r in rows if (r.part, r.precision) == (part, precision)]
        judge(omitted, [r for r in rows if r not in omitted], "precision", f"{part} {precision}")
    for part in parts:
        omitted, rest = [r for r in rows if r.part == part], [r for r in rows if r.part != part]
        judge(omitted, rest, "slice" if "-mig-" in part else "chip", part)
    for chip in ("t4", "a10", "a100"):
        omitted = [r for r in rows if r.part.split("-")[0] == chip]
        judge([r for r in omitted if "-mig-" not in r.part], [r for r in rows if r not in omitted], "others", chip)
    return found


def prediction(groups: Sequence[Sequence[float]]) -> list[float]:
    """Return the factors of an estimate between which one more row lies with a probability of `LEVEL`.

    This is a prediction interval of Student's t on the logarithms of given / estimated. `groups` has the ratios by
    group. Rows of one group are not independent, so each group has the same weight, and the number of groups gives the
    degrees of freedom. The interval always contains 1. With fewer than two groups it is the range of the ratios.
    """
    if len(groups) < 2:
        every = [1.0, *(ratio for group in groups for ratio in group)]
        return [min(every), max(every)]
    logs = [[math.log(ratio) for ratio in group] for group in groups]
    mean = sum(sum(group) / len(group) for group in logs) / len(logs)
    squares = sum(sum((one - mean) ** 2 for one in group) / len(group) for group in logs)
    half = student_t.quantile((1 + LEVEL) / 2, len(logs) - 1) * math.sqrt(
        squares / (len(logs) - 1) * (1 + 1 / len(logs))
    )
    return [math.exp(min(0.0, mean - half)), math.exp(max(0.0, mean + half))]


def bands(omitted: dict[str, list[LeftOut]], ratios: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return the band of each basis, never narrower than that of `own` or than the rows of the other benchmark.

    `ratios`: published / estimated of the other benchmark, by kind of figure and group.
    """
    found: dict[str, Any] = {}
    other = {name: prediction(list(groups.values())) for name, groups in ratios.items()}
    for basis, rows in omitted.items():
        spans = {}
        for scenario, name in KIND.items():
            errors: dict[str, list[float]] = defaultdict(list)
            for group, row, estimated in rows:
                if row.scenario == scenario:
                    errors[group].append(row.value / estimated)
            contained = [prediction(list(errors.values())), other[name], found.get("own", {}).get(name, [1.0, 1.0])]
            spans[name] = [round(min(low for low, _ in contained), 3), round(max(high for _, high in contained), 3)]
        found[basis] = {"rows": len(rows), "groups": len({one[0] for one in rows}), **spans}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="do not write fitted.yaml")
    options = parser.parse_args()
    rows = read()
    mean, rms, flat = mean_length(rows)
    print(
        f"mean length {mean:g} tokens (rms error of SingleStream p50 and p90: {rms:.1%}; "
        f"{flat[0]:g} to {flat[-1]:g} tokens are within 1.1 times that error)"
    )
    fitter = Fitter(Samples(mean))
    calibration = fitter.calibration(rows)
    failed = report_rows(rows, calibration, fitter.samples)
    omitted = left_out(fitter, rows)
    report_left_out(omitted)
    data = {
        "source": SOURCE,
        "lengths": {"mean": mean, "rms_error": round(rms, 4), "as_good": [flat[0], flat[-1]], "longest": 384},
        "batch_tokens": 16384,
        "parts": {part: {name: _plain(fit) for name, fit in by.items()} for part, by in calibration.fits.items()},
        "bands": bands(omitted, other_ratios(calibration, read_other())),
    }
    if not options.dry:
        head = "# Written by benchmarks/calibration/fit.py; docs/estimate.md explains it.\n"
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
        (HERE / "fitted.yaml").write_text(head + text, encoding="utf-8")
    print(f"\n{len(rows)} rows, {failed} outside their limit")
    return 1 if failed else 0


def report_rows(rows: Sequence[Row], calibration: Calibration, samples: Samples) -> int:
    """Print each row with its simulated estimate. Return how many are outside their limit."""
    known: dict[tuple[str, str, str], float] = {}
    failed = 0
    print("\n| part | precision | scenario | system | given | estimated | error |\n|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda one: (one.part, one.precision, one.scenario)):
        key = (row.part, row.precision, row.scenario)
        if key not in known:
            fit = calibration.fits[row.part][row.precision]
            cost = batch_cost(catalog.hardware(row.part), row.precision, fit, BERT_LARGE)
            known[key] = simulate(row, cost, samples)
        unit, digits = (1000, 2) if row.scenario == "SingleStream" else (1, 1)
        error, within = row.error(known[key]), WITHIN[row.scenario]
        failed += abs(error) > within
        print(
            f"| {' | '.join(key)} | {row.system} | {row.value * unit:.{digits}f} | {known[key] * unit:.{digits}f} "
            f"| {error:+.1%}{'' if abs(error) <= within else f' (limit {within:.0%})'} |"
        )
    return failed


def report_left_out(omitted: dict[str, list[LeftOut]]) -> None:
    print("\n| left out, estimated from | scenario | rows | mean error | from | to |\n|---|---|---|---|---|---|")
    for basis, found in omitted.items():
        for scenario in WITHIN:
            errors = [row.error(estimated) for _, row, estimated in found if row.scenario == scenario]
            if errors:
                size = sum(map(abs, errors)) / len(errors)
                print(
                    f"| {basis} | {scenario} | {len(errors)} | {size:.1%} | {min(errors):+.1%} | {max(errors):+.1%} |"
                )


def _plain(fit: FittedParameters) -> dict[str, Any]:
    return {"fraction": round(fit.fraction, 4), "launch_ms": round(fit.launch * 1000, 4), "rows": fit.rows}


if __name__ == "__main__":
    sys.exit(main())
