"""What `inferctl embed` shows: time and cost before a run, its progress, and the summary."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from inferctl.cli import console
from inferctl.core.errors import InvalidRunError, UsageError
from inferctl.core.sizes import size
from inferctl.estimate import calibration
from inferctl.estimate.cost import Transformer
from inferctl.estimate.forecast import Scenario, memory_problem, prices, read_config
from inferctl.facts import catalog
from inferctl.facts.catalog import Hardware
from inferctl.facts.precision import best_precision
from inferctl.receipts import capacity, receipt

if TYPE_CHECKING:
    from inferctl.embed.computer import Computer
    from inferctl.embed.job import Job
    from inferctl.embed.manifest import RunOptions

SCHEMA = "inferctl.embed-forecast/1"
_SAMPLE, _MEASURED_S = 1024, 3.0
_FIGURES = {"measured": "measured with the sample", "estimated": "estimated: at best"}
_WINDOW_S, _LINE_S = 5.0, 30.0  # of the band of the time left; between two lines without a terminal


class Measured(NamedTuple):
    """What a receipt says: where, in which precision, the tokens per second of one machine, and its price."""

    hardware: str
    precision: str
    tokens_per_s: float
    price: Mapping[str, Any] | None
    outcome: str


def measured(file: Path, model_sha256: str) -> Measured:
    """Return the rate of a receipt of `inferctl embed` or `inferctl bench`. Raises `InferctlError`.

    A sample receipt of another model is accepted: its figures are invented.
    """
    if _of_a_run(file):
        run = sealed_run(file)
        _check_model(file, {run["model"].get("digest")}, model_sha256)
        device, what = run["machines"][0] or {}, f"measured: receipt {run['seal'][:8]}"
        rate = run["tokens"] / run["machine_s"]
        name = device.get("hardware") or device.get("name") or "unknown"
        return Measured(name, run["model"].get("precision") or "unknown", rate, run["cost"], what)
    sealed = receipt.load(file)
    if not sealed.data.get("sample"):
        _check_model(file, {sealed.weights_sha256, sealed.data["model"].get("original_sha256")}, model_sha256)
    found, key = capacity.served_rate(sealed), sealed.data["hardware"].get("key")
    how = "within the SLO" if found.within_slo else "closed loop"
    what = f"{'invented: sample' if sealed.data.get('sample') else f'measured, {how}:'} receipt {sealed.seal[:8]}"
    cost = _lowest(catalog.hardware(key)) if key else None
    name = key or sealed.data["hardware"].get("name") or "unknown"
    return Measured(name, sealed.precision or "unknown", found.tokens_per_s, cost, what)


def _check_model(file: Path, known: Set[str | None], wanted: str) -> None:
    if wanted not in known:
        raise UsageError(f"{file} was measured with another model", "measure the model of `--model`")


def _of_a_run(file: Path) -> bool:
    from inferctl.embed.manifest import SCHEMA as RUN

    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("schema") == RUN)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # `receipt.load` says what is wrong


def sealed_run(file: Path) -> dict[str, Any]:
    """Return a receipt of `inferctl embed`. Raises `UsageError` if it is none, and `InvalidRunError` if it changed."""
    if not _of_a_run(file):
        raise UsageError(f"{file} is not a receipt of `inferctl embed`", "name receipt.json of its output folder")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if data.get("seal") != receipt.seal_of(data):
        raise InvalidRunError(f"{file} was altered after it was sealed", "repeat the run, which writes a receipt")
    return data


async def forecast(
    options: RunOptions,
    computer: Computer,
    model: Path,
    keys: Sequence[str],
    known: Sequence[Measured] = (),
    old: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the size of a run, and its time and cost: measured here with a sample, estimated on other hardware.

    `known`: rates of receipts, for texts of other lengths. `old`: the receipt of the run that this one replaces.
    """
    from inferctl.embed import manifest, shards
    from inferctl.embed.computer import Progress, compute
    from inferctl.models.vector_format import size as size_of_vector

    parts = [catalog.hardware(key) for key in dict.fromkeys(keys)]
    with console.progress("reading the inputs"):
        plan, files = await asyncio.to_thread(manifest.make, options)
        sample = await asyncio.to_thread(manifest.sample, plan, files, _SAMPLE)
    try:
        with console.progress("measuring a sample here"):
            machine = await computer.start()
            computed = await compute(computer, sample, Progress())  # also fills buffers
            done, started = Progress(), time.monotonic()
            while (seconds := time.monotonic() - started) < _MEASURED_S:
                await asyncio.gather(*(compute(computer, sample, done) for _ in range(3)))
    finally:
        await computer.close()
    lengths = [int(length) for length in computed.tokens if length]
    if not lengths:
        reasons = [*computed.errors.values(), "no text and id in the columns"]
        raise UsageError(f"no sampled row can be computed: {reasons[0]}", "check the columns with `--text` and `--id`")
    here = {"hardware": "this machine", "precision": machine["precision"], "outcome": "measured"}
    rows, absent = [_row(here, plan.rows, done.rows / seconds, price(machine["device"]))], []
    for each in known:
        named = {"hardware": each.hardware, "precision": each.precision, "outcome": each.outcome}
        rows.append(_row(named, plan.rows, each.tokens_per_s / statistics.fmean(lengths), each.price))
    dense = list(options.model["outputs"]) == ["dense"]
    each_bytes = size_of_vector(machine["dimensions"], shards.VECTOR_FORMATS[options.dtype]) if dense else 0
    stores = {
        "new_bytes": plan.rows * each_bytes or None,
        "old_bytes": old and old["bytes"],
        "old_rows": old and old["rows"],
    }
    for part in parts:
        try:
            most = options.model["max_batch_tokens"]
            rows.append(_estimated(part, plan.rows, lengths, read_config(model), most))
        except UsageError as error:
            absent.append({"hardware": part.key, "reason": error.message, "hint": error.hint})
    return {
        "schema": SCHEMA,
        "inputs": plan.inputs,
        "rows": plan.rows,
        "ranges": len(plan.ranges),
        "columns": plan.columns._asdict(),
        "sample": {
            "rows": len(sample),
            "errors": list(computed.errors.values())[:5],
            "equal": len(sample) - computed.distinct - len(computed.errors),
            "tokens_mean": statistics.fmean(lengths),
            "tokens_p50": statistics.median(lengths),
            "tokens_max": max(lengths),
        },
        "hardware": rows,
        "absent": absent,
        "vectors": stores,
    }


