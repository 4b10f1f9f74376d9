"""The quality of retrieval next to what it costs: rows, sentences, cells and charts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferctl.bench.judge import retrieval, verdict
from inferctl.bench.judge.retrieval import Difference
from inferctl.bench.measure.retrieval import FORMATS
from inferctl.bench.report import caveats
from inferctl.bench.report.chart import Chart, Json, ticks
from inferctl.receipts.receipt import JsonObject, Receipt

HEADINGS = (
    *("configuration", "vectors", "bytes per document", "nDCG@10 (points)", "change (points)", "recall@10"),
    *("recall@100", "MRR@10", "verdict", "queries for 1 point"),
)
# Low end, value and high end.
Range = tuple[float, float, float]


@dataclass(frozen=True)
class RetrievalRow:
    """One way to find documents: a configuration with one kind of vectors.

    `first`: the first kind of this configuration. `ndcg`: nDCG@10 with its 95% interval over queries, in points.
    `difference`: of a first kind to that of the first configuration, of others to the first kind; the intervals hold
    for all rows together. `cost`: USD for a million texts if the hardware has a price. `rate`: requests/s.
    """

    configuration: str
    variant: JsonObject
    first: bool
    ndcg: Range
    difference: Difference | None
    cost: Range | None
    rate: Range

    @property
    def vectors(self) -> str:
        return str(self.variant["name"])

    @property
    def label(self) -> str:
        return self.configuration if self.first else f"{self.configuration}, {self.vectors}"

    @property
    def is_compact(self) -> bool:
        """Whether these are the first vectors in another format or with fewer dimensions."""
        return not self.first and self.vectors.partition("-")[0] in FORMATS

    def as_dict(self) -> dict[str, Any]:
        """Return an element of the `retrieval` key of a result."""
        shown = {key: value for key, value in self.variant.items() if key != "per_query"}
        found = dataclasses.asdict(self.difference) if self.difference else None
        return {"configuration": self.configuration, **shown, "interval": self.ndcg[::2], "difference": found}


def rows(receipts: Sequence[Receipt]) -> list[RetrievalRow]:
    """Return the rows of all receipts. Formats and dimensions are those of the first configuration of each model."""
    listed: list[tuple[Receipt, JsonObject, bool]] = []
    models = set[str]()
    for receipt in receipts:
        model = receipt.weights_sha256 or receipt.name
        for number, variant in enumerate((receipt.data.get("retrieval") or {}).get("variants") or ()):
            if not number or model not in models or variant["milliseconds"] is not None:
                listed.append((receipt, variant, not number))
        models.add(model)
    rate = verdict.ERROR_RATE / max(1, len(listed) - 1)
    found: list[RetrievalRow] = []
    for receipt, variant, first in listed:
        base = listed[0][1] if first else receipt.data["retrieval"]["variants"][0]
        values = variant["per_query"]
        mean = retrieval.difference([0.0] * len(values), values, retrieval.MARGIN, verdict.ERROR_RATE)
        change = retrieval.difference(base["per_query"], values, retrieval.MARGIN, rate) if found else None
        if change and change.outcome == "no regression" and change.low < -retrieval.MARGIN:
            # A reader picks from all rows, so the joint interval decides, and not the bound of one row.
            reason = "the joint interval includes a loss above the tolerance"
            change = dataclasses.replace(change, outcome="not enough evidence", reason=reason)
        ndcg = (max(0.0, mean.low), mean.points, min(100.0, mean.high))
        found.append(RetrievalRow(receipt.name, variant, first, ndcg, change, *_speed(receipt)))
    return found


def _speed(receipt: Receipt) -> tuple[Range | None, Range]:
    """Return the cost of a million texts, and requests/s, with their intervals."""
    figures = receipt.data["summary"]
    rate, interval = figures["requests_per_s"], figures["requests_per_s_interval"] or {}
    place = (interval.get("low", rate), rate, interval.get("high", rate))
    cheapest = next(iter((receipt.data.get("efficiency") or {}).get("cost") or ()), None)
    if not cheapest or not all(place):
        return None, place
    usd = cheapest["usd_per_million_texts"]
    return (usd * rate / place[2], usd, usd * rate / place[0]), place


def sentences(found: Sequence[RetrievalRow], receipts: Sequence[Receipt]) -> list[str]:
    """Return what the rows show, the most important first, and then what to know about them."""
    texts = [_first(found, receipts)] if found else []
    texts += [
        _compared(row, found[0].label if row.first else row.configuration) for row in found[1:] if not row.is_compact
    ]
    notes = ((note, receipt.name) for receipt in receipts for note in _notes(receipt.data.get("retrieval") or {}))
    return texts + [f"{names}: {note}." for note, names in caveats.by_text(notes)]


def _first(found: Sequence[RetrievalRow], receipts: Sequence[Receipt]) -> str:
    """Return nDCG of the first row, and what its smallest vectors without a loss of more than the margin change."""
    base = found[0]
    (collection,) = (one.data["retrieval"]["collection"] for one in receipts if one.name == base.configuration)
    queries = f"{collection['queries']:,} {'weak' if collection['weak'] else 'judged'} queries of {collection['name']}"
    low, ndcg, high = base.ndcg
    text = f"nDCG@10 of {base.label} is {ndcg:.1f} points ({low:.1f} to {high:.1f}) on {queries}"
    kept = [
        (row.variant["bytes"] / base.variant["bytes"], row.vectors, row.difference)
        for row in found
        if row.configuration == base.configuration and row.is_compact and row.difference
        if row.difference.outcome in ("no regression", "improvement")
    ]
    if not kept:
        return f"{text}."
    share, name, change = min(kept, key=lambda each: each[0])
    return f"{text}; its {name} vectors {_changed(change)} and save {1 - share:.0%} of the bytes."


def _compared(row: RetrievalRow, base: str) -> str:
    found = row.difference
    assert found  # only the first row has none
    relation = {
        "regression": "is worse than",
        "improvement": "is better than",
        "no regression": f"is within {retrieval.MARGIN:g} point of, or better than,",
    }.get(found.outcome, "is not shown to be better or worse than")
    done = len(row.variant["per_query"])
    if done < retrieval.MIN_QUERIES:
        relation = "has too few judged queries for a verdict against"
    elif found.outcome == "not enough evidence" and found.high < 0:
        relation = f"is worse, perhaps by less than {retrieval.MARGIN:g} point, than"
    return f"{row.label} {relation} {base}: {_interval(found)} points{retrieval.needed(found, done)}."


def _notes(section: JsonObject) -> Iterator[str]:
    """Yield what to know about the measures of a receipt."""
    if section.get("reason"):
        yield section["reason"] if section["variants"] else f"no nDCG, {section['reason']}"
    if section and section["collection"]["weak"]:
        yield "the queries are titles or first lines of the documents, which is weak evidence for real queries"
    if section and section["collection"]["queries"] < retrieval.MIN_QUERIES:
        yield f"no verdict on retrieval, because fewer than {retrieval.MIN_QUERIES} queries are judged"
    if section.get("truncated"):
        total = section["collection"]["queries"] + section["collection"]["documents"]
        yield f"the model reads only the start of {section['truncated']:,} of {total:,} texts, which are too long"
    if section.get("roles") is False:
        yield "`input_type` is not accepted, so queries and documents are embedded alike"


def _changed(found: Difference) -> str:
    """Return the change in words: `lose 0.4 points (0.1 to 0.8)`."""
    if found.low <= 0 <= found.high:
        return f"are not shown to gain or lose points, {_interval(found)},"
    verb, sign = ("gain", 1) if found.points > 0 else ("lose", -1)
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{verb} {abs(found.points):.1f} points ({low:.1f} to {high:.1f})"


def _interval(found: Difference) -> str:
    return f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def cells(row: RetrievalRow) -> list[tuple[str, str]]:
    """Return text and small text of each of `HEADINGS`. The terminal shows the texts of the first six."""
    found, variant = row.difference, row.variant
    return [
        (row.configuration, ""),
        (row.vectors, f"{variant['milliseconds']:g} ms per query" if variant["milliseconds"] else ""),
        (f"{variant['bytes']:,.0f}", ""),
        (f"{row.ndcg[1]:.1f}", f"{row.ndcg[0]:.1f} – {row.ndcg[2]:.1f}"),
        (_interval(found) if found else "reference", ""),
        *((f"{variant[key]:.3f}", "") for key in ("recall_at_10", "recall_at_100", "mrr_at_10")),
        (found.outcome, found.reason) if found else ("", ""),
        (f"{found.queries_needed:,}" if found and len(variant["per_query"]) >= retrieval.MIN_QUERIES else "", ""),
    ]


def charts(found: Sequence[RetrievalRow], colors: Mapping[str, str]) -> dict[str, Chart]:
    """Return nDCG over cost of each configuration, and over the bytes of each kind of vectors."""
    first = [row for row in found if row.first]
    costs = [(row.cost, row, row.configuration) for row in first if row.cost]
    rates = [(row.rate, row, row.configuration) for row in first if row.rate[1]]
    sizes = [((float(row.variant["bytes"]),) * 3, row, row.vectors) for row in found]
    priced = len(costs) == len(first)
    title, axis, points = ("cost", "USD per million texts", costs) if priced else ("speed", "requests/s", rates)
    return {
        "retrieval": _chart(f"Quality and {title}", axis, points, priced, colors),
        "vectors": _chart("Quality and size", "bytes per document", sizes, True, colors),
    }


def _chart(
    title: str, axis: str, points: Sequence[tuple[Range, RetrievalRow, str]], lower: bool, colors: Mapping[str, str]
) -> Chart:
    """Return nDCG over a place with its range. `lower`: whether lower places are better."""
    best: list[tuple[float, float, str]] = []
    for (_, x, _), row, name in sorted(points, key=lambda each: (each[0][1] * (1 if lower else -1), -each[1].ndcg[1])):
        if not best or row.ndcg[1] > best[-1][1]:
            best.append((x, row.ndcg[1], name))
    ranges = {"x": [place for place, *_ in points], "y": [row.ndcg for _, row, _ in points]}
    markers: Json = {
        "type": "scatter",
        "mode": "markers+text",
        "text": [name if len(points) < 10 and name not in {each[2] for each in best} else "" for *_, name in points],
        "textposition": "bottom right",
        "showlegend": False,
        "marker": {"size": 9, "color": [colors[row.configuration] for _, row, _ in points]},
        "customdata": [row.label for _, row, _ in points],
        "hovertemplate": "%{customdata}: %{y:.1f} points at %{x:.4~g}<extra></extra>",
    }
    for side, every in ranges.items():
        ends = {
            "array": [high - value for _, value, high in every],
            "arrayminus": [value - low for low, value, _ in every],
        }
        bars = {"type": "data", "symmetric": False, "thickness": 1, "color": "#8c8c8c", **ends}
        markers |= {side: [value for _, value, _ in every], f"error_{side}": bars}
    joined: Json = {
        "type": "scatter",
        "mode": "lines+text",
        "name": "efficient",
        "line": {"color": "#8c8c8c", "width": 1.5, "dash": "dash"},
        **{key: [each[place] for each in best] for place, key in enumerate(("x", "y", "text"))},
        "textposition": "top right",
        "hoverinfo": "skip",
    }
    low, high = (math.log10(edge(markers["x"], default=1)) for edge in (min, max))
    layout: Json = {
        "xaxis": {"type": "log", "title": {"text": axis}, **ticks(markers["x"]), "range": [low - 0.15, high + 0.3]},
        "yaxis": {"title": {"text": "nDCG@10 (points)"}},
        "hovermode": "closest",
        "height": 420,
    }
    text = "The line joins what nothing else beats in both, by the means. Bars: 95% intervals, of nDCG over queries."
    text += " Where bars overlap, the change in the table can still be clear: it compares the same queries."
    return Chart(title, f"{text} Colors as in the table of results.", [joined, markers], layout)
