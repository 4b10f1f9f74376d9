"""What a part would do with a model under a load: the figures of an estimate, each with the range that the error band leaves.

A range comes from three simulations: as fitted, and with all times at the slow and at the fast end of the band.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inferctl import catalog, fit
from inferctl.catalog import Hardware
from inferctl.errors import UsageError
from inferctl.estimate import calibration, lengths
from inferctl.estimate.calibration import Calibrated
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer
from inferctl.estimate.search import REQUESTS, Server
from inferctl.estimate.simulate import UNBOUNDED, Answers
from inferctl.serve.batcher import Limits
from inferctl.sizes import size

# Every estimate for a GPU rests on rows of another program; this belongs beside its figures.
OTHER_ENGINE = "the rows ran TensorRT with CUDA graphs: another engine is slower by an unknown factor, most of all at small batches"
_SEQUENCES = 250_000
WITHOUT_HTTP = "HTTP, tokenising and the network are not in it"


class Load(Protocol):
    """What a load must say; `inferctl.bench.plan.Load` does."""

    @property
    def mode(self) -> str: ...
    @property
    def users(self) -> int: ...
    @property
    def rate(self) -> float | None: ...
    @property
    def arrivals(self) -> str: ...
    @property
    def inputs_per_request(self) -> int: ...


@dataclass(frozen=True)
class Range:
    """An estimated figure and the ends of its band; `high` is None where it has no bound (beyond saturation)."""

    value: float
    low: float
    high: float | None

    def times(self, factor: float) -> Range:
        """The same range in another unit."""
        return Range(self.value * factor, self.low * factor, None if self.high is None else self.high * factor)


@dataclass(frozen=True)
class Work:
    """The requests of an estimate: `tokens` of each input, inputs a request, the batcher's limit (tokens), and batches that the engine runs at a time."""

    tokens: Sequence[int]
    inputs: int = 1
    batch_tokens: int = 16_384
    seed: int = 0
    count: int = REQUESTS
    slots: int = 1

    def server(self, cost: Cost) -> Server:
        """A server that gets these requests."""
        total = max(2000, self.count // self.inputs)
        # Large requests vary less, and a million sequences take half a minute.
        total = max(500, min(total, _SEQUENCES // self.inputs))
        drawn = lengths.spread(self.tokens, total * self.inputs, self.seed)
        requests = [drawn[i * self.inputs : (i + 1) * self.inputs] for i in range(total)]
        return Server(cost, Limits(self.batch_tokens, UNBOUNDED), requests, self.slots, self.seed)


@dataclass(frozen=True)
class Estimate:
    """Estimated, never measured: latency (ms) and requests/s under one load, with what they rest on.

    `band`: factors on a throughput between which every left-out row of this basis lay. `saturated`: more was offered than the part does;
    latency then grows without end and has no figure.
    """

    hardware: str
    name: str
    precision: str
    basis: str
    rests_on: str
    band: tuple[float, float]
    requests_per_s: Range
    p50_ms: Range | None
    p90_ms: Range | None
    p99_ms: Range | None
    saturated: bool
    notes: tuple[str, ...] = ()
    outcome: str = field(default="estimated", init=False)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "band": {"low": self.band[0], "high": self.band[1]}, "notes": list(self.notes)}


def rows(
    config: Path,
    precision: str,
    hardware: str,
    load: Load,
    tokens: Sequence[int],
    batch_tokens: int = 16_384,
    seed: int = 0,
) -> Estimate:
    """What the part `hardware` would do as `inferctl serve` under `load`, with the model of `config` (its `config.json`, or its folder).

    `tokens`: lengths of the inputs. Raises `UsageError` when there is nothing to estimate it from, int8 on GPUs among it: no row ran LLM.int8.
    """
    part = catalog.hardware(hardware)
    chosen = catalog.best_precision(part.traits) if precision == "auto" else precision
    if chosen == "int8" and part.kind == "cuda":
        raise UsageError(
            f"int8 on {part.key} cannot be estimated: the rows ran TensorRT INT8, the server runs LLM.int8",
            "LLM.int8 was slower than fp16 wherever measured; `inferctl estimate -p int8` shows TensorRT's",
        )
    data = read_config(config)
    calibrated = calibration.load().of(part.key, chosen)
    work = Work(tokens, load.inputs_per_request, batch_tokens, seed)
    return under(calibrated, Transformer.of(data), work, load, notes_for(calibrated, data, batch_tokens))


def under(calibrated: Calibrated, model: Transformer, work: Work, load: Load, notes: Sequence[str] = ()) -> Estimate:
    """The estimate for one load."""
    fitted, fast, slow = (answers(work.server(cost), load) for cost in ends(calibrated, model))
    band = calibrated.band
    open_loop = load.mode == "open"
    saturated = fitted is None
    most = work.server(calibrated.cost(model)).offline().per_second if fitted is None else fitted.per_second
    rate = load.rate if open_loop and load.rate and not saturated else None
    p50, p90, p99 = (None if fitted is None else latency(q, fitted, fast, slow) for q in (0.5, 0.9, 0.99))
    return Estimate(
        hardware=calibrated.part.key,
        name=calibrated.part.name,
        precision=calibrated.precision,
        basis=calibrated.basis,
        rests_on=calibrated.rests_on,
        band=band.throughput,
        requests_per_s=Range(rate, rate, rate) if rate else ranged(band.throughput, most),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        saturated=saturated,
        notes=tuple(notes),
    )


def latency(q: float, fitted: Answers, fast: Answers | None, slow: Answers | None) -> Range:
    """A percentile in ms, from three simulations; one that is over capacity has no bound."""
    return Range(
        fitted.percentile(q) * 1000,
        (fast or fitted).percentile(q) * 1000,
        None if slow is None else slow.percentile(q) * 1000,
    )


def ends(calibrated: Calibrated, model: Transformer) -> tuple[Cost, Cost, Cost]:
    """The cost of batches as fitted, at the fast end of the band and at the slow end."""
    cost, band = calibrated.cost(model), calibrated.band
    return cost, cost.times(band.fastest), cost.times(band.slowest)


def answers(server: Server, load: Load) -> Answers | None:
    """Answers under a load; None when an open loop offers more than the server does."""
    if load.mode != "open":
        return server.closed(load.users)
    rate = load.rate or 1.0
    return None if rate >= server.offline().per_second else server.open(rate, load.arrivals)


def ranged(band: tuple[float, float], value: float) -> Range:
    """A figure with a band of factors around it."""
    return Range(value, value * band[0], value * band[1])


def notes_for(calibrated: Calibrated, config: Mapping[str, Any], batch_tokens: int) -> list[str]:
    """What to know before using the figures, for this part, precision and model."""
    model, part = Transformer.of(config), calibrated.part
    found = [*calibrated.notes, OTHER_ENGINE, WITHOUT_HTTP]
    if (model.layers, model.per_token) != (BERT_LARGE.layers, BERT_LARGE.per_token):
        found.append(
            "the rows ran BERT-large: the band does not know how well the matrices of another model fill the part"
        )
    vocabulary = int(config.get("vocab_size") or 0) * int(config.get("hidden_size") or config.get("dim") or 0)
    need = fit.memory(fit.ModelSize(model.weights + vocabulary, config), calibrated.precision, batch_tokens, part)
    if part.memory_bytes and need.total > part.memory_bytes:
        found.insert(0, f"does not fit: needs about {size(need.total, 1)} of {size(part.memory_bytes, 1)}")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json`, or that of a model folder. Raises `UsageError`."""
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {error}", "--config takes the config.json of a model") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file} is not a JSON object", "--config takes the config.json of a model")
    return data


def prices(part: Hardware) -> list[dict[str, Any]]:
    """On-demand prices with their source and date; a slice costs what it takes of its GPU, compute or memory, whichever is more."""
    whole, share = (catalog.hardware(part.mig.parent), slice_share(part)) if part.mig else (part, 1.0)
    return [
        {
            "provider": price.provider,
            "instance": price.instance + (f", {share:.3g} of it" if part.mig else ""),
            "usd_per_hour": price.usd_per_hour * share,
            "source": price.source,
            "date": price.date.isoformat(),
        }
        for price in whole.prices
    ]


def slice_share(part: Hardware) -> float:
    """How much of a GPU's price a slice takes: its compute slots of seven or its memory, whichever is more."""
    if not part.mig:
        return 1.0
    slots = int(part.mig.profile.partition("g")[0]) / 7
    return max(slots, part.mig.memory_fraction)


def per_million(usd_per_hour: float, texts_per_s: Range) -> Range:
    """US dollars for a million texts; cheap where the throughput is high."""

    def dollars(rate: float) -> float:
        return usd_per_hour / 3600 * 1e6 / rate if rate > 0 else math.inf

    high = texts_per_s.high
    return Range(dollars(texts_per_s.value), dollars(high) if high else 0.0, dollars(texts_per_s.low))
