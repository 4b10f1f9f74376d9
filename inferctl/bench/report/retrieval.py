"""The quality of retrieval next to what it costs: rows, sentences, table and charts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench import student_t
from inferctl.bench.judge import retrieval, verdict
from inferctl.bench.judge.retrieval import Difference
from inferctl.bench.measure.retrieval import FORMATS
from inferctl.bench.report import caveats
from inferctl.bench.report.chart import Chart, Json, ticks
from inferctl.receipts.receipt import JsonObject, Receipt

HEADINGS = ("config", "vectors", "bytes", "nDCG", "change (interval)", "R@100")
HTML_HEADINGS = (
    *("configuration", "vectors", "bytes of a document", "nDCG@10 (points)", "change (points)", "verdict"),
    *("recall@10", "recall@100", "MRR@10", "queries for 1 point"),
)


@dataclass(frozen=True)
class RetrievalRow:
    """One way to find documents: a configuration with one kind of vectors.

    `first`: the first kind of this configuration. `interval`: of nDCG@10 over queries (95%, in points). `difference`:
    of a first kind to that of the first configuration, of others to the first kind; intervals hold for all together. `cost`: the cost of a million texts in
    USD with its interval if the hardware has a price, else None. `rate`: requests/s with its interval.
    """

    configuration: str
    variant: JsonObject
    first: bool
    interval: tuple[float, float]
    difference: Difference | None
    cost: tuple[float, float, float] | None
    rate: tuple[float, float, float]

    @property
    def ndcg(self) -> float:
        """NDCG@10 in points."""
        return float(100 * self.variant[retrieval.NAME])

    @property
    def vectors(self) -> str:
        return str(self.variant["name"])

    @property
    def label(self) -> str:
        return self.configuration if self.first else f"{self.vectors} of {self.configuration}"

    @property
    def is_compact(self) -> bool:
        """Whether these are the first vectors in another format or with fewer dimensions."""
        return not self.first and self.vectors.partition("-")[0] in FORMATS

    @property
    def is_reranked(self) -> bool:
        return self.variant["milliseconds"] is not None

    def as_dict(self) -> dict[str, Any]:
        """Return an element of the `retrieval` key of a result."""
        shown = {key: value for key, value in self.variant.items() if key != "per_query"}
        found = dataclasses.asdict(self.difference) if self.difference else None
        return {"configuration": self.configuration, **shown, "interval": self.interval, "difference": found}


def rows(receipts: Sequence[Receipt]) -> list[RetrievalRow]:
    """Return the rows of all receipts. Formats and dimensions are those of the first configuration of each model."""
    listed: list[tuple[Receipt, JsonObject, bool]] = []
    models = set[str | None]()
    for receipt in receipts:
        for number, variant in enumerate((receipt.data.get("retrieval") or {}).get("variants") or ()):
            if not number or receipt.weights_sha256 not in models or variant["milliseconds"] is not None:
                listed.append((receipt, variant, not number))
        models.add(receipt.weights_sha256)
    rate = verdict.ERROR_RATE / max(1, len(listed) - 1)
    found: list[RetrievalRow] = []
    for receipt, variant, first in listed:
        base = listed[0][1] if first else receipt.data["retrieval"]["variants"][0]
        values = variant["per_query"]
        change = retrieval.difference(base["per_query"], values, retrieval.MARGIN, rate) if found else None
        place = _cost(receipt), _rate(receipt.data["summary"])
        found.append(RetrievalRow(receipt.name, variant, first, _interval(values), change, *place))
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean over queries, in points."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return 0.0, 100.0
    spread = (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5
    half = student_t.quantile(1 - verdict.ERROR_RATE / 2, n - 1) * spread
    return round(100 * (mean - half), 4), round(100 * (mean + half), 4)


def _rate(summary: JsonObject) -> tuple[float, float, float]:
    rate, interval = summary["requests_per_s"], summary["requests_per_s_interval"] or {}
    return rate, interval.get("low", rate), interval.get("high", rate)


def _cost(receipt: Receipt) -> tuple[float, float, float] | None:
    cheapest = next(iter((receipt.data.get("efficiency") or {}).get("cost") or ()), None)
    if not cheapest:
        return None
    usd, (rate, low, high) = cheapest["usd_per_million_texts"], _rate(receipt.data["summary"])
    return usd, usd * rate / high, usd * rate / low


def sentences(found: Sequence[RetrievalRow], receipts: Sequence[Receipt]) -> list[str]:
    """Return what the rows show, the most important first; then which receipts have none, and what to know."""
    texts = [
        f"No nDCG of {receipt.name}: {section['reason']}."
        for receipt in receipts
        if (section := receipt.data.get("retrieval")) and section["reason"]
    ]
    if not found:
        return texts
    base, *others = found
    section = next(receipt.data["retrieval"] for receipt in receipts if receipt.name == base.configuration)
    collection = section["collection"]
    queries = f"{collection['queries']:,} {'weak' if collection['weak'] else 'judged'} queries of {collection['name']}"
    low, high = base.interval
    first = f"nDCG@10 of {base.label} is {base.ndcg:.1f} points ({low:.1f} to {high:.1f}) on {queries}"
    smaller = [row for row in others if row.configuration == base.configuration and row.is_compact]
    kept = [row for row in smaller if row.difference and row.difference.outcome in ("no regression", "improvement")]
    best = min(kept, key=lambda row: float(row.variant["bytes"]), default=None)
    if best and best.variant["bytes"] < base.variant["bytes"]:
        saved = 1 - best.variant["bytes"] / base.variant["bytes"]
        first += f"; its {best.vectors} vectors {_changed(best)} and save {saved:.0%} of the bytes"
    texts.insert(0, f"{first}.")
    for row in others:
        if row.first:
            texts.append(f"{_sentence(row, base.label)}.")
        elif row.is_reranked:
            texts.append(f"{_sentence(row, row.configuration)}.")
    if collection["weak"]:
        texts.append("The queries are titles or first lines of the documents: weak evidence for real queries.")
    sections = [(receipt.name, receipt.data.get("retrieval") or {}) for receipt in receipts]
    total = collection["queries"] + collection["documents"]
    texts += [
        f"{text} ({names})."
        for text, names in caveats.by_text(
            (f"Only the start of {part['truncated']:,} of {total:,} texts is read, because they are too long", name)
            for name, part in sections
            if part.get("truncated")
        )
    ]
    texts += [
        f"{name} does not accept `input_type`: queries and documents are embedded alike."
        for name, part in sections
        if part.get("roles") is False
    ]
    return texts


def _sentence(row: RetrievalRow, base: str) -> str:
    found = row.difference
    assert found
    label = f"{row.configuration}, reranked" if row.is_reranked else row.label
    if found.outcome == "regression":
        return f"{label} is worse than {base}: it {_changed(row)}"
    if found.outcome == "improvement":
        return f"{label} is better than {base}: it {_changed(row)}"
    if found.outcome == "no regression":
        return f"{label} is within {retrieval.MARGIN:g} point of {base} or better: it {_changed(row)}"
    needed = f"; 1 point needs about {found.queries_needed:,} judged queries" if found.queries_needed else ""
    return f"{label} is not shown to be better or worse than {base}: {_points(found)} points{needed}"


def _changed(row: RetrievalRow) -> str:
    """Return the change in words: `lose 0.4 points (0.1 to 0.8)`; negative ends are gains."""
    found = row.difference
    assert found
    verb, sign = ("gain", 1) if found.points > 0 else ("lose", -1)
    verb += "s" if row.first or row.is_reranked else ""
    ends = sorted((sign * found.low, sign * found.high))
    return f"{verb} {abs(found.points):.1f} points ({ends[0]:.1f} to {ends[1]:.1f})"


def _points(found: Difference) -> str:
    return f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def cells(row: RetrievalRow) -> list[str]:
    """Return the texts of `HEADINGS`."""
    change = _points(row.difference) if row.difference else "reference"
    sizes = f"{row.variant['bytes']:,.0f}", f"{row.ndcg:.1f}"
    return [row.configuration, row.vectors, *sizes, change, f"{row.variant['recall_at_100']:.3f}"]


def html_cells(row: RetrievalRow) -> list[tuple[str, str]]:
    """Return text and small text of each of `HTML_HEADINGS`."""
    found, variant = row.difference, row.variant
    figures = [(f"{variant[key]:.4f}", "") for key in ("recall_at_10", "recall_at_100", "mrr_at_10")]
    time = f"{variant['milliseconds']:g} ms per query" if variant["milliseconds"] else ""
    return [
        (row.configuration, ""),
        (row.vectors, time),
        (f"{variant['bytes']:,.0f}", ""),
        (f"{row.ndcg:.2f}", "{:.1f} – {:.1f}".format(*row.interval)),
        (f"{found.points:+.2f}", f"{found.low:+.2f} – {found.high:+.2f}") if found else ("reference", ""),
        (found.outcome, found.reason) if found else ("", ""),
        *figures,
        (f"{found.queries_needed:,}" if found and found.queries_needed else "", ""),
    ]


def charts(found: Sequence[RetrievalRow], colors: Mapping[str, str]) -> dict[str, Chart]:
    """Return nDCG over cost of each configuration, and over the bytes of each kind of vectors."""
    first = [row for row in found if row.first]
    priced = [row.cost for row in first if row.cost]
    if priced and len(priced) == len(first):
        title, places, lower = "USD per million texts", priced, True
    else:
        title, places, lower = "requests/s", [row.rate for row in first], False
    sizes = [(float(row.variant["bytes"]),) * 3 for row in found]
    return {
        "retrieval": _chart("Quality and cost", title, places, first, lower, "configuration", colors),
        "vectors": _chart("Quality and size", "bytes of a document", sizes, found, True, "vectors", colors),
    }


def _chart(
    title: str,
    axis: str,
    places: Sequence[tuple[float, float, float]],
    found: Sequence[RetrievalRow],
    lower: bool,
    label: str,
    colors: Mapping[str, str],
) -> Chart:
    points = sorted(
        zip(places, found, strict=True), key=lambda point: (point[0][0] * (1 if lower else -1), -point[1].ndcg)
    )
    efficient: list[RetrievalRow] = []
    for _, row in points:
        if not efficient or row.ndcg > efficient[-1].ndcg:
            efficient.append(row)
    line = [(x, row.ndcg) for (x, *_), row in points if row in efficient]
    error = {"type": "data", "symmetric": False, "thickness": 1}
    markers: Json = {
        "type": "scatter",
        "mode": "markers+text",
        "showlegend": False,
        "text": [str(getattr(row, label)) if row in efficient else "" for _, row in points],
        "textposition": "top right",
        "marker": {"size": 9, "color": [colors[row.configuration] for _, row in points]},
        "x": [x for (x, *_), _ in points],
        "y": [row.ndcg for _, row in points],
        "error_x": {
            **error,
            "array": [h - x for (x, _, h), _ in points],
            "arrayminus": [x - w for (x, w, _), _ in points],
        },
        "error_y": {
            **error,
            "array": [row.interval[1] - row.ndcg for _, row in points],
            "arrayminus": [row.ndcg - row.interval[0] for _, row in points],
        },
        "customdata": [row.label for _, row in points],
        "hovertemplate": "%{customdata}: %{y:.1f} points at %{x:.4~g}<extra></extra>",
    }
    joined: Json = {
        "type": "scatter",
        "mode": "lines",
        "name": "efficient",
        "line": {"color": "#8c8c8c", "width": 1.5, "dash": "dash"},
        "x": [x for x, _ in line],
        "y": [y for _, y in line],
        "hoverinfo": "skip",
    }
    ends = [math.log10(edge(point[0][0] for point in points)) for edge in (min, max)] if points else [0, 1]
    layout: Json = {
        "xaxis": {
            "type": "log",
            "title": {"text": axis},
            **ticks(markers["x"]),
            "range": [ends[0] - 0.15, ends[1] + 0.3],
        },
        "yaxis": {"title": {"text": "nDCG@10 (points)"}},
        "hovermode": "closest",
        "height": 420,
    }
    text = (
        "The line joins what nothing else beats in both, by the means. Bars: 95% intervals, of nDCG over queries. "
        "Colors as in the table of results."
    )
    return Chart(title, text, [joined, markers], layout)
