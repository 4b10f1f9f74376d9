"""Fits the estimator on the published rows, cross-validates it, prints every row and writes `fitted.yaml`.

    python benchmarks/calibration/fit.py [--json FILE] [--dry]

Fitted: a fixed time (its launches) and a sustained fraction for each (part, precision), and one mean length of the samples for all rows.
Only a SingleStream row shows the fixed time. Without one, a precision takes the launches of the part's other precision, or of the nearest
part, and has one fitted number instead of two. The rows under a condition (busy neighbours, power cap) have both fitted on what they have.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from rows import CONDITIONS, HERE, WITHIN, Row, Samples, Table, read, simulated

from inferctl import catalog
from inferctl.estimate.calibration import BASES, Calibration, Fit, fixed_seconds
from inferctl.estimate.cost import BERT_LARGE, Cost

SOURCE = (
    "MLPerf Inference v0.7 and v1.0, BERT-large, SQuAD v1.1, TensorRT (benchmarks/calibration/mlperf-bert-large.csv)"
)
KIND = {"Offline": "throughput", "SingleStream": "latency", "Server": "rate"}
Key = tuple[str, str]


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.part, row.precision].append(row)
    # int8 first: it has the SingleStream rows.
    return dict(sorted(found.items(), key=lambda one: (one[0][0], one[0][1] != "int8")))


def mean_length(rows: Sequence[Row]) -> tuple[float, float, list[float]]:
    """The mean length that SingleStream's p50 and p90 speak for, the error left (rms), and the lengths whose error is within a tenth of it."""
    offline: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        if row.scenario == "Offline":
            offline[row.part, row.precision].append(row.value)
    errors = {}
    for mean in range(100, 305, 5):
        samples = Samples(mean, 4000)
        shares = [samples.quantile(q) / samples.mean_flop for q in (0.5, 0.9)]
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
    """Fits groups of rows; the expensive table of simulated rates is made once."""

    def __init__(self, samples: Samples) -> None:
        self.samples, self.table = samples, Table(samples)
        self._known: dict[Any, Fit] = {}

    def calibration(self, rows: Sequence[Row]) -> tuple[Calibration, dict[Key, Fit]]:
        """From `rows`: what the package would read, and the fits of parts under a condition, which no estimate uses."""
        groups = grouped(rows)
        fits: dict[str, dict[str, Fit]] = defaultdict(dict)
        conditions = {key: self.fit(group) for key, group in groups.items() if key[0] in CONDITIONS}
        timed = {key for key, group in groups.items() if any(row.scenario == "SingleStream" for row in group)}
        for part, precision in sorted(timed - conditions.keys()):
            fits[part][precision] = self.fit(groups[part, precision])
        launches = {
            key[0]: Calibration(dict(fits), 0.0).of(key[0], "int8").fit.launch
            for key in groups
            if key not in conditions
        }
        for key in groups.keys() - timed - conditions.keys():
            fits[key[0]][key[1]] = self.fit(groups[key], launches[key[0]])
        return Calibration({part: fits[part] for part in sorted(fits)}, 0.0), conditions

    def fit(self, group: Sequence[Row], launch: float | None = None) -> Fit:
        """Least squares over errors as shares of what each scenario allows, on ever finer grids. `launch`: given, not fitted (seconds)."""
        known = (tuple(group), launch)
        if known not in self._known:
            self._known[known] = self._fit(group, launch)
        return self._known[known]

    def _fit(self, group: Sequence[Row], given: float | None) -> Fit:
        part, precision = catalog.hardware(group[0].catalogued), group[0].precision
        offline = [row.value for row in group if row.scenario == "Offline"] or [row.value for row in group]
        mean = len(offline) / sum(offline)
        least = fixed_seconds(part, precision, Fit(1.0, 0.0), BERT_LARGE)
        launch = 2 * mean if given is None else given
        step, wide = 0.15, 3.0 if given is None else 0.0
        for _ in range(7):
            candidates = [
                (mean * math.exp(step * i / 8), launch * math.exp(wide * j / 12))
                for i in range(-8, 9)
                for j in (range(-12, 13) if wide else (0,))
            ]
            mean, launch = min(candidates, key=lambda one: self._loss(group, one[0], least + one[1]))
            step, wide = step / 4, wide / 4
        peak = (part.peaks[precision] or 0.0) * 1e12
        return Fit(self.samples.mean_flop / mean / peak, launch, len(group))

    def _loss(self, group: Sequence[Row], mean: float, fixed: float) -> float:
        return sum((row.error(self.table.estimate(row, mean, fixed)) / WITHIN[row.scenario]) ** 2 for row in group)

    def predict(self, row: Row, cost: Cost) -> float:
        """The estimate of a row by the table."""
        mean = self.samples.mean_flop * cost.per_token / BERT_LARGE.per_token
        return self.table.estimate(row, mean, cost.fixed)


