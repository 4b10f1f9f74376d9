"""Tests the estimator against the published rows, and its error bands."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from inferctl.core.errors import UsageError
from inferctl.estimate import calibration
from inferctl.estimate.calibration import FittedParameters, batch_cost, fixed_seconds
from inferctl.estimate.cost import BERT_LARGE, Cost
from inferctl.estimate.simulate import percentile
from inferctl.facts import catalog

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "calibration"))

import fit
import rows

ROWS = rows.read()
GROUPS: dict[tuple[str, str], list] = defaultdict(list)
for one in ROWS:
    GROUPS[one.part, one.precision].append(one)


@pytest.fixture(scope="module")
def data() -> dict:
    return yaml.safe_load((rows.HERE / "fitted.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def samples(data: dict):  # a type of a script
    return rows.Samples(data["lengths"]["mean"])


def cost_of(data: dict, part: str, precision: str) -> Cost:
    fitted = data["parts"][part][precision]
    fit = FittedParameters(fitted["fraction"], fitted["launch_ms"] / 1000)
    return batch_cost(catalog.hardware(part), precision, fit, BERT_LARGE)


def test_all_rows_of_the_table_are_used() -> None:
    lines = (rows.HERE / "mlperf-bert-large.csv").read_text(encoding="utf-8").splitlines()
    assert len(ROWS) == len(lines) - 1 > 50


@pytest.mark.parametrize(("part", "precision"), GROUPS, ids=lambda one: one)
def test_every_row_is_estimated_within_its_limit(part: str, precision: str, data: dict, samples) -> None:
    """The limits are 10% for Offline, 15% for the p90 of SingleStream and 15% for the Server rate at p99 <= 130 ms.

    A rate is within 15% of the published one if 85% of that meets the SLO and 115% does not.
    """
    server = samples.server(cost_of(data, part, precision))
    offline, single = server.offline().per_second, percentile(server.single(), 0.9)
    for row in GROUPS[part, precision]:
        if row.scenario == "Offline":
            assert abs(row.error(offline)) <= 0.10, row
        elif row.scenario == "SingleStream":
            assert abs(row.error(single)) <= 0.15, row
    given = [row.value for row in GROUPS[part, precision] if row.scenario == "Server"]
    if given:
        assert server.meets_slo(0.85 * max(given), rows.SLO)
        assert 1.15 * min(given) >= offline or not server.meets_slo(1.15 * min(given), rows.SLO)


def test_a_bound_contains_the_rows_of_another_benchmark() -> None:
    """TensorRT ran a text of 128 tokens through BERT-base in fp16 on a T4 in 1.95 ms. The bound must not exceed it."""
    for row in rows.read_other():
        calibrated = calibration.load().of(row.part, row.precision)
        assert row.estimated(calibrated.fastest(rows.MODELS[row.model])) <= row.seconds, row


@pytest.mark.slow
def test_a_bound_contains_the_rows_of_later_rounds(samples) -> None:
    """MLPerf v1.1 and v2.0 are in no fit and no band: no rate is above its bound, no latency is below."""
    unseen = rows.read(rows.UNSEEN)
    assert len(unseen) == 26
    for row in unseen:
        calibrated = calibration.load().of(row.part, row.precision)
        assert calibrated.basis == "own"
        server = samples.server(calibrated.fastest(BERT_LARGE))
        if row.scenario == "Offline":
            assert row.value <= server.offline().per_second, row
        elif row.scenario == "SingleStream":
            assert row.value >= percentile(server.single(), 0.9), row
        else:
            assert server.meets_slo(row.value, rows.SLO), row


def test_a_prediction_interval_has_its_nominal_coverage() -> None:
    """There are six groups of two equal rows, whose logarithms are normal around 0.02.

    The next group is inside in 95% of 4,000 trials.
    """
    draw, inside = random.Random(3), 0
    for _ in range(4000):
        *groups, following = (math.exp(draw.gauss(0.02, 0.05)) for _ in range(7))
        low, high = fit.prediction([[one, one] for one in groups])
        inside += low <= following <= high
    assert 0.93 < inside / 4000 < 0.985  # the interval always contains 1, so its coverage is slightly higher


def test_rows_are_left_out_by_round_then_by_submitter_then_by_system() -> None:
    def groups(*systems: str) -> list[list[str]]:
        made = [rows.Row("t4", "int8", "Offline", system, 1.0, None) for system in systems]
        return [[row.system for row in group] for group in fit.folds(made)]

    assert groups("0.7 A x", "0.7 B y", "1.0 A x") == [["0.7 A x", "0.7 B y"], ["1.0 A x"]]
    assert groups("0.7 A x", "0.7 A y", "0.7 B y") == [["0.7 A x", "0.7 A y"], ["0.7 B y"]]
    assert groups("0.7 A x", "0.7 A y") == [["0.7 A x"], ["0.7 A y"]]


def test_the_fast_end_of_a_band_never_exceeds_the_dense_peak() -> None:
    far = calibration.load().of("h100-sxm", "fp16")
    assert far.band.throughput[1] * far.fit.fraction > 1
    assert far.band_for(BERT_LARGE).throughput[1] * far.fit.fraction == pytest.approx(1)
    near = calibration.load().of("t4", "fp16")
    assert near.band_for(BERT_LARGE).throughput[1] == near.band.throughput[1]
    wide = dataclasses.replace(BERT_LARGE, width=4096)
    assert near.band_for(wide).throughput[1] * near.fit.fraction == pytest.approx(1)


def test_a_less_similar_basis_has_a_wider_band_and_names_its_source() -> None:
    known = calibration.load()
    own, slice_, others = (known.of(key, "fp16") for key in ("t4", "a100-40gb-mig-3g.20gb", "h100-sxm"))
    assert [one.basis for one in (own, slice_, others)] == ["own", "slice", "others"]
    assert own.band.fastest >= slice_.band.fastest > others.band.fastest
    assert "rows of t4 in fp16" in own.rests_on
    assert "none of h100-sxm" in others.rests_on
    assert known.of("a100-80gb-pcie", "int8").basis == "chip"
    assert known.of("a100-40gb-mig-1g.5gb", "fp16").basis == "precision"


def test_a_slice_lies_between_the_smallest_slice_and_the_whole_gpu() -> None:
    known = calibration.load()
    keys = [f"a100-40gb-mig-{name}" for name in ("1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb")] + [
        "a100-40gb-sxm"
    ]
    launches = [known.of(key, "int8").fit.launch for key in keys]
    speeds = [known.of(key, "int8").cost(BERT_LARGE).per_token for key in keys]
    assert launches == sorted(launches, reverse=True)
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("key", "precision", "why"), [("t4", "bf16", "no bf16 tensor cores"), ("cpu", "fp32", "no peaks")]
)
def test_hardware_without_a_peak_is_not_estimated(key: str, precision: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        calibration.load().of(key, precision)


def test_launches_scale_with_layers_and_weights_with_bytes() -> None:
    part = catalog.hardware("t4")
    fit = FittedParameters(0.4, 0.002)
    whole = fixed_seconds(part, "fp16", fit, BERT_LARGE)
    assert whole == pytest.approx(0.002 + BERT_LARGE.weights * 2 / 320e9)
    assert fixed_seconds(part, "int8", fit, BERT_LARGE) == pytest.approx(0.002 + BERT_LARGE.weights / 320e9)