def _estimated(part: Hardware, rows: int, lengths: list[int], config: dict[str, Any], most: int) -> dict[str, Any]:
    """Return a row of the forecast: the most that an engine can do here, with batches of `most` tokens."""
    found = calibration.load().of(part.key, best_precision(part.traits))
    if problem := memory_problem(found, config, most):
        raise UsageError(f"{part.key}: {problem[0]}", "name other hardware")
    model = Transformer.of(config)
    server = Scenario(lengths, batch_tokens=most, count=5000).server(found.cost(model), front=0.0)
    rate = server.offline().per_second * found.band_for(model).throughput[1]
    return _row({"hardware": part.key, "precision": found.precision, "outcome": "estimated"}, rows, rate, _lowest(part))


def _row(named: Mapping[str, Any], rows: int, rate: float, cost: Mapping[str, Any] | None) -> dict[str, Any]:
    hours = rows / rate / 3600
    return {**named, "rows_per_s": rate, "hours": hours, "usd": cost and cost["usd_per_hour"] * hours, "price": cost}


def price(device: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the lowest price that the catalog has for the GPUs of a machine; None if it has none."""
    if not device or not device.get("hardware"):
        return None
    found = _lowest(catalog.hardware(device["hardware"]))
    return found and {**found, "usd_per_hour": found["usd_per_hour"] * device["count"]}


def _lowest(part: Hardware) -> dict[str, Any] | None:
    return min(prices(part), key=lambda each: float(each["usd_per_hour"]), default=None)


def table(found: Mapping[str, Any]) -> RenderableType:
    """Return the forecast as text and one table."""
    sample, rows = found["sample"], found["rows"]
    lines = [
        f"{rows:,} rows of {size(sum(each['bytes'] for each in found['inputs']))} in {found['ranges']:,} ranges",
        f"{sample['tokens_mean']:.0f} tokens per row on average, {sample['tokens_max']} at most; "
        f"{sample['equal'] / sample['rows']:.0%} of {sample['rows']:,} sampled rows equal others",
        *_stores(found["vectors"]),
        *(f"a sampled row cannot be computed: {reason}" for reason in sample["errors"]),
    ]
    cells = [
        (
            each["hardware"],
            each["precision"],
            f"{each['rows_per_s']:,.0f}",
            console.duration(3600 * each["hours"]),
            "-" if each["usd"] is None else f"{each['usd']:,.2f}",
            _FIGURES.get(each["outcome"], each["outcome"]),
        )
        for each in found["hardware"]
    ]
    headings = ("hardware", "runs as", "rows/s", "time", "USD", "figures are")
    absent = dict.fromkeys(f"not estimated: {each['reason']}" for each in found["absent"])
    notes = ["`inferctl estimate` explains the estimates and their prices", *absent]
    return Group(*map(Text, lines), Text(), console.table(headings, cells, ("hardware",)), Text(), *map(Text, notes))


def _stores(vectors: Mapping[str, Any]) -> Iterator[str]:
    new, old = vectors["new_bytes"], vectors["old_bytes"]
    if new:
        yield f"vectors: {size(new)}, without ids and indexes"
    if old:
        both = f"; both: {size(new + old)} until the old ones are deleted" if new else ""
        yield f"vectors of the old model: {size(old)} of {vectors['old_rows']:,} rows, measured{both}"


async def follow(work: Job, rows: int, show: Callable[[str], None]) -> None:
    """Show the progress of `rows` rows until it is cancelled: each second on a terminal, else a line every 30 s."""
    view = _Progress(work, rows)
    while True:
        await asyncio.sleep(1.0 if sys.stderr.isatty() else _LINE_S)
        show(view.line()) if sys.stderr.isatty() else console.note(view.line())


class _Progress:
    """The rate of a run, and how long the rest takes. `rows`: of the ranges that it computes."""

    def __init__(self, work: Job, rows: int) -> None:
        self._work, self._rows = work, rows
        self._marks = [(time.monotonic(), 0)]  # time and rows at the end of each window

    def line(self) -> str:
        """Return a line such as `31% of 9,000 rows · 1,234 rows/s · 148,000 tokens/s · ~2.1 h left`."""
        done, limit, now = self._work.progress, self._work.machine.get("matrix_rate"), time.monotonic()
        rows = min(self._rows, done.rows)
        seconds = now - self._marks[0][0]
        if now - self._marks[-1][0] >= _WINDOW_S:
            # After days, each window is some minutes long.
            self._marks = [*(self._marks if len(self._marks) < 1000 else self._marks[::2]), (now, rows)]
        parts = [f"{rows / self._rows:.0%} of {self._rows:,} rows"]
        if rows:
            parts += [f"{rows / seconds:,.0f} rows/s", f"{done.tokens / seconds:,.0f} tokens/s"]
            parts += [f"{done.flops / seconds / limit:.0%} of the matrix rate"] if limit and done.flops else []
            parts.append(self._left(rows, seconds))
        return " · ".join(parts + ([f"{done.errors:,} errors"] if done.errors else []))

    def _left(self, rows: int, seconds: float) -> str:
        """Return the time left with a band: 2 standard errors of a sum of windows that vary as those so far."""
        rest = (self._rows - rows) * seconds / rows
        windows = [(end - start) / max(1, more - less) for (start, less), (end, more) in pairwise(self._marks)]
        if len(windows) < 4:
            return f"{console.duration(rest)} left"
        share = statistics.stdev(windows) / statistics.fmean(windows)
        half = 2 * share * rest * sqrt(1 / len(windows) + seconds / len(windows) / max(rest, 1.0))
        least, most = console.duration(max(0.0, rest - half)), console.duration(rest + half)
        return f"{console.duration(rest)} left ({least} to {most})"


def summary(found: Mapping[str, Any]) -> str:
    """Return the last lines of a run."""
    receipt = found["receipt"]
    if receipt is None:
        return f"{found['output']}: all {found['ranges']:,} ranges of this part are done; other parts are not"
    cost = "" if receipt["cost"] is None else f" for {receipt['cost']['usd']:,.2f} USD"
    lines = [
        f"{found['output']}: {receipt['rows']:,} rows, {receipt['tokens']:,} tokens, {size(receipt['bytes'])}, in "
        f"{console.duration(receipt['wall_s'])} ({receipt['rows_per_s']:,.0f} rows/s){cost}",
        f"digest of the output: {receipt['output_sha256']}",
    ]
    if receipt["errors"]:
        lines.append(f"{receipt['errors']:,} rows have errors: {found['output']}/part-*.errors.jsonl has the reasons")
    return "\n".join(lines)
