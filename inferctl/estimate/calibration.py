"""Launch time and sustained fraction of each part and precision: fitted on published rows, or from the nearest part.

`benchmarks/calibration/fitted.yaml` holds the fit and the errors of its cross-validation;
`benchmarks/calibration/fit.py` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from inferctl import assets, catalog, document
from inferctl.catalog import Hardware
from inferctl.errors import UsageError
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer

# How near the rows are that an estimate rests on, the nearest first; each has its own error band.
Basis = Literal["own", "precision", "slice", "chip", "others"]
BASES: tuple[Basis, ...] = ("own", "precision", "slice", "chip", "others")
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# bf16 and fp16 have one peak and one memory traffic on every part that has both; no row ran bf16 or fp32.
_ROWS_OF = {"bf16": "fp16", "fp32": "fp16"}


@dataclass(frozen=True)
class Fit:
    """What was fitted for one (part, precision): the share of the dense peak that large batches sustain, and the
    seconds that the launches of a batch of BERT-large take, without the reading of its weights. `rows` were used.
    """

    fraction: float
    launch: float
    rows: int = 0


@dataclass(frozen=True)
class Band:
    """The factors of an estimate between which 95% of further rows lie.

    `throughput` (offline), `latency` (single request), `rate` (SLO).
    """

    throughput: tuple[float, float] = (1.0, 1.0)
    latency: tuple[float, float] = (1.0, 1.0)
    rate: tuple[float, float] = (1.0, 1.0)
    rows: int = 0

    @property
    def slowest(self) -> float:
        """The factor on all times at the slow end."""
        return max(self.latency[1], 1 / self.throughput[0], 1.0)

    @property
    def fastest(self) -> float:
        """The factor on all times at the fast end."""
        return min(self.latency[0], 1 / self.throughput[1], 1.0)


@dataclass(frozen=True)
class Calibrated:
    """A part with what its estimates rest on, in words (`rests_on`), and how far those may be off (`band`)."""

    part: Hardware
    precision: str
    fit: Fit
    basis: Basis
    rests_on: str
    band: Band
    notes: tuple[str, ...] = ()

    def cost(self, model: Transformer) -> Cost:
        """What batches of `model` cost on this part."""
        return batch_cost(self.part, self.precision, self.fit, model)

    def band_for(self, model: Transformer) -> Band:
        """The band of an estimate for `model`, whose fast end is never beyond the dense peak of the part.

        A model more than twice as wide as that of the rows can fill the part better than they did, so its fast end is
        the peak.
        """
        fraction = min(1.0, self.fit.fraction)
        wide = model.width > 2 * BERT_LARGE.width

        def most(high: float) -> float:
            return 1 / fraction if wide else min(high, 1 / fraction)

        band = self.band
        latency = fraction if wide else max(band.latency[0], fraction)
        return Band(
            (band.throughput[0], most(band.throughput[1])),
            (latency, band.latency[1]),
            (band.rate[0], most(band.rate[1])),
            band.rows,
        )


@dataclass(frozen=True)
class Calibration:
    """All fits by part and precision, the bands by basis, and the mean length of the rows' samples (tokens)."""

    fits: Mapping[str, Mapping[str, Fit]]
    mean_length: float
    source: str = ""
    bands: Mapping[str, Band] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, key: str, precision: str) -> Calibrated:
        """Of the part `key` of the catalog. Raises `UsageError` when the part or the precision cannot be estimated."""
        part = catalog.hardware(key)
        peak = part.peaks.get(precision)
        if peak is None:
            how = (
                catalog.support(precision, part.traits).reason if part.kind == "cuda" else "a CPU profile has no peaks"
            )
            hint = "give its measured pace instead: --capacity FILE" if part.kind == "cpu" else "fp16 is native there"
            raise UsageError(f"{precision} on {part.key} cannot be estimated: no peak is known ({how})", hint)
        fit, basis, rests_on = self._nearest(part, _ROWS_OF.get(precision, precision))
        notes: tuple[str, ...] = ()
        if precision == "bf16":
            notes = ("bf16: no row ran it; the estimate is that of fp16, which has the same peak",)
        if precision == "fp32":
            basis, notes = "others", ("fp32: no row ran it; the sustained fraction is that of fp16, which is a guess",)
        if precision == "int8":
            notes = (
                "int8: the rows ran TensorRT INT8; `inferctl serve` runs LLM.int8, which was slower than fp16"
                " in every published measurement",
            )
        return Calibrated(part, precision, fit, basis, rests_on, self.bands.get(basis, Band()), notes)

    def _nearest(self, part: Hardware, precision: str) -> tuple[Fit, Basis, str]:
        own = self.fits.get(part.key, {})
        if precision in own:
            return own[precision], "own", f"{own[precision].rows} rows of {part.key} in {precision}"
        if own and (moved := self._moved(own, precision)):
            return moved[0], "precision", f"rows of {part.key} in {moved[1]}, moved to {precision} as on other parts"
        if part.mig and (found := self._slice(part, precision)):
            return found
        if same := self._mean(precision, lambda one: _chip(one) == _chip(part) and not one.mig):
            return same[0], "chip", f"rows of {', '.join(same[1])}: the same chip"
        others = self._mean(precision, lambda one: not one.mig)
        if not others:
            raise UsageError(f"no row was measured in {precision}", "another precision")
        return others[0], "others", f"rows of other chips ({', '.join(others[1])}), none of {part.key}"

    def _moved(self, own: Mapping[str, Fit], precision: str) -> tuple[Fit, str] | None:
        """A fit in another precision, its fraction changed by the ratio of the two where a part has both."""
        for other, fit in own.items():
            both = [fits for fits in self.fits.values() if precision in fits and other in fits]
            if both:
                ratio = _geometric(one[precision].fraction / one[other].fraction for one in both)
                return Fit(fit.fraction * ratio, fit.launch), other
        return None

    def _slice(self, part: Hardware, precision: str) -> tuple[Fit, Basis, str] | None:
        """Between the smallest slice that has rows and the whole GPU, on the logarithm of their multiprocessors."""
        assert part.mig is not None
        whole = catalog.hardware(part.mig.parent)
        measured = [
            one
            for key in self.fits
            if (one := catalog.hardware(key)).mig and one.mig and one.mig.parent == part.mig.parent and self.fits[key]
        ]
        top = self._nearest(whole, precision)
        if top[1] == "others":
            return top
        if not measured:
            return top[0], "slice", f"rows of the whole {whole.key}, by its share of the multiprocessors"
        bottom = self._nearest(measured[0], precision)
        low, high = math.log(measured[0].sm_count or 1), math.log(whole.sm_count or 1)
        share = (math.log(part.sm_count or 1) - low) / (high - low)
        fraction = bottom[0].fraction ** (1 - share) * top[0].fraction ** share
        launch = bottom[0].launch ** (1 - share) * top[0].launch ** share
        return Fit(fraction, launch), "slice", f"rows of {measured[0].key} and of {whole.key}, interpolated"

    def _mean(self, precision: str, wanted: Any) -> tuple[Fit, list[str]] | None:
        """The geometric mean over chips of what parts `wanted` have; parts of one chip count once together."""
        chips: dict[Any, list[Fit]] = {}
        names: list[str] = []
        for key, fits in self.fits.items():
            part = catalog.hardware(key)
            if precision in fits and wanted(part):
                chips.setdefault(_chip(part), []).append(fits[precision])
                names.append(key)
        if not chips:
            return None
        each = [(_geometric(f.fraction for f in fits), _geometric(f.launch for f in fits)) for fits in chips.values()]
        return Fit(_geometric(a for a, _ in each), _geometric(b for _, b in each)), names


