"""Estimated figures of the configurations on hardware that a benchmark did not run on.

They never share a table with measured figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inferctl import estimate
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Plan
from inferctl.core.errors import InferctlError
from inferctl.estimate import lengths
from inferctl.estimate.forecast import Range

# As long as the cache-busting prefix that the load generator puts before each text.
_PREFIX = "100000 "
_FIGURES = ("p50_ms", "p90_ms", "p99_ms", "requests_per_s")


@dataclass(frozen=True)
class EstimatedFigures:
    """Estimated latency and throughput of one configuration on other hardware.

    `ranges` has p50_ms, p90_ms, p99_ms and requests_per_s; None for a latency beyond saturation. `band`: the factors of
    a throughput. `bounded_by`: why the figures are only bounds. `rests_on`: the data source.
    """

    ranges: Mapping[str, Range | None]
    precision: str
    band: tuple[float, float]
    bounded_by: Sequence[str]
    saturated: bool
    basis: str
    rests_on: str
    notes: Sequence[str]

    def value(self, key: str) -> float | None:
        """Return an estimated figure; None beyond saturation, and if only a bound is known."""
        found = self.ranges.get(key)
        return None if found is None or found.value is None else round(found.value, 4)

    def as_dict(self) -> dict[str, Any]:
        """Return the `estimate` key of a row."""
        return {
            **{key: self.value(key) for key in _FIGURES},
            "ranges": {key: found and asdict(found) for key, found in self.ranges.items()},
            "precision": self.precision,
            "band": {"low": self.band[0], "high": self.band[1]},
            "bounded_by": list(self.bounded_by),
            "saturated": self.saturated,
            "basis": self.basis,
            "rests_on": self.rests_on,
            "notes": list(self.notes),
        }


def each(
    plan: Plan, targets: Sequence[BenchTarget], model: Path | None, hardware: str
) -> Iterator[tuple[BenchTarget, EstimatedFigures | str]]:
    """Yield each target with its figures on `hardware`, or with the reason why there are none."""
    counted: dict[str, list[int]] = {}
    for target in targets:
        if target.precision is None or model is None:
            yield target, "inferctl did not start this server" if target.url else "no local model"
            continue
        load = plan.load_with(target.load)
        if load.task == "generate":
            yield target, "there is no estimate for generation, measure on that hardware"
            continue
        if load.stages or load.spike or load.trace:
            yield target, "only loads of one stage are estimated"
            continue
        if load.capacity_percent is not None:
            yield target, "the rate is a share of a capacity that must be measured first"
            continue
        corpus = target.corpus or plan.corpus
        try:
            if corpus not in counted:
                counted[corpus] = _tokens(corpus, load.inputs != "as-is", model)
            found = estimate.rows(
                model,
                target.precision,
                hardware,
                load,
                counted[corpus],
                target.max_batch_tokens or 16_384,
                plan.seed,
            )
            yield target, _figures(found)
        except InferctlError as error:
            yield target, error.message


def _tokens(corpus: str, unique: bool, model: Path) -> list[int]:
    texts, _ = workload.read_corpus(corpus)
    config = estimate.read_config(model)
    longest = int(config.get("max_position_embeddings") or 512)
    inputs = [_PREFIX + text if unique else text for text in texts]
    return lengths.of_texts(inputs, model / "tokenizer.json", longest)[0]


def _figures(found: estimate.Estimate) -> EstimatedFigures:
    return EstimatedFigures(
        ranges={
            "p50_ms": found.p50_ms,
            "p90_ms": found.p90_ms,
            "p99_ms": found.p99_ms,
            "requests_per_s": found.requests_per_s,
        },
        precision=found.precision,
        band=found.band,
        bounded_by=found.bounded_by,
        saturated=found.saturated,
        basis=found.basis,
        rests_on=found.rests_on,
        notes=[*(f"only a bound, because of the {reason}" for reason in found.bounded_by), *found.notes],
    )
