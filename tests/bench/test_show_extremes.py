"""Table and report of results with few, many or unusual rows."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from bench_samples import SECOND, WARMUP, document, row, shown, table, text_of

from inferctl.bench.judge import stages, summary
from inferctl.bench.plan import shape
from inferctl.bench.report import charts, findings, html
from inferctl.bench.report.rows import MeasuredRow
from tests.browser import in_browser


def burst() -> dict[str, Any]:
    """Return a receipt of an open loop with a spike: 3x the rate for five seconds, with 4x the latency."""
    draw, rows, at = random.Random(1), [], 0.0
    while at < 20_000:
        busy = 8000 <= at < 13_000
        rows.append(row(at, (48 if busy else 12) * math.exp(draw.gauss(0, 0.2))))
        at += 1000 * draw.expovariate(240 if busy else 80)
    part = summary.RunRecords(table(row(0, 999, phase=WARMUP), *rows), 0, 20 * SECOND, 1)
    load = shape.Load.model_validate(
        {"mode": "open", "rate": 80, "duration_s": 20, "spike": {"at_s": 8, "duration_s": 5, "times": 3}}
    )
    made = document("bf16", 100, 10, stages=stages.summarize([part], load))
    made |= {"summary": summary.summarize([part]), **summary.curves([part])}
    made["runs"][0]["latency_over_time"] = summary.over_time(part)
    return made


def probe(rate: float, p99: float, holds: bool) -> dict[str, Any]:
    return {
        "stage": "sweep", "rate": rate, "achieved_rps": rate, "p50_ms": p99 / 3, "p99_ms": p99, "n": 500, "errors": {},
        "p99_interval_ms": [0.9 * p99, 1.2 * p99],
        "holds": holds, "broke": None if holds else "p99", "reason": "a reason", "runs": 1,
    }  # fmt: skip


SEARCH = {
    "slo_p99_ms": 100, "resolution": 0.05, "verdict": "found", "max_goodput_rps": 82.0, "first_failing_rps": 86.0,
    "limited_by": "p99", "reason": "p99 133.2 ms is above 100 ms",
    "probes": [probe(40, 30, True), probe(82, 90, True), probe(86, 133, False), probe(100, 400, False)],
}  # fmt: skip
COSTS = {
    "watts": 61.0, "watts_from": ["GPU (counter)"],
    "joules_per_1000_requests": 203.0, "joules_per_million_texts": 203_000.0,
    "cpu_seconds_per_1000_requests": 3.2, "unknown": {},
    "cost": [{
        "provider": "aws", "instance": "g4dn.xlarge", "usd_per_hour": 0.526,
        "source": "a public list", "date": "2026-11-24", "usd_per_million_texts": 0.487,
    }],
}  # fmt: skip


def long_names() -> list[dict[str, Any]]:
    names = [
        f"{precision}-{budget}-{'x' * 30}"[:40]
        for budget in (1024, 4096, 16384)
        for precision in ("fp32", "fp16", "bf16", "int8")
    ]
    return [document(name, 100 + 20 * i, 10 + i) for i, name in enumerate(names)]


CASES: dict[str, Any] = {
    "one": lambda folder: shown(folder, document("bf16", 300, 12)),
    "twelve long names": lambda folder: shown(folder, *long_names()),
    "all failed": lambda folder: shown(folder, failed=("fp32", "int8")),
    "n too small": lambda folder: shown(folder, document("bf16", 2, 12), document("fp32", 20, 12)),
    "a server that says nothing of itself": lambda folder: shown(
        folder, document(
            "x", 300, 12, model={"source": None}, quality={"checked": False, "reason": "no"},
            precision=dict.fromkeys(("effective", "level", "reason", "method", "requested")),
        )
    ),
    "nothing answered": lambda folder: shown(folder, document("bf16", 2, 12, curve=[])),
    "everything": lambda folder: shown(
        folder, burst() | {"search": SEARCH, "efficiency": COSTS}, document("fp32", 50, 20),
        failed=("int8",), rate=80,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whatever_came_out_can_be_shown(case: str, tmp_path: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    found, receipts = CASES[case](tmp_path)
    text_of(found)
    assert "<h2>Limitations</h2>" in html.render(found, receipts)
    for chart in charts.all_charts(receipts).values():
        graph_objects.Figure({"data": chart.data, "layout": chart.layout})


COUNT = """<script>
const boxes = [...document.querySelectorAll("td, p, li")].map(cell => cell.getBoundingClientRect());
document.body.dataset.seen = boxes.filter(box => box.width).length;
document.body.dataset.beyond = boxes.filter(box => box.right > innerWidth).length;
</script></body>"""


@pytest.mark.parametrize(("case", "width"), [("everything", 1280), ("everything", 500), ("twelve long names", 500)])
def test_no_figure_of_the_report_is_beyond_the_edge_of_the_screen(case: str, width: int, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html.render(*CASES[case](tmp_path)).replace("</body>", COUNT))
    drawn = in_browser(page, width)
    seen, beyond = (int(found[1]) for found in re.finditer(r'data-(?:seen|beyond)="(\d+)"', drawn))
    assert seen > 50
    assert beyond == 0
    assert re.search(r'<td data-label="p99 \(ms\)">[\d.]+<span class="range">', drawn)


def test_a_search_shows_every_probe_against_the_slo(tmp_path: Path) -> None:
    found, receipts = shown(tmp_path, document("bf16", 80, 12, search=SEARCH), rate=80)
    assert "82.0" in text_of(found)
    figure = charts.all_charts(receipts)["goodput"]
    (trace,) = figure.data
    assert trace["x"] == [40, 82, 86, 100]
    assert trace["marker"]["symbol"] == ["circle", "circle", "x", "x"]
    assert figure.layout["shapes"][-1]["y0"] == 100
    assert "<b>82</b>" in html.render(found, receipts)


def test_searches_are_compared_by_the_rate_that_held(tmp_path: Path) -> None:
    slower = SEARCH | {"max_goodput_rps": 41.0, "first_failing_rps": 43.0, "band_rps": [41.0, 50.0]}
    # By p99 the other configuration would win, since it was measured at half the rate.
    found, _ = shown(
        tmp_path, document("bf16", 80, 30, search=SEARCH), document("fp32", 40, 15, search=slower), rate=80
    )
    assert found.findings[0].startswith("bf16 is fastest in this run: 2.00x the goodput of fp32")


def test_searches_whose_bands_overlap_show_no_clear_difference(tmp_path: Path) -> None:
    """82 and 60 requests/s differ by more than a step of the search, but their bands overlap."""
    wide = SEARCH | {"max_goodput_rps": 60.0, "first_failing_rps": 62.0, "band_rps": [60.0, 90.0]}
    near = SEARCH | {"band_rps": [82.0, 86.0]}
    found, _ = shown(tmp_path, document("bf16", 80, 30, search=near), document("fp32", 60, 15, search=wide), rate=80)
    assert found.findings[0].startswith(
        "No clear difference between bf16 and fp32 in this run: bf16 has 1.37x the goodput of fp32 (0.91x to 1.43x)."
    )
    assert "60.0-90.0" in text_of(found)


def test_a_burst_is_told_by_stage(tmp_path: Path) -> None:
    found, receipts = shown(tmp_path, burst(), rate=80)
    assert any(one.startswith("bf16 at 3x the rate: p99 ") for one in found.findings)
    row_ = found.rows[0]
    assert isinstance(row_, MeasuredRow) and row_.stages
    before, spike, after = row_.stages
    assert before["latency_ms"]["p50"]["value"] == pytest.approx(12, rel=0.05)
    assert spike["latency_ms"]["p50"]["value"] == pytest.approx(48, rel=0.05)
    assert after["requests"] == pytest.approx(7 * 80, rel=0.2)
    assert "latency" in charts.all_charts(receipts)


def test_rejected_requests_of_a_burst_are_not_called_failed(tmp_path: Path) -> None:
    found, _ = shown(tmp_path, burst(), rate=80)
    row_ = found.rows[0]
    assert isinstance(row_, MeasuredRow) and row_.stages
    spike = row_.stages[1]
    assert spike["rejected"] == 0
    spike.update({"requests": 400, "errors": {"HTTP status": 120}, "rejected": 120})
    (sentence,) = [one for one in findings.describe(found.rows, 0.1) if "3x the rate" in one]
    assert ", 120 of 400 requests were rejected (429)" in sentence
    assert "failed" not in sentence
    spike.update({"errors": {"HTTP status": 120, "timeout": 3}})
    (sentence,) = [one for one in findings.describe(found.rows, 0.1) if "3x the rate" in one]
    assert ", 3 of 400 requests failed, 120 of 400 requests were rejected (429)" in sentence
    assert re.search(r"spike .* 3 +120\n", text_of(found))


def test_a_price_is_never_shown_without_its_source_and_date(tmp_path: Path) -> None:
    found, receipts = shown(tmp_path, document("bf16", 300, 12, efficiency=COSTS), document("fp32", 50, 20))
    text = " ".join(text_of(found).split())
    assert "price: aws g4dn.xlarge $0.526/h on 2026-11-24 (a public list)" in text
    page = " ".join(html.render(found, receipts).split())
    assert "aws g4dn.xlarge, $0.526/h, 2026-11-24" in page
    assert "(a public list)" in page
    assert "0.49" in text


def test_configurations_that_were_asked_different_things_are_not_compared(tmp_path: Path) -> None:
    short, mixed = document("bf16-short", 300, 12), document("bf16-mixed", 100, 30)
    mixed["workload"] = {**mixed["workload"], "corpus": "mixed"}
    found, _ = shown(tmp_path, short, mixed)
    assert found.findings[0].startswith("texts short: bf16-short: 299.7 requests/s")
    assert found.findings[1].startswith("texts mixed: bf16-mixed: 99.8 requests/s")
