"""Estimated rows for hardware that a bench did not run on. They never share a column with measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inferctl import estimate
from inferctl.bench.measure.outcome import Subject
from inferctl.bench.plan import workload
from inferctl.bench.plan.plan import Plan
from inferctl.errors import InferctlError
from inferctl.estimate import lengths

# As long as the prefix that the load generator puts before each text, so that no two texts are equal.
_SERIAL = "100000 "


def each(
    plan: Plan, subjects: Sequence[Subject], model: Path | None, hardware: str
) -> Iterator[tuple[Subject, dict[str, Any] | str]]:
    """Each configuration with its figures on `hardware`, or with the reason why there are none.

    `p50_ms`, `p90_ms`, `p99_ms` and `requests_per_s` are None beyond saturation and where only a bound is known.
    `ranges` has all of them as {value, low, high, bound}. `bounded_by` says why they are bounds. `band` {low, high}
    are the factors of a throughput. The other keys are `saturated`, `basis`, `rests_on` and `notes`.
    """
    counted: dict[str, list[int]] = {}
    for subject in subjects:
        if subject.precision is None or model is None:
            yield subject, "a server that runs elsewhere" if subject.url else "no model at hand"
            continue
        load = plan.load_with(subject.load)
        if load.stages or load.spike or load.trace:
            yield subject, "only loads of one stage are estimated"
            continue
        if load.capacity_percent is not None:
            yield subject, "the rate is a share of a capacity that is measured first"
            continue
        corpus = subject.corpus or plan.corpus
        try:
            if corpus not in counted:
                counted[corpus] = _tokens(corpus, load.inputs != "as-is", model)
            yield (
                subject,
                _figures(
                    estimate.rows(
                        model,
                        subject.precision,
                        hardware,
                        load,
                        counted[corpus],
                        subject.max_batch_tokens or 16_384,
                        plan.seed,
                    )
                ),
            )
        except InferctlError as error:
            yield subject, error.message


def _tokens(corpus: str, unique: bool, model: Path) -> list[int]:
    texts, _ = workload.read_corpus(corpus)
    config = estimate.read_config(model)
    longest = int(config.get("max_position_embeddings") or 512)
    return lengths.of_texts([_SERIAL + one if unique else one for one in texts], model / "tokenizer.json", longest)[0]


def _figures(found: estimate.Estimate) -> dict[str, Any]:
    ranges = found.as_dict()
    keys = ("p50_ms", "p90_ms", "p99_ms", "requests_per_s")
    values = {key: ranges[key] and ranges[key]["value"] for key in keys}
    others = ("precision", "band", "bounded_by", "saturated", "basis", "rests_on")
    return {
        **{key: None if value is None else round(value, 4) for key, value in values.items()},
        "ranges": {key: ranges[key] for key in keys},
        **{key: ranges[key] for key in others},
        "notes": [*(f"only a bound, because of the {reason}" for reason in found.bounded_by), *found.notes],
    }
