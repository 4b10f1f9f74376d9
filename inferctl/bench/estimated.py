"""What the parts that a bench did not run on would do, estimated: rows beside the measured ones that never share a column with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inferctl import estimate
from inferctl.bench import workload
from inferctl.bench.outcome import Subject
from inferctl.bench.plan import Load, Plan
from inferctl.errors import InferctlError
from inferctl.estimate import lengths

# As long as what the load generator puts before each text, so that no two are equal.
_SERIAL = "100000 "


def each(
    plan: Plan, subjects: Sequence[Subject], model: Path | None, hardware: str
) -> Iterator[tuple[Subject, dict[str, Any] | str]]:
    """Each configuration with its figures on `hardware`, or with the reason why there are none.

    Figures: `p50_ms`, `p90_ms`, `p99_ms` (None beyond saturation), `requests_per_s`, `band` {low, high} on a throughput, `ranges` of all
    of them, `saturated`, `basis`, `rests_on` and `notes`.
    """
    counted: dict[str, list[int]] = {}
    for subject in subjects:
        if subject.precision is None or model is None:
            yield subject, "a server that runs elsewhere" if subject.url else "no model at hand"
            continue
        load = Load.model_validate({**plan.load.model_dump(), **(subject.load or {})})
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
    return {
        **{key: None if ranges[key] is None else round(ranges[key]["value"], 4) for key in keys},
        "ranges": {key: ranges[key] for key in keys},
        **{key: ranges[key] for key in ("precision", "band", "saturated", "basis", "rests_on", "notes")},
    }
