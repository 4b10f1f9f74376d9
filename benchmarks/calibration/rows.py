"""Read the published rows and estimate each of them."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from inferctl.batching.batcher import QueueLimits
from inferctl.estimate import lengths
from inferctl.estimate.calibration import Calibration
from inferctl.estimate.cost import BERT_LARGE, Cost, Transformer
from inferctl.estimate.search import SimulatedServer
from inferctl.estimate.simulate import UNBOUNDED, percentile

HERE = Path(__file__).resolve().parent
# The rows of the fit, and rows of later rounds that no fit and no band uses.
FITTED, UNSEEN = "mlperf-bert-large.csv", "mlperf-bert-large-unseen.csv"
# The rows of another benchmark: NVIDIA's demo of BERT in TensorRT. No fit uses them, the bands do.
OTHER = "tensorrt-demo-bert.csv"
# "NVIDIA A100 (40GB)" does not say whether the board is SXM or PCIe. With 128 tokens, its rows are 0.94 to 1.01 times
# the estimate for SXM, and 1.08 to 1.18 times that for PCIe, so SXM is assumed.
BOARDS = {"T4 (16GB)": "t4", "A100 (40GB)": "a100-40gb-sxm"}
# A batch of this many texts or more counts as throughput.
LARGE_BATCH = 32
MODELS = {
    "bert-base": Transformer.of(
        {
            "model_type": "bert",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        }
    ),
    "bert-large": BERT_LARGE,
}
SLO = 0.130
# The default of the server. The submitters chose a batch size per system; the estimates do not.
BATCH_TOKENS = 16_384
WITHIN = {"Offline": 0.10, "SingleStream": 0.15, "Server": 0.15}


@dataclass(frozen=True)
class Row:
    """One published result. `value` is samples/s per accelerator; for SingleStream it is the p90 in seconds."""

    part: str
    precision: str
    scenario: Literal["Offline", "SingleStream", "Server"]
    system: str
    value: float
    percentiles_ms: tuple[float, float, float] | None

    @property
    def round(self) -> str:
        """The MLPerf round, for example `1.0`."""
        return self.system.split()[0]

    @property
    def submitter(self) -> str:
        """The submitter of the row."""
        return self.system.split()[1]

    def error(self, estimated: float) -> float:
        """Return the relative error of an estimate."""
        return estimated / self.value - 1


def read(name: str = FITTED) -> list[Row]:
    """Return all rows of a CSV file."""
    with (HERE / name).open(encoding="utf-8") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    single = line["scenario"] == "SingleStream"
    value = float(line["p90_ms"]) / 1000 if single else float(line["samples_per_s_per_accelerator"])
    # The same machine is in two categories with the same Offline run.
    system = line["system"].removesuffix("_datacenter").removesuffix("_edge")
    return Row(
        line["hardware"],
        line["precision"],
        line["scenario"],  # type: ignore[arg-type]  # three words in the file
        f"{line['round']} {line['submitter']} {system}",
        value,
        (float(line["p50_ms"]), float(line["p90_ms"]), float(line["p99_ms"])) if line["p99_ms"] else None,
    )


@dataclass(frozen=True)
class OtherRow:
    """The mean seconds of a batch of equal texts in another benchmark."""

    part: str
    model: str
    precision: str
    tokens: int
    batch: int
    seconds: float

    @property
    def texts_per_s(self) -> float:
        return self.batch / self.seconds

    def estimated(self, cost: Cost) -> float:
        """Return the estimated seconds of the batch. Both exclude the front end."""
        return cost.batch([self.tokens] * self.batch)


def read_other() -> list[OtherRow]:
    """Return all rows of the other benchmark."""
    with (HERE / OTHER).open(encoding="utf-8") as file:
        return [
            OtherRow(
                BOARDS[line["board"]],
                line["model"],
                line["precision"],
                int(line["tokens"]),
                int(line["batch"]),
                float(line["average_ms"]) / 1000,
            )
            for line in csv.DictReader(file)
        ]


def other_ratios(calibration: Calibration, rows: Sequence[OtherRow]) -> dict[str, dict[str, list[float]]]:
    """Return published / estimated by kind of figure and by group: hardware, precision and model.

    `throughput`: the best batch of `LARGE_BATCH` texts or more. `latency`: a single text.
    """
    found: dict[str, dict[str, list[float]]] = {"throughput": defaultdict(list), "latency": defaultdict(list)}
    cells: dict[tuple[str, str, str, int], list[OtherRow]] = defaultdict(list)
    for row in rows:
        cells[row.part, row.precision, row.model, row.tokens].append(row)
    for (part, precision, model, _), cell in cells.items():
        cost = calibration.of(part, precision).cost(MODELS[model])
        large = [row for row in cell if row.batch >= LARGE_BATCH]
        published = max(row.texts_per_s for row in large)
        estimated = max(row.batch / row.estimated(cost) for row in large)
        (single,) = (row for row in cell if row.batch == 1)
        group = f"{part} {precision} {model}"
        found["throughput"][group].append(published / estimated)
        found["latency"][group].append(single.seconds / single.estimated(cost))
    return found


class Samples:
    """The samples of MLPerf: `count` SQuAD lengths with a given mean."""

    def __init__(self, mean: float, count: int = 20_000) -> None:
        self.lengths = lengths.squad(mean, count)
        self._ordered = sorted(self.lengths)
        self.mean_flop = sum(map(BERT_LARGE.flop, self.lengths)) / count
        # Prefix sums over the sorted samples, so that a fit does not iterate over all samples again.
        self._sums = [0, *accumulate(self._ordered)]
        self._squares = [0, *accumulate(tokens * tokens for tokens in self._ordered)]

    def length(self, q: float) -> int:
        """Return the tokens of the sample at the quantile `q`."""
        return self._ordered[max(0, math.ceil(q * len(self._ordered)) - 1)]

    def seconds(self, cost: Cost) -> float:
        """Return the mean seconds that a sample adds to its batch, the mean of `cost.sequence`."""
        # Below this length, memory traffic bounds the attention.
        short = bisect_right(self._ordered, cost.attention / cost.per_token2)
        attention = cost.attention * self._sums[short] + cost.per_token2 * (self._squares[-1] - self._squares[short])
        return (cost.per_token * self._sums[-1] + attention) / len(self._ordered)

    def server(self, cost: Cost) -> SimulatedServer:
        """Return the simulated server with all samples, one per request."""
        return SimulatedServer(cost, QueueLimits(BATCH_TOKENS, UNBOUNDED), [[tokens] for tokens in self.lengths])


def simulate(row: Row, cost: Cost, samples: Samples) -> float:
    """Return the estimate of a row by the batcher on a virtual clock."""
    server = samples.server(cost)
    if row.scenario == "Offline":
        return server.offline().per_second
    if row.scenario == "SingleStream":
        return percentile(server.single(), 0.90)
    return server.highest_rate(SLO)


class Table:
    """Estimates from a table of simulated rates, so that a fit does not simulate thousands of times.

    In units of the mean time of a sample, the highest rate depends only on the fixed time and the SLO.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._fixed = [0.3 * (30 / 0.3) ** (i / 9) for i in range(10)]
        self._slo = [18 * (700 / 18) ** (i / 8) for i in range(9)]
        self._rate = [
            [samples.server(self.unit(fixed)).highest_rate(slo) for slo in self._slo] for fixed in self._fixed
        ]

    def unit(self, fixed: float) -> Cost:
        """Return the cost on hardware where the mean sample takes one second."""
        return Cost.of(BERT_LARGE, self._samples.mean_flop, fixed)

    def estimate(self, row: Row, cost: Cost) -> float:
        """Return the estimate of a row for this cost."""
        fixed, mean = cost.fixed, self._samples.seconds(cost)
        if row.scenario == "SingleStream":
            return fixed + cost.sequence(self._samples.length(0.90))
        if row.scenario == "Offline":
            size = BATCH_TOKENS * len(self._samples.lengths) / sum(self._samples.lengths)
            return size / (fixed + size * mean)
        i, a = _place(self._fixed, fixed / mean)
        j, b = _place(self._slo, SLO / mean)
        low = (1 - b) * self._rate[i][j] + b * self._rate[i][j + 1]
        high = (1 - b) * self._rate[i + 1][j] + b * self._rate[i + 1][j + 1]
        return ((1 - a) * low + a * high) / mean


def _place(points: list[float], value: float) -> tuple[int, float]:
    """Return the index of the next lower point, and the position between it and the next one on a logarithmic axis."""
    value = min(max(value, points[0]), points[-1])
    i = min(bisect_right(points, value), len(points) - 1) - 1
    return i, math.log(value / points[i]) / math.log(points[i + 1] / points[i])