def batch_cost(part: Hardware, precision: str, fit: Fit, model: Transformer) -> Cost:
    """The cost of batches of `model` on a part with this fit.

    Memory runs at the bandwidth of the data sheet: the rows cannot show a lower share of it, and an upper bound must
    not assume one.
    """
    peak = (part.peaks[precision] or 0.0) * 1e12
    values_per_s = (part.bandwidth_gbs or 1000.0) * 1e9 / _BYTES[precision]
    return Cost.of(model, peak * fit.fraction, fixed_seconds(part, precision, fit, model), values_per_s)


def fixed_seconds(part: Hardware, precision: str, fit: Fit, model: Transformer) -> float:
    """Seconds of a batch regardless of its tokens: launches in proportion to the layers, and the weights read once."""
    launches = fit.launch * model.layers / BERT_LARGE.layers
    return launches + model.weights * _BYTES[precision] / ((part.bandwidth_gbs or 1000.0) * 1e9)


@cache
def load() -> Calibration:
    """The calibration that comes with inferctl."""
    file = assets.root() / "benchmarks" / "calibration" / "fitted.yaml"
    data = document.read(file, "`python benchmarks/calibration/fit.py` writes it").data
    fits = {
        key: {name: Fit(one["fraction"], one["launch_ms"] / 1000, one["rows"]) for name, one in by.items()}
        for key, by in data["parts"].items()
    }
    bands = {
        name: Band(_pair(one["throughput"]), _pair(one["latency"]), _pair(one["rate"]), one["rows"])
        for name, one in data["bands"].items()
    }
    return Calibration(fits, data["lengths"]["mean"], data["source"], bands, data["conditions"])


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return low, high


def _chip(part: Hardware) -> tuple[str | None, int | None]:
    """What is the same silicon: compute capability and multiprocessors of the whole GPU."""
    return part.compute_capability, part.mig.parent_sms if part.mig else part.sm_count


def _geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
