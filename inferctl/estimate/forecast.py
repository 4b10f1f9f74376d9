"""The figures of an estimate for one part, one model and one load: a value with its error band, or only a bound.

A band comes from three simulations: as fitted, and with all times at the slow and at the fast end of the band. Where
the model or the engine is far from the published rows, no band is known. Then a figure is only the fast end: "at
most" for rates, "at least" for times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from inferctl import catalog, fit
from inferctl.catalog import Hardware
from inferctl.errors import UsageError
from inferctl.estimate import calibration, front_end, lengths
from inferctl.estimate.calibration import Calibrated
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer
from inferctl.estimate.search import REQUESTS, Server
from inferctl.estimate.simulate import UNBOUNDED, Answers
from inferctl.serve.batcher import Limits
from inferctl.sizes import size

# What can run the batches: torch is what `inferctl serve` runs, TensorRT is what the rows ran.
ENGINES = ("torch", "tensorrt")
ROWS_ENGINE = "tensorrt"
# A model that differs more than this from that of the rows gets a bound.
FAR = 2.0
WITHOUT_NETWORK = "the network and clock changes of the device are not included"
_SEQUENCES = 250_000
Bound = Literal["at most", "at least"]


class Load(Protocol):
    """What a load must say; `inferctl.bench.plan.shape.Load` does."""

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
    """An estimated figure and the ends of its band, or with `bound` only one end.

    "at most": only `high` is known. "at least": only `low` is known. Without a bound, `high` is None beyond saturation.
    """

    value: float | None
    low: float | None
    high: float | None
    bound: Bound | None = None

    @classmethod
    def exactly(cls, value: float) -> Range:
        """A figure without a band."""
        return cls(value, value, value)

    @classmethod
    def at_most(cls, high: float) -> Range:
        """An upper bound."""
        return cls(None, None, high, "at most")

    @classmethod
    def at_least(cls, low: float) -> Range:
        """A lower bound."""
        return cls(None, low, None, "at least")

    def times(self, factor: float) -> Range:
        """The same range in another unit."""
        value, low, high = (None if one is None else one * factor for one in (self.value, self.low, self.high))
        return Range(value, low, high, self.bound)

    def capped(self, most: float) -> Range:
        """The range under a limit: an upper bound where the limit is below the value itself."""
        if self.high is not None and self.high <= most:
            return self
        if self.value is None or self.value >= most:
            return Range.at_most(most)
        return Range(self.value, self.low, most)


@dataclass(frozen=True)
class Work:
    """The requests of an estimate and the server that gets them.

    `tokens` of each input, `inputs` per request, the batcher's limit (tokens), batches that the engine runs at a time
    (`slots`), and the engine. `front` is the front end's time per request in seconds; None takes the measured one.
    """

    tokens: Sequence[int]
    inputs: int = 1
    batch_tokens: int = 16_384
    seed: int = 0
    count: int = REQUESTS
    slots: int = 1
    engine: str = "torch"
    front: float | None = None

    @property
    def front_seconds(self) -> float:
        """Seconds of the front end per request."""
        return front_end.load().seconds(self.inputs) if self.front is None else self.front

    @property
    def front_rate(self) -> float:
        """Requests per second that the front end can serve."""
        return 1 / self.front_seconds if self.front_seconds else math.inf

    def server(self, cost: Cost, front: float | None = None) -> Server:
        """A server that gets these requests. `front`: another time of the front end per request, 0 for none."""
        total = max(2000, self.count // self.inputs)
        # Large requests vary less, and a million sequences take half a minute.
        total = max(500, min(total, _SEQUENCES // self.inputs))
        drawn = lengths.spread(self.tokens, total * self.inputs, self.seed)
        requests = [drawn[i * self.inputs : (i + 1) * self.inputs] for i in range(total)]
        front = self.front_seconds if front is None else front
        return Server(cost, Limits(self.batch_tokens, UNBOUNDED), requests, self.slots, self.seed, front)


@dataclass(frozen=True)
class Estimate:
    """Estimated, never measured: latency (ms) and requests/s under one load, and the data source of the estimate.

    `band`: the factors of a throughput between which 95% of further rows of this basis lie. `bounded_by`: why the
    figures are only bounds; empty where they have a band. `saturated`: the offered rate exceeds the capacity, so
    latency has no figure.
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
    bounded_by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    outcome: str = field(default="estimated", init=False)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **asdict(self),
            "band": {"low": self.band[0], "high": self.band[1]},
            "bounded_by": list(self.bounded_by),
            "notes": list(self.notes),
        }


