"""The result in a terminal of 80 columns, and the HTML report."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_samples import MACHINE, document, sealed, shown, text_of

from inferctl.bench.report import charts, html, terminal
from inferctl.bench.report.result import Result
from inferctl.receipts import receipt
from tests.browser import in_browser


def made(folder: Path) -> tuple[Result, list[receipt.Receipt]]:
    """Return a result with a winner and with emulated, invalid, failed and missing rows."""
    invalid = {
        "valid": False,
        "reasons": ["the load generator used 97 % of its core (limit 90 %): it was the bottleneck"],
        "cautions": [],
    }
    found, receipts = shown(
        folder,
        document("fp32", 812.25, 12.34),
        document("fp16", 8.5, 987.6, level="emulated"),
        document("bf16", 2345.6, 4.321),
        document("remote-t4", 4000, 2.5, validity=invalid),
        failed=["int8"],
        hardware=["cpu", "t4", "a100-40gb-mig-3g.20gb"],
    )
    return dataclasses.replace(found, report="report.html", output="."), receipts


def test_the_table_fits_80_columns(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    found, _ = made(tmp_path)
    text = "\n".join(line.rstrip() for line in text_of(found).splitlines()) + "\n"
    golden("bench-view.txt", text)


def test_numbers_fit_their_columns() -> None:
    values = (None, 0.123, 8.456, 84.26, 842.4, 8421.0, 84210.0)
    assert [terminal.short(value) for value in values] == ["-", "0.12", "8.46", "84.3", "842", "8,421", "84.2k"]


def test_the_report_shows_the_receipts_numbers(tmp_path: Path) -> None:
    found, receipts = made(tmp_path)
    cells = re.findall("<td.*?</td>", html.render(found, receipts), re.DOTALL)
    text = " | ".join(" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in cells)
    for one in receipts:
        figures = one.data["summary"]
        for key in ("p50", "p90"):
            p = figures["latency_ms"][key]
            value, low, high = (html.milliseconds(p[name]) for name in ("value", "low", "high"))
            assert f"{value}{low} – {high}" in text
        assert f"{figures['requests_per_s']:.2f}" in text
        assert f"{figures['tokens_per_s']:,.0f}" in text
        assert one.data["seal"][:16] in text
    assert "not enough samples85 of 368" in text
    assert "not measured here: the hardware measured is Test CPU" in text
    assert "not run: bitsandbytes is not installed" in text


def test_large_latencies_have_no_decimals() -> None:
    assert [html.milliseconds(value) for value in (0.5, 99.994, 99.996, 123.45, 999.94, 999.96, 13631.22)] == (
        ["0.50", "99.99", "100.0", "123.5", "999.9", "1,000", "13,631"]
    )


@pytest.mark.parametrize(
    ("repeats", "which"), [(1, "intervals do not"), (2, "intervals of latencies do not"), (3, "intervals of latencies")]
)
def test_the_report_says_which_intervals_include_the_difference_between_runs(
    tmp_path: Path, repeats: int, which: str
) -> None:
    """From two runs on, intervals of requests/s do."""
    found, receipts = made(tmp_path)
    for one in receipts:
        one.data["runs"] *= repeats
    notes = [note.text for note in html.limitations(found, receipts)]
    (note,) = [text for text in notes if "differences between runs" in text]
    assert f": {which} include" in note
    assert "needs 3 repeats; 5 are recommended." in note
    assert "Each input starts" not in " ".join(notes)
    assert "each input starts with two numbers" in html.render(found, receipts)


def test_what_was_not_measured_or_is_invalid_stands_before_the_numbers(tmp_path: Path) -> None:
    text = html.render(*made(tmp_path))
    for sentence in (
        "remote-t4: the load generator used 97 %",
        "not measured here: t4, a100-40gb-mig-3g.20gb",
        "fp16: the reason of fp16",
    ):
        assert text.index(sentence) < text.index("<h2>Results</h2>")


def remote(folder: Path) -> tuple[Result, list[receipt.Receipt]]:
    """Return a result of two servers on different hardware, under an open loop."""
    t4 = document("t4", 100, 10, hardware={"key": "t4", "name": "Tesla T4", "kind": "cuda", "detected_by": "server"})
    t4["configuration"] = {"name": "t4", "precision": None, "url": "http://10.0.0.7:8080", "this_machine": False}
    t4["summary"] = {**t4["summary"], "late": 31, "dropped": 7}
    machine = dataclasses.replace(MACHINE, name="Laptop CPU", cpu_model="Laptop CPU")
    return shown(folder, t4, document("fp32", 50, 20), rate=100, machine=machine)


def test_rows_say_what_they_ran_on_when_it_is_not_the_same(tmp_path: Path) -> None:
    found, receipts = remote(tmp_path)
    text = text_of(found)
    assert re.search(r"^t4 +on Tesla T4 \(t4\)", text, re.MULTILINE)
    assert re.search(r"^fp32 +on Test CPU \(cpu\)", text, re.MULTILINE)
    page = html.render(found, receipts)
    assert "plan quick · Tesla T4, Test CPU</h1>" in page
    assert "<th>load generator&#39;s machine</th><td>Laptop CPU" in page
    assert '<span class="range">Tesla T4 (t4)</span>' in page
    same, alike = made(tmp_path / "same")
    assert " on Test CPU" not in text_of(same)
    assert "<th>machine</th>" in html.render(same, alike)


def test_late_and_dropped_sends_of_an_open_loop_are_shown(tmp_path: Path) -> None:
    found, receipts = remote(tmp_path)
    assert "t4 31 late and 7 dropped of 1,000" in text_of(found, 200)
    page = " ".join(html.render(found, receipts).split())
    assert "<th>late sends</th><th>dropped sends</th>" in page
    assert "<td>31</td><td>7</td>" in page


def test_the_report_is_one_small_file_whose_charts_a_browser_draws_without_network(tmp_path: Path) -> None:
    found, receipts = made(tmp_path)
    page = html.write(tmp_path / "report.html", found, receipts)
    assert page.stat().st_size < 1_000_000
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=", text)
    figures = json.loads(re.findall(r"^const figures = (.*);$", text, re.MULTILINE)[0])
    assert set(figures) == set(re.findall(r'id="(\w+)"', text)) == {"percentiles", "timeline"}
    drawn = in_browser(page)
    for name in charts.all_charts(receipts):
        chart = drawn[drawn.index(f'id="{name}"') :].partition("</section>")[0]
        assert 'class="main-svg"' in chart, chart[:200]
        assert "<path" in chart


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    found, receipts = made(tmp_path)
    receipts[0].data["configuration"]["name"] = "</script><b>x"
    first, *others = found.rows
    found = dataclasses.replace(found, rows=[dataclasses.replace(first, configuration="</script><b>x"), *others])
    assert "</script><b>x" not in html.render(found, receipts)


def test_the_slo_line_lies_where_its_label_is(tmp_path: Path) -> None:
    receipts = sealed(tmp_path, document("bf16", 100, 10, slo={"p99_ms": 70}))
    layout = charts.percentiles(receipts, charts.colors_of(receipts)).layout
    assert layout["yaxis"]["type"] == "log"
    assert layout["shapes"][0]["y0"] == 70
    assert 10 ** layout["annotations"][0]["y"] == pytest.approx(70)