def left_out(fitter: Fitter, rows: Sequence[Row]) -> dict[str, list[tuple[Row, float]]]:
    """By basis: rows with what is estimated of them when nothing near them was fitted.

    own: the other systems of the part. precision: the part in another precision. slice: the whole GPU. chip: other boards. others: other chips.
    """
    plain = [row for row in rows if row.part not in CONDITIONS]
    found: dict[str, list[tuple[Row, float]]] = {basis: [] for basis in BASES}

    def judge(held: Sequence[Row], rest: Sequence[Row], wanted: str) -> None:
        calibration, _ = fitter.calibration(rest)
        for row in held:
            calibrated = calibration.of(row.part, row.precision)
            if calibrated.basis == wanted:
                found[wanted].append((row, fitter.predict(row, calibrated.cost(BERT_LARGE))))

    for system in sorted({row.system for row in plain}):
        judge([r for r in plain if r.system == system], [r for r in plain if r.system != system], "own")
    for part, precision in grouped(plain):
        held = [r for r in plain if (r.part, r.precision) == (part, precision)]
        judge(held, [r for r in plain if r not in held], "precision")
    for part in sorted({row.part for row in plain}):
        held, rest = [r for r in plain if r.part == part], [r for r in plain if r.part != part]
        judge(held, rest, "slice" if "-mig-" in part else "chip")
    for chip in ("t4", "a10", "a100"):
        held = [r for r in plain if r.part.split("-")[0] == chip]
        judge([r for r in held if "-mig-" not in r.part], [r for r in plain if r not in held], "others")
    return found


