"""Whatever a benchmark says is what its receipts say ran, and beside other load it names no winner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_samples import SHORT_PLAN, bench, document, open_loop, ran, sealed, shown, text_of
from compare_samples import receipts_of, run_values
from test_show_extremes import SEARCH, probe
from test_verdicts import CALM, repeated, rows_of

from inferctl.bench.judge import comparable, compare
from inferctl.bench.report import html, junit, result
from inferctl.bench.report.receipts import write_all
from inferctl.bench.report.result import Result
from inferctl.receipts import receipt
from inferctl.receipts.receipt import Receipt
from tests import processes

CORES = {"environment": {"machine_cores": 2}}


def documents_of(found: Result, receipts: list[Receipt]) -> dict[str, str]:
    """Return the three documents of a result as text of one line."""
    page = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", html.render(found, receipts), flags=re.DOTALL)
    texts = {"terminal": text_of(found), "report": re.sub("<[^>]*>", " ", page), "json": json.dumps(found.as_dict())}
    return {name: " ".join(text.split()) for name, text in texts.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"load": {"mode": "open", "rate": "50%", "users": 3, "capacity_s": 1, "duration_s": 2, "warmup_s": 0}},
        {"load": {"users": 1, "duration_s": 1, "warmup_s": 0}, "repeats": 2},
        # No server has a p99 of 1 microsecond, so no rate is confirmed.
        {
            "load": {"mode": "open", "rate": 1, "duration_s": 20, "warmup_s": 0},
            "search": {"slo_p99_ms": 0.001, "probe_s": 2, "max_probe_s": 2, "max_probes": 3, "start_rate": 200},
        },
    ],
    ids=["capacity", "repeats", "search"],
)
def test_each_printed_load_is_the_one_of_a_receipt(changes: dict[str, Any], tmp_path: Path) -> None:
    work = bench(tmp_path, "bf16", options=["--median-ms", "4"], **changes)
    outcomes = ran(work)
    receipts = write_all(work, outcomes)
    found = result.collect(work, outcomes, receipts, tmp_path / "report.html")
    expected: dict[str, set[str]] = {"s": set(), "users?": set(), "requests/s offered": set(), "runs,": set()}
    for one in receipts:
        figures = one.data["summary"]
        measured = sum(run["summary"]["seconds"] for run in one.runs)
        assert "search" in changes or figures["seconds"] == pytest.approx(measured)
        expected["s"].add(f"{round(figures['seconds'], 1):g}")
        expected["runs,"] |= {str(len(one.runs))} if len(one.runs) > 1 else set()
        if (offered := figures["offered"]) is None:
            expected["users?"].add(str(one.data["plan"]["load"]["users"]))
        else:
            expected["requests/s offered"].add(f"{offered / figures['seconds']:.4g}")
    for name, text in documents_of(found, receipts).items():
        loads = re.findall(r"(?:closed|open) loop, .*?(?: s\b(?! measured)| in all)", text)
        assert loads, name
        for unit, values in expected.items():
            assert {value for load in loads for value in re.findall(rf"([\d.]+) {unit}", load)} == values, (name, loads)
        assert ("no rate confirmed, lowest complete probe: " in text) == ("search" in changes), name
        assert "highest confirmed rate: " not in text
    if "search" in changes:
        none = "o rate within the SLO (p99 0.001 ms) was confirmed"
        assert any(none in each for each in found.findings[: 2 if found.findings[0].startswith("Too noisy") else 1])


def beside(share: float, made: dict[str, Any], key: str = "other_cores") -> dict[str, Any]:
    """Return the document of a receipt of two cores, of which others used a share."""
    return made | CORES | {"resources": {**made["resources"], key: 2 * share}}


def search(name: str, rate: float) -> dict[str, Any]:
    made = open_loop(document(name, rate, 12), rate)
    return made | {
        "search": SEARCH | {"max_goodput_rps": rate, "band_rps": [rate, rate + 4], "probes": [probe(rate, 90, True)]}
    }


PAIRS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "one run": lambda: [document("bf16", 200, 10), document("int8", 100, 20)],
    "equal": lambda: [document("bf16", 100, 10), document("int8", 100, 10)],
    "repeats": lambda: [repeated("bf16", 200, CALM), repeated("int8", 100, CALM)],
    "open loop": lambda: [open_loop(document(name, 100, ms), 100) for name, ms in (("bf16", 10), ("int8", 20))],
    "search": lambda: [search("bf16", 200), search("int8", 80)],
    "emulated": lambda: [
        document("bf16", 200, 10), document("fp32", 100, 20), document("fp16", 20, 90, level="emulated"),
    ],
}  # fmt: skip
VERDICT = re.compile(r"\b(fastest|faster|wins|clear difference)\b|\dx (the|that)|% of the p\d")


@pytest.mark.parametrize(
    ("share", "key", "noise"),
    [
        (0.81, "other_cores", "other processes used up to 81% of the cores (limit 10%); stop them and measure again"),
        (0.11, "other_cores", "other processes used up to 11% of the cores (limit 10%); stop them and measure again"),
        (0.2, "stolen_cores", "the hypervisor withheld up to 20% of the cores (limit 5%); use a machine with"),
        (0.09, "other_cores", None),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_beside_other_load_the_noise_is_the_headline_and_nothing_wins(
    pair: str, share: float, key: str, noise: str | None, tmp_path: Path
) -> None:
    first, *others = PAIRS[pair]()
    found, receipts = shown(tmp_path, first | CORES, *(beside(share, one, key) for one in others))
    documents = documents_of(found, receipts)
    if noise is None:
        assert VERDICT.search(found.findings[0])
        return
    assert found.findings[0].startswith("Too noisy to compare bf16")
    for name, text in documents.items():
        assert noise in text, name
        assert not VERDICT.search(text), (name, VERDICT.search(text))
        assert "Intervals do not cover its effect." in text
    assert documents["terminal"].startswith("Too noisy to compare bf16")
    assert {found["share"] for row in found.as_dict()["rows"] for found in row["noise"]} == {share}


@pytest.mark.parametrize("least", [0.7, 0.0])
def test_a_share_that_not_all_configurations_have_is_the_highest(least: float, tmp_path: Path) -> None:
    first, second = PAIRS["one run"]()
    found, _ = shown(tmp_path, beside(least, first), beside(0.81, second))
    assert found.findings[0].startswith("Too noisy to compare bf16 and int8: other processes used up to 81% of the")


@pytest.mark.parametrize("apart", [True, False])
def test_a_comparison_of_separate_runs_beside_other_load_has_no_verdict(apart: bool, tmp_path: Path) -> None:
    """Interleaved runs share the load, and their interval shows it."""
    old, new = receipts_of(tmp_path, run_values(20, CALM), run_values(30, CALM[::-1]), apart=apart)
    for number, run in enumerate(new.data["runs"]):
        run["summary"]["rejected_percent"] = 4 + 0.1 * number
    noisy = receipt.write(new.path, beside(0.5, new.data))
    found = compare.compare([comparable.ReceiptPair(old, noisy)], [], compare.CompareOptions())
    assert found.exit_code == (4 if apart else 1)
    assert ("<failure" in junit.render(found)) is not apart
    outcomes = {metric.name: metric.outcome for metric in found.pairs[0].metrics}
    assert outcomes["memory"] == "no regression"
    assert {outcomes[name] for name in ("p50", "p90", "p99", "requests_per_s", "rejected")} == (
        {"not enough evidence"} if apart else {"regression"}
    )


def test_one_configuration_has_its_figures_as_the_headline(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, document("auto", 100, 10))
    found, _ = shown(tmp_path / "one", document("auto", 100, 10))
    assert found.findings[0].startswith(f"auto: {row.requests_per_s:.1f} requests/s, cosine 0.99991")
    made = search("auto", 80)
    none = SEARCH | {"max_goodput_rps": None, "verdict": "none holds"}
    for section, start in (
        (made["search"], "auto meets the SLO (p99 100 ms) up to 80"),
        (none, "auto: no rate within"),
    ):
        found, _ = shown(tmp_path / start[:5], made | {"search": section})
        assert found.findings[0].startswith(start)
        assert len(set(found.findings)) == len(found.findings)
    assert sealed(tmp_path / "sealed", made)[0].valid


@pytest.mark.slow
def test_the_front_end_limits_a_server_whose_engine_computes_nothing(minilm: Path, tmp_path: Path) -> None:
    server = processes.start(tmp_path, "--model", str(minilm), "--engine", "echo")
    try:
        load = ("--plan", SHORT_PLAN, "--users", "64", "--duration", "3")
        line = ("bench", "--url", f"echo={server.url}", *load, "--json")
        (row,) = json.loads(processes.inferctl(*line, cwd=tmp_path, code=0, timeout=None).stdout)["rows"]
    finally:
        server.kill()
    resources = receipt.load(Path(row["receipt"])).data["resources"]
    assert resources["engine_busy_percent"] < resources["api_busy_percent"]
    limit = "front end limited the server: the event loop of the API process had"
    assert any(limit in text for text in row["cautions"])
