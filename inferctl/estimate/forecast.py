"""Computes the figures of an estimate for one part, one model and one load, as bounds.

The published rows ran TensorRT. How much slower torch is, is not known, so a figure is the fast end of the error band:
"at most" for rates, "at least" for times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferctl.batching.batcher import QueueLimits
from inferctl.core.errors import UsageError
from inferctl.core.sizes import size
from inferctl.estimate import calibration, front_end, lengths
from inferctl.estimate.calibration import CalibratedPart
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer
from inferctl.estimate.search import REQUESTS, SimulatedServer
from inferctl.estimate.simulate import UNBOUNDED, percentile
from inferctl.facts import catalog
from inferctl.facts.catalog import Hardware
from inferctl.models import fit, model
from inferctl.models.model import ModelFolder, architecture, resolve_task

_ENGINE = "engine: the rows ran TensorRT; the speed of torch relative to TensorRT is not measured"
# If the width or depth of a model, or the mean length of its inputs, differs by more than this factor from the rows,
# the output says so.
MAX_SIZE_RATIO = 2.0
WITHOUT_NETWORK = "network time and clock changes of the device are not included"
_SEQUENCES = 250_000
# Models of other tasks, and what to do with them.
_OTHERS = {
    "outputs": ("a sparse encoder or a multi-vector model", "measure it with `inferctl bench`"),
    "rerank": ("a reranker", "measure a reranker with `inferctl bench`"),
    "classify": ("a classifier", "measure a classifier with `inferctl bench`"),
    "generate": (
        "a generative model",
        "measure a generative model with `inferctl bench`, and see with `inferctl check` where it fits and one API "
        "process suffices; an embedding model has a modules.json in its folder",
    ),
}


def exactly(value: float) -> dict[str, Any]:
    """Return a figure that is no bound: a rate that was asked for, or the time that it takes."""
    return {"value": value, "low": value, "high": value, "bound": None}


def at_most(high: float) -> dict[str, Any]:
    """Return an estimated figure of which the upper bound is known."""
    return {"value": None, "low": None, "high": high, "bound": "at most"}


def at_least(low: float) -> dict[str, Any]:
    """Return an estimated figure of which the lower bound is known."""
    return {"value": None, "low": low, "high": None, "bound": "at least"}


@dataclass(frozen=True)
class Scenario:
    """The requests of an estimate and the server that receives them.

    `tokens`: length of each input. `inputs`: number of inputs per request. `batch_tokens`: limit of the batcher.
    `count`: number of requests.
    """

    tokens: Sequence[int]
    inputs: int = 1
    batch_tokens: int = 16_384
    count: int = REQUESTS
    api_processes: int = 1

    @property
    def front_seconds(self) -> float:
        """Seconds of the front end per request."""
        return front_end.load().seconds(self.inputs, self.api_processes)

    @property
    def front_rate(self) -> float:
        """Requests per second that the front end can serve."""
        return 1 / self.front_seconds

    def server(self, cost: Cost, front: float | None = None) -> SimulatedServer:
        """Return a server for these requests. `front`: seconds of the front end per request, None for the default."""
        total = max(2000, self.count // self.inputs)
        # Fewer large requests are sufficient, because they vary less. A million sequences take 30 s to simulate.
        most = _SEQUENCES * min(self.count, REQUESTS) // REQUESTS
        total = max(200, min(total, most // self.inputs))
        drawn = lengths.spread(self.tokens, total * self.inputs)
        requests = [drawn[i * self.inputs : (i + 1) * self.inputs] for i in range(total)]
        front = self.front_seconds if front is None else front
        return SimulatedServer(cost, QueueLimits(self.batch_tokens, UNBOUNDED), requests, front=front)


def under_load(calibrated: CalibratedPart, model: Transformer, scenario: Scenario, rate: float) -> dict[str, Any]:
    """Return the latency percentiles (ms) at `rate` requests per second, None beyond the capacity."""
    server = scenario.server(calibrated.fastest(model))
    saturated = rate >= min(capacity(calibrated, model, scenario), server.offline().per_second)
    latencies = None if saturated else server.open(rate).latencies
    return {
        "requests_per_s": exactly(rate),
        **{f"p{q * 100:g}_ms": latencies and at_least_ms(latencies, q) for q in (0.5, 0.9, 0.99)},
        "saturated": saturated,
    }


def differences(model: Transformer, scenario: Scenario) -> list[str]:
    """Return why an estimate of this model and these requests is only a bound."""
    found = [_ENGINE]
    for name, value, row_value in (
        ("width", model.width, BERT_LARGE.width),
        ("depth", model.layers, BERT_LARGE.layers),
    ):
        if max(value / row_value, row_value / value) > MAX_SIZE_RATIO:
            found.append(f"{name}: the rows ran BERT-large with {row_value}, this model has {value}")
    mean, row_mean = sum(scenario.tokens) / len(scenario.tokens), calibration.load().mean_length
    if max(mean / row_mean, row_mean / mean) > MAX_SIZE_RATIO:
        found.append(f"length: the rows have {row_mean:.0f} tokens per text on average, these inputs have {mean:.0f}")
    return found


def capacity(calibrated: CalibratedPart, model: Transformer, scenario: Scenario) -> float:
    """Return the most requests per second that the part and its front end can serve, all queued from the start."""
    engine = scenario.server(calibrated.cost(model), front=0.0).offline().per_second
    return min(engine * calibrated.band_for(model).throughput[1], scenario.front_rate)


def served(calibrated: CalibratedPart, model: Transformer, scenario: Scenario, slo_p99_ms: float | None) -> float:
    """Return the most requests per second that one replica serves, within the SLO if there is one."""
    most = capacity(calibrated, model, scenario)
    if slo_p99_ms is None:
        return most
    return scenario.server(calibrated.fastest(model)).highest_rate(slo_p99_ms / 1000, most)


def at_least_ms(latencies: Sequence[float], q: float) -> dict[str, Any]:
    """Return a percentile in ms of latencies in seconds, as a lower bound."""
    return at_least(percentile(latencies, q) * 1000)


def notes_for(calibrated: CalibratedPart, config: Mapping[str, Any], batch_tokens: int) -> list[str]:
    """Return the limitations of the figures for this part, precision and model."""
    return [*memory_problem(calibrated, config, batch_tokens), *calibrated.notes, WITHOUT_NETWORK]


def memory_problem(calibrated: CalibratedPart, config: Mapping[str, Any], batch_tokens: int) -> list[str]:
    """Return how much memory the model needs and the part has if it does not fit, else nothing."""
    model, part = Transformer.of(config), calibrated.part
    vocabulary = int(config.get("vocab_size") or 0) * int(config.get("hidden_size") or config.get("dim") or 0)
    need = fit.memory(fit.ModelSize(model.weights + vocabulary, config), calibrated.precision, batch_tokens, part)
    if part.memory_bytes and need.total > part.memory_bytes:
        return [f"does not fit: needs about {size(need.total, 1)} of {size(part.memory_bytes, 1)}"]
    return []


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`, or that of a model folder. Raises `UsageError`, also for a model that is not estimated."""
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}", "pass the config.json of a model") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file} is not a JSON object", "pass the config.json of a model")
    folder = ModelFolder(file.parent)
    facts = fit.ModelSize(0, data, has_modules=folder.has_modules, library_type=folder.library_type)
    task = resolve_task("auto", facts, str(file))
    sparse_or_tokens = {folder.library_type, architecture(data)} & model.OTHER_OUTPUTS
    if task != "embed" or sparse_or_tokens:
        # Front end and output were measured for dense vectors only.
        kind, hint = _OTHERS["outputs" if sparse_or_tokens else task]
        raise UsageError(f"estimates are for dense embeddings, but {file} is of {kind} ({architecture(data)})", hint)
    return data


def prices(part: Hardware) -> list[dict[str, Any]]:
    """Return the on-demand prices with their source and date. A slice costs an equal part of its GPU."""
    whole = catalog.hardware(part.mig.parent) if part.mig else part
    return [
        {
            "provider": price.provider,
            "instance": price.instance + (f", {1 / part.parts:.3g} of it" if part.mig else ""),
            "usd_per_hour": price.usd_per_hour / part.parts,
            "source": price.source,
            "date": price.date.isoformat(),
        }
        for price in whole.prices
    ]
