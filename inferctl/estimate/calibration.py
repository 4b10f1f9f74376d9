"""Provides the launch time and the sustained fraction for each part and precision.

They are fitted to published rows, or taken from the most similar part with rows. `benchmarks/calibration/fit.py` writes
the fit and the errors of its cross-validation to `benchmarks/calibration/fitted.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import geometric_mean
from typing import Any, Literal

from inferctl.core import assets, document
from inferctl.core.errors import UsageError
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer
from inferctl.facts import catalog
from inferctl.facts.catalog import Hardware
from inferctl.facts.precision import support

# How similar the rows of an estimate are to its part, most similar first. Each basis has its own error band.
Basis = Literal["own", "precision", "slice", "chip", "others"]
BASES: tuple[Basis, ...] = ("own", "precision", "slice", "chip", "others")
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# bf16 and fp16 have the same peak and memory traffic on each part with both. No row ran bf16 or fp32.
_ROWS_OF = {"bf16": "fp16", "fp32": "fp16"}


@dataclass(frozen=True)
class FittedParameters:
    """The fitted parameters for one part and precision.

    `fraction`: share of the dense peak that large batches sustain. `launch`: seconds of the kernel launches of a batch
    of BERT-large, without the read of its weights. `rows`: number of rows in the fit.
    """

    fraction: float
    launch: float
    rows: int = 0


@dataclass(frozen=True)
class Band:
    """Factors on an estimate between which 95% of further TensorRT results lie. Only the fast ends make bounds.

    `throughput`: offline. `latency`: single request.
    """

    throughput: tuple[float, float] = (1.0, 1.0)
    latency: tuple[float, float] = (1.0, 1.0)

    @property
    def fastest(self) -> float:
        """The factor for all times at the fast end."""
        return min(self.latency[0], 1 / self.throughput[1], 1.0)


@dataclass(frozen=True)
class CalibratedPart:
    """A part in one precision, with its fitted parameters, their data source (`rests_on`) and the error band."""

    part: Hardware
    precision: str
    fit: FittedParameters
    basis: Basis
    rests_on: str
    band: Band
    notes: tuple[str, ...] = ()

    def cost(self, model: Transformer) -> Cost:
        """Return the fitted cost of batches of `model` on this part."""
        return batch_cost(self.part, self.precision, self.fit, model)

    def fastest(self, model: Transformer) -> Cost:
        """Return the lowest cost that batches of `model` can have on this part."""
        return self.cost(model).times(self.band_for(model).fastest)

    def band_for(self, model: Transformer) -> Band:
        """Return the error band of an estimate for `model`. Its fast end is at most the dense peak of the part.

        A model more than twice as wide as the model of the rows may use the part better than the rows, so its fast end
        is the peak.
        """
        fraction, band = min(1.0, self.fit.fraction), self.band
        if model.width > 2 * BERT_LARGE.width:
            return Band((band.throughput[0], 1 / fraction), (fraction, band.latency[1]))
        return Band(
            (band.throughput[0], min(band.throughput[1], 1 / fraction)),
            (max(band.latency[0], fraction), band.latency[1]),
        )


@dataclass(frozen=True)
class Calibration:
    """The fitted parameters by part and precision, the bands by basis, and the mean length of samples in tokens."""

    fits: Mapping[str, Mapping[str, FittedParameters]]
    mean_length: float
    source: str = ""
    bands: Mapping[str, Band] = field(default_factory=dict)

    def of(self, key: str, precision: str) -> CalibratedPart:
        """Return the calibration of the part `key`. Raises `UsageError` if it cannot be estimated."""
        part = catalog.hardware(key)
        peak = part.peaks.get(precision)
        if peak is None:
            reason = support(precision, part.traits).reason if part.kind == "cuda" else "a CPU profile has no peaks"
            hint = "measure it with `inferctl bench`" if part.kind == "cpu" else "use fp16, which is native"
            raise UsageError(f"cannot estimate {precision} on {part.key}: its peak is unknown: {reason}", hint)
        fit, basis, rests_on = self._nearest(part, _ROWS_OF.get(precision, precision))
        notes: tuple[str, ...] = ()
        if precision == "bf16":
            notes = ("bf16: no row ran it; the estimate is for fp16, which has the same peak",)
        if precision == "fp32":
            basis, notes = "others", ("fp32: no row ran it; the sustained fraction of fp16 is assumed",)
        if precision == "int8":
            notes = (
                "int8: the rows ran TensorRT INT8; `inferctl serve` runs LLM.int8, which was slower than fp16"
                " in every published measurement",
            )
        return CalibratedPart(part, precision, fit, basis, rests_on, self.bands.get(basis, Band()), notes)

    def _nearest(self, part: Hardware, precision: str) -> tuple[FittedParameters, Basis, str]:
        """Return the parameters of the most similar part with rows, their basis and their data source."""
        own = self.fits.get(part.key, {})
        if precision in own:
            return own[precision], "own", f"{own[precision].rows} rows of {part.key} in {precision}"
        if own and (scaled := self._scaled(own, precision)):
            source = f"rows of {part.key} in {scaled[1]}, scaled to {precision} by the ratio on other parts"
            return scaled[0], "precision", source
        if part.mig and (found := self._slice(part, precision)):
            return found
        if same := self._mean(precision, lambda other: _chip(other) == _chip(part) and not other.mig):
            return same[0], "chip", f"rows of {', '.join(same[1])}: the same chip"
        others = self._mean(precision, lambda other: not other.mig)
        if not others:
            raise UsageError(f"no published row ran {precision}", "use another precision")
        return others[0], "others", f"rows of other chips ({', '.join(others[1])}), none of {part.key}"

    def _scaled(self, own: Mapping[str, FittedParameters], precision: str) -> tuple[FittedParameters, str] | None:
        """Return the parameters of another precision, scaled by the ratio on parts with both, and that precision."""
        for other, fit in own.items():
            both = [fits for fits in self.fits.values() if precision in fits and other in fits]
            if both:
                ratio = geometric_mean(fits[precision].fraction / fits[other].fraction for fits in both)
                return FittedParameters(fit.fraction * ratio, fit.launch), other
        return None

    def _slice(self, part: Hardware, precision: str) -> tuple[FittedParameters, Basis, str] | None:
        """Interpolate between the smallest slice with rows and the whole GPU, by the logarithm of multiprocessors."""
        assert part.mig is not None
        whole = catalog.hardware(part.mig.parent)
        slices = (catalog.hardware(key) for key in self.fits if self.fits[key])
        measured = [each for each in slices if each.mig and each.mig.parent == part.mig.parent]
        top = self._nearest(whole, precision)
        if top[1] == "others":
            return top
        if not measured:
            return top[0], "slice", f"rows of the whole {whole.key}, scaled by the share of the multiprocessors"
        bottom = self._nearest(measured[0], precision)
        low, high = math.log(measured[0].sm_count or 1), math.log(whole.sm_count or 1)
        share = (math.log(part.sm_count or 1) - low) / (high - low)
        fraction = bottom[0].fraction ** (1 - share) * top[0].fraction ** share
        launch = bottom[0].launch ** (1 - share) * top[0].launch ** share
        return (
            FittedParameters(fraction, launch),
            "slice",
            f"rows of {measured[0].key} and of {whole.key}, interpolated",
        )

    def _mean(self, precision: str, wanted: Callable[[Hardware], bool]) -> tuple[FittedParameters, list[str]] | None:
        """Return the geometric mean over the chips of the `wanted` parts, and the names of the parts."""
        chips: dict[Any, list[FittedParameters]] = {}
        names: list[str] = []
        for key, fits in self.fits.items():
            part = catalog.hardware(key)
            if precision in fits and wanted(part):
                chips.setdefault(_chip(part), []).append(fits[precision])
                names.append(key)
        if not chips:
            return None
        fractions = [geometric_mean(fit.fraction for fit in fits) for fits in chips.values()]
        launches = [geometric_mean(fit.launch for fit in fits) for fits in chips.values()]
        return FittedParameters(geometric_mean(fractions), geometric_mean(launches)), names


def batch_cost(part: Hardware, precision: str, fit: FittedParameters, model: Transformer) -> Cost:
    """Return the cost of batches of `model` on a part with these parameters.

    The memory bandwidth is that of the data sheet: the rows cannot show a lower one, and an upper bound must not assume
    one.
    """
    peak = (part.peaks[precision] or 0.0) * 1e12
    values_per_s = (part.bandwidth_gbs or 1000.0) * 1e9 / _BYTES[precision]
    return Cost.of(model, peak * fit.fraction, fixed_seconds(part, precision, fit, model), values_per_s)


def fixed_seconds(part: Hardware, precision: str, fit: FittedParameters, model: Transformer) -> float:
    """Return the fixed seconds of a batch: launches in proportion to the layers, and one read of the weights."""
    launches = fit.launch * model.layers / BERT_LARGE.layers
    return launches + model.weights * _BYTES[precision] / ((part.bandwidth_gbs or 1000.0) * 1e9)


@cache
def load() -> Calibration:
    """Return the shipped calibration."""
    file = assets.root() / "benchmarks" / "calibration" / "fitted.yaml"
    data = document.read(file, "write it with `python benchmarks/calibration/fit.py`").data
    fits = {
        key: {
            precision: FittedParameters(row["fraction"], row["launch_ms"] / 1000, row["rows"])
            for precision, row in by_precision.items()
        }
        for key, by_precision in data["parts"].items()
    }
    bands = {basis: Band(tuple(row["throughput"]), tuple(row["latency"])) for basis, row in data["bands"].items()}
    return Calibration(fits, data["lengths"]["mean"], data["source"], bands)


def _chip(part: Hardware) -> tuple[str | None, int | None]:
    """Return a key of the chip: compute capability and multiprocessors of the whole GPU."""
    return part.compute_capability, part.mig.parent_sms if part.mig else part.sm_count