def band(rows: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    """The factors of the estimate between which all rows left out lay. A basis without a Server row is as sure of rates as of throughput."""
    ratios = {name: [row.value / est for row, est in rows if row.scenario == kind] for kind, name in KIND.items()}
    ratios["rate"] = ratios["rate"] or ratios["throughput"]
    spans = {name: [round(min([1.0, *found]), 3), round(max([1.0, *found]), 3)] for name, found in ratios.items()}
    return {"rows": len(rows), **spans}


def bands(held: dict[str, list[tuple[Row, float]]]) -> dict[str, Any]:
    """The band of each basis; one that rests on farther rows is never narrower than `own`."""
    found = {basis: band(rows) for basis, rows in held.items()}
    for one in found.values():
        for name in KIND.values():
            own = found["own"][name]
            one[name] = [min(one[name][0], own[0]), max(one[name][1], own[1])]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--dry", action="store_true", help="write no fitted.yaml")
    options = parser.parse_args()
    rows = read()
    mean, rms, flat = mean_length(rows)
    print(
        f"mean length {mean:g} tokens (rms error of SingleStream p50 and p90 {rms:.1%}; within a tenth of that: {flat[0]:g} to {flat[-1]:g})"
    )
    fitter = Fitter(Samples(mean))
    calibration, conditions = fitter.calibration(rows)
    lines = table(rows, calibration, conditions, fitter.samples)
    failed = [line for line in lines if abs(line["error"]) > line["within"]]
    held = left_out(fitter, rows)
    report(lines, calibration, conditions, held)
    data = {
        "source": SOURCE,
        "lengths": {"mean": mean, "rms_error": round(rms, 4), "as_good": [flat[0], flat[-1]], "longest": 384},
        "batch_tokens": 16384,
        "parts": {part: {name: _plain(fit) for name, fit in by.items()} for part, by in calibration.fits.items()},
        "conditions": _conditions(conditions),
        "bands": bands(held),
    }
    if options.json:
        left = {basis: [vars(row) | {"estimated": value} for row, value in found] for basis, found in held.items()}
        options.json.write_text(json.dumps(data | {"rows": lines, "left_out": left}, indent=1) + "\n", encoding="utf-8")
    if not options.dry:
        head = "# Written by benchmarks/calibration/fit.py; docs/estimate.md explains it.\n"
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
        (HERE / "fitted.yaml").write_text(head + text, encoding="utf-8")
    print(f"\n{len(lines)} rows, {len(failed)} outside their limit")
    return 1 if failed else 0


def table(
    rows: Sequence[Row], calibration: Calibration, conditions: dict[Key, Fit], samples: Samples
) -> list[dict[str, Any]]:
    """Every row: given, estimated by simulation, error."""
    known: dict[tuple[str, str, str], float] = {}
    lines = []
    for row in rows:
        part = catalog.hardware(row.catalogued)
        fit = conditions.get((row.part, row.precision)) or calibration.fits[row.part][row.precision]
        key = (row.part, row.precision, row.scenario)
        if key not in known:
            peak = (part.peaks[row.precision] or 0.0) * 1e12
            cost = Cost.of(BERT_LARGE, peak * fit.fraction, fixed_seconds(part, row.precision, fit, BERT_LARGE))
            known[key] = simulated(row, cost, samples)
        lines.append(
            vars(row) | {"estimated": known[key], "error": row.error(known[key]), "within": WITHIN[row.scenario]}
        )
    return lines


def report(
    lines: Sequence[dict[str, Any]],
    calibration: Calibration,
    conditions: dict[Key, Fit],
    held: dict[str, list[tuple[Row, float]]],
) -> None:
    every = {(part, name): fit for part, by in calibration.fits.items() for name, fit in by.items()} | conditions
    print("\n| part | precision | sustained fraction | launches, ms | rows |\n|---|---|---|---|---|")
    for (part, name), fit in sorted(every.items()):
        print(f"| {part} | {name} | {fit.fraction:.3f} | {fit.launch * 1000:.2f} | {fit.rows} |")
    print("\n| part | precision | scenario | system | given | estimated | error |\n|---|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda one: (one["part"], one["precision"], one["scenario"])):
        unit, digits = (1000, 2) if line["scenario"] == "SingleStream" else (1, 1)
        mark = "" if abs(line["error"]) <= line["within"] else f" (limit {line['within']:.0%})"
        print(
            f"| {line['part']} | {line['precision']} | {line['scenario']} | {line['system']} | {line['value'] * unit:.{digits}f} "
            f"| {line['estimated'] * unit:.{digits}f} | {line['error']:+.1%}{mark} |"
        )
    print(
        "\n| left out, estimated from | scenario | rows | error: mean of sizes | from | to |\n|---|---|---|---|---|---|"
    )
    for basis, found in held.items():
        for scenario in KIND:
            errors = [row.error(estimated) for row, estimated in found if row.scenario == scenario]
            if errors:
                size = sum(map(abs, errors)) / len(errors)
                print(
                    f"| {basis} | {scenario} | {len(errors)} | {size:.1%} | {min(errors):+.1%} | {max(errors):+.1%} |"
                )


def _plain(fit: Fit) -> dict[str, Any]:
    return {"fraction": round(fit.fraction, 4), "launch_ms": round(fit.launch * 1000, 4), "rows": fit.rows}


def _conditions(conditions: dict[Key, Fit]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (name, precision), fit in conditions.items():
        entry = found.setdefault(name, {"of": CONDITIONS[name][0], "condition": CONDITIONS[name][1]})
        entry[precision] = _plain(fit)
    return found


if __name__ == "__main__":
    sys.exit(main())
