"""The sections of a plan: what is served, with which quality, and how a rate is searched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from inferctl.bench.plan.shape import Keys, Name
from inferctl.config.spec_types import Precision, Section
from inferctl.core.errors import UsageError


class Configuration(Section):
    """One way to serve the model, with the corpus and the keys of the load in which it differs from the plan.

    `checkpoint` is the folder of a prepared checkpoint of the same model, for generation. A plan in a file names it
    relative to the file.
    """

    name: Name = Field(description="Name of the row.")
    precision: Precision = Field(description="Precision to serve in.")
    checkpoint: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Generation: folder of a prepared checkpoint of the same model."
    )
    max_batch_tokens: int | None = Field(None, ge=64, le=1_048_576, description="The server's `--max-batch-tokens`.")
    corpus: str | None = Field(None, description="Corpus, if it differs from the plan's.")
    load: Keys | None = Field(None, description="Keys of the load that differ from the plan's.")


class Quality(Section):
    """The texts on which a configuration is compared with fp32, and the limits with which it can win.

    Cosine and recall are those of embeddings, Kendall's tau that of rerank scores, the score difference that of rerank
    scores and of scores of labels. Its limit is a share of the range of the fp32 scores. For a classifier, `min_top_1`
    is the smallest share of texts with the same label. For generation, `tokens` is the number of tokens
    of which the log-probabilities are compared, `max_kl` the largest mean KL divergence (nats), and `min_top_1` the
    smallest share of equal most likely tokens.
    """

    corpus: str = Field("mixed", description="Corpus of the comparison with fp32.")
    texts: int = Field(400, ge=20, le=100_000, description="Number of texts.")
    min_cosine_p1: float = Field(
        0.98,
        ge=-1,
        le=1,
        description="Embeddings: lowest 1st percentile of the cosine with which a configuration can win.",
    )
    min_recall: float = Field(0.9, ge=0, le=1, description="Embeddings: lowest recall@10.")
    min_kendall: float = Field(0.9, ge=-1, le=1, description="Rerank: lowest tau.")
    max_score_difference: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Rerank and classify: largest score difference, as a share of the range of the fp32 scores.",
    )
    tokens: int = Field(4096, ge=256, le=1_000_000, description="Generation: number of compared tokens.")
    max_kl: float = Field(0.1, ge=0, le=100, description="Generation: largest mean KL divergence in nats.")
    min_top_1: float = Field(
        0.8, ge=0, le=1, description="Generation: lowest share of equal most likely tokens. Classify: of equal labels."
    )


class Search(Section):
    """Settings of the search for the highest rate within the SLO (`inferctl/bench/measure/search.py`)."""

    slo_p99_ms: float | None = Field(None, gt=0, le=3_600_000, description="The SLO. Default: the spec's `slo.p99_ms`.")
    resolution: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Stop if the failing rate is less than this share above the rate that meets the SLO.",
    )
    probe_s: float = Field(8, ge=1, le=3600, description="Shortest probe in seconds.")
    max_probe_s: float = Field(
        60, ge=1, le=86_400, description="Longest probe in seconds. Raise it if samples are not enough."
    )
    max_probes: int = Field(24, ge=3, le=200, description="Limit of probes.")
    start_rate: float | None = Field(
        None, gt=0, le=100_000, description="First rate in requests/s. Default: a fifth of the ceiling."
    )
    max_rate: float = Field(100_000, gt=0, le=100_000, description="Highest rate in requests/s.")
    budget_s: float | None = Field(
        None, ge=1, le=604_800, description="Limit in seconds for the searches of all servers."
    )

    def required_slo_ms(self, default_ms: float | None) -> float:
        """Return the p99 SLO: the search's own, else `default_ms`. Raises `UsageError` if there is none."""
        slo_ms = self.slo_p99_ms or default_ms
        if not slo_ms:
            raise UsageError(
                "a search requires an SLO",
                "pass `--slo 100` (ms; for generation, also `--slo-ttft 500` or `--slo-itl 50`), or set "
                "`search.slo_p99_ms` in the plan or `slo` in the spec",
            )
        return slo_ms


class GenerationPlan(Section):
    """The keys of a plan that have other values for generation. `load` has the keys of the load that differ."""

    configurations: list[Configuration] | None = Field(None, description="Replaces `configurations`.")
    load: Keys = Field(default_factory=dict, description="Keys of the load that differ.")
    repeats: int | None = Field(None, ge=1, le=100, description="Replaces `repeats`.")


def combine(
    configurations: Sequence[Configuration], batch_tokens: Sequence[int] = (), corpora: Sequence[str] = ()
) -> list[Configuration]:
    """Return each configuration with each token budget of a batch and each corpus.

    The values of an axis replace the configuration's own value. Only axes with several values become part of the names.
    """
    axes: list[list[tuple[str, Keys]]] = [
        [(str(value), {"max_batch_tokens": value}) for value in dict.fromkeys(batch_tokens)],
        [(Path(value).stem, {"corpus": value}) for value in dict.fromkeys(corpora)],
    ]
    no_change: list[tuple[str, Keys]] = [("", {})]
    choices_of_axes = list(itertools.product(*(axis or no_change for axis in axes)))
    combined = []
    for configuration, choices in itertools.product(configurations, choices_of_axes):
        parts = [configuration.name, *(label for (label, _), axis in zip(choices, axes, strict=True) if len(axis) > 1)]
        changes = {key: value for _, values in choices for key, value in values.items()}
        keys = {**configuration.model_dump(), **changes, "name": "-".join(parts)}
        combined.append(Configuration.model_validate(keys))
    return combined