def rows(
    config: Path,
    precision: str,
    hardware: str,
    load: Load,
    tokens: Sequence[int],
    batch_tokens: int = 16_384,
    seed: int = 0,
) -> Estimate:
    """Estimate `inferctl serve` on the part `hardware` under `load`.

    `config`: the `config.json` of the model, or its folder. `tokens`: lengths of the inputs. Raises `UsageError` when
    no rows can support the estimate. That includes int8 on GPUs: no row ran LLM.int8.
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
    far = differences(model, work.engine)
    band = calibrated.band_for(model)
    fitted, fast, slow = (answers(work.server(cost), load) for cost in ends(calibrated, model))
    known = fast if far else fitted
    open_loop = load.mode == "open"
    if known is None:
        requests = capacity(calibrated, model, work)
    elif open_loop and load.rate:
        requests = Range.exactly(load.rate)
    elif far:
        requests = Range.at_most(known.per_second)
    else:
        requests = ranged(band.throughput, known.per_second).capped(work.front_rate)
    p50, p90, p99 = (None if known is None else latency(q, (fitted, fast, slow), bool(far)) for q in (0.5, 0.9, 0.99))
    return Estimate(
        hardware=calibrated.part.key,
        name=calibrated.part.name,
        precision=calibrated.precision,
        basis=calibrated.basis,
        rests_on=calibrated.rests_on,
        band=band.throughput,
        requests_per_s=requests,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        saturated=known is None,
        bounded_by=tuple(far),
        notes=tuple(notes),
    )


def differences(model: Transformer, engine: str) -> list[str]:
    """Why an estimate of this model on this engine is only a bound; empty where the rows are near enough for a band."""
    found = []
    if engine != ROWS_ENGINE:
        found.append(f"engine: the rows ran TensorRT; how {engine} compares with it on a GPU is not measured")
    for name, mine, theirs in (
        ("width", model.width, BERT_LARGE.width),
        ("depth", model.layers, BERT_LARGE.layers),
    ):
        if max(mine / theirs, theirs / mine) > FAR:
            found.append(f"{name}: the rows ran BERT-large with {theirs}, this model has {mine}")
    return found


def capacity(calibrated: Calibrated, model: Transformer, work: Work) -> Range:
    """Requests per second when all of them wait from the start."""
    engine = work.server(calibrated.cost(model), front=0.0).offline().per_second
    found = ranged(calibrated.band_for(model).throughput, engine)
    if differences(model, work.engine):
        found = Range.at_most(found.high or engine)
    return found.capped(work.front_rate)


def latency(q: float, simulations: Sequence[Answers | None], bounded: bool) -> Range:
    """A percentile in ms, from simulations as fitted, at the fast and at the slow end.

    None is one beyond saturation.
    """
    value, low, high = (None if one is None else one.percentile(q) * 1000 for one in simulations)
    return Range.at_least(low or 0.0) if bounded else Range(value, value if low is None else low, high)


def ends(calibrated: Calibrated, model: Transformer) -> tuple[Cost, Cost, Cost]:
    """The cost of batches as fitted, at the fast end of the band and at the slow end."""
    cost, band = calibrated.cost(model), calibrated.band_for(model)
    return cost, cost.times(band.fastest), cost.times(band.slowest)


def answers(server: Server, load: Load) -> Answers | None:
    """Answers under a load; None when an open loop offers more than the server can serve."""
    if load.mode != "open":
        return server.closed(load.users)
    rate = load.rate or 1.0
    return None if rate >= server.offline().per_second else server.open(rate, load.arrivals)


def ranged(band: tuple[float, float], value: float) -> Range:
    """A figure with a band of factors around it."""
    return Range(value, value * band[0], value * band[1])


def notes_for(calibrated: Calibrated, config: Mapping[str, Any], batch_tokens: int) -> list[str]:
    """The limitations of the figures for this part, precision and model."""
    model, part = Transformer.of(config), calibrated.part
    found = [*calibrated.notes, WITHOUT_NETWORK]
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
    """On-demand prices with their source and date.

    A slice costs what it takes of its GPU, compute or memory, whichever is more.
    """
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
    """US dollars per million texts: a lower bound where the throughput is an upper one."""

    def dollars(rate: float | None) -> float | None:
        return usd_per_hour / 3600 * 1e6 / rate if rate else None

    if texts_per_s.bound:
        return Range.at_least(dollars(texts_per_s.high) or 0.0)
    return Range(dollars(texts_per_s.value), dollars(texts_per_s.high), dollars(texts_per_s.low))
