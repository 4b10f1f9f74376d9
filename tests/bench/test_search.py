"""The search for the highest rate within an SLO, on simulated queues with a known limit and on a real server."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_samples import SECOND, row, table

from inferctl.bench import stats
from inferctl.bench.judge import goodput, slo, summary, validity
from inferctl.bench.judge import probe as probes
from inferctl.bench.judge.probe import Probe
from inferctl.bench.load import records
from inferctl.bench.measure import judgment, search
from inferctl.bench.measure.judgment import judge_outcome
from inferctl.bench.measure.outcome import BenchTarget, Measurement, Outcome
from inferctl.bench.plan import plan, sections, shape, workload
from inferctl.bench.report import search_findings
from inferctl.cli import bench_options
from inferctl.core.errors import UsageError
from inferctl.receipts import receipt
from tests.processes import inferctl

SERVICE_S = 0.010


def waits(rate: float, seconds: float, seed: int, noise: float = 0.0) -> tuple[np.ndarray[Any, Any], ...]:
    """Arrivals and ends (s) of Poisson requests at one server that takes `SERVICE_S` for each (Lindley's recursion).

    `noise`: standard deviation of the logarithm of the server's slowness, which is correlated over 0.3 s.
    """
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate, int(rate * seconds * 1.5) + 50))
    arrivals = arrivals[arrivals < seconds]
    kept, slowness = math.exp(-0.1 / 0.3), random.normal(size=int(seconds * 10) + 1)
    for i in range(1, len(slowness)):
        slowness[i] = kept * slowness[i - 1] + math.sqrt(1 - kept**2) * slowness[i]
    services = SERVICE_S * np.exp(noise * slowness[(arrivals * 10).astype(int)])
    # An end is the largest of: an earlier arrival, plus the services from it on.
    work = np.cumsum(services)
    return arrivals, work + np.maximum.accumulate(arrivals - (work - services))


@dataclasses.dataclass
class Simulated:
    """A server of one queue; from `refuses_from` requests/s it fails every tenth request.

    A probe lasts `seconds`, or as long as `answers` take; `seed` is that of the first one. `noise` is that of `waits`.
    `failing` is the share of requests that fail at every rate, of an error budget of 0.1%.
    """

    slo_ms: float
    seconds: float = 30
    refuses_from: float = math.inf
    answers: int | None = None
    seed: int = 0
    noise: float = 0.0
    failing: float = 0.0
    parts: dict[int, summary.RunRecords] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, float]] = dataclasses.field(default_factory=list)

    def __call__(self, rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        seed = self.seed + len(self.asked)
        self.asked.append((stage, rate))
        seconds = self.answers / rate if self.answers else self.seconds
        arrivals, ends = waits(rate, seconds, seed, self.noise)
        fails = np.random.default_rng(seed + 10**6).random(len(arrivals)) < self.failing
        if rate >= self.refuses_from:
            fails[::10] = True
        rows = np.repeat(table(row(0, 0)), len(arrivals))
        rows["intended_ns"] = rows["sent_ns"] = (arrivals * 1e9).astype(np.uint64)
        rows["first_ns"] = rows["end_ns"] = (ends * 1e9).astype(np.uint64)
        rows["status"][fails], rows["error"][fails] = 500, records.HTTP_ERROR
        part = summary.RunRecords(rows, 0, int(seconds * SECOND), 1, len(rows))
        self.parts[seed] = part
        found = summary.summarize([*(self.parts[probe.seed] for probe in earlier), part])
        verdict = probes.judge(found, self.slo_ms, 20.0, budget=0.001 if self.failing else 0.0)
        return probes.make(stage, rate, seed, found, verdict, client_cpu_percent=20.0, runs=1 + len(earlier))


@functools.cache
def true_goodput(slo_ms: float, noise: float = 0.0) -> float:
    """Return the rate at which the true p99 equals the SLO, by bisection over long simulations."""
    low, high = 1.0, 1 / SERVICE_S
    for _ in range(12):
        middle = (low + high) / 2
        arrivals, ends = waits(middle, 40_000 / middle, 7, noise)
        p99 = np.sort((ends - arrivals) * 1e3)[math.ceil(0.99 * len(ends)) - 1]
        low, high = (middle, high) if p99 <= slo_ms else (low, middle)
    return low


def found(settings: dict[str, Any], server: Simulated, ceiling: float | None = 100.0) -> dict[str, Any]:
    return goodput.find(sections.Search.model_validate(settings), server.slo_ms, ceiling, server)


def test_the_goodput_is_close_to_the_true_one_and_not_over_it() -> None:
    truth, result = true_goodput(80), found({"resolution": 0.02, "max_probes": 40}, Simulated(80, seconds=120))
    assert (result["verdict"], result["limited_by"]) == ("found", "p99")
    assert 0.85 * truth < result["max_goodput_rps"] < 1.03 * truth
    assert result["max_goodput_rps"] < result["first_failing_rps"] < 1.12 * truth
    last = [probe for probe in result["probes"] if probe["stage"] == "confirm"][-1]
    assert last["rate"] == result["max_goodput_rps"] and last["holds"]
    assert last["p99_interval_ms"][1] <= 80


def test_a_rate_meets_the_slo_only_with_a_sufficient_effective_sample_size() -> None:
    truth, named = true_goodput(80), []
    for seed in range(20):
        # The number of independent samples that a p99 needs.
        result = found({"max_probes": 16}, Simulated(80, answers=search.ENOUGH_SAMPLES, seed=1000 * seed))
        held = [probe for probe in result["probes"] if probe["stage"] == "confirm" and probe["holds"]]
        if result["max_goodput_rps"]:
            named.append(result["max_goodput_rps"])
            last = held[-1]
            assert last["n"] / last["dependence"] >= stats.needed(0.99)
    assert len(named) >= 15
    # Without pooling, 16 of these searches return a rate above the true limit.
    assert sum(rate > truth for rate in named) <= 2


def test_failures_within_the_error_budget_do_not_limit_a_search() -> None:
    """Half of the error budget fails at every rate. Before, a band contained the limit in 15 of 29 searches."""
    truth, inside, limited_by = true_goodput(80), 0, []
    for seed in range(5):
        result = found({"max_probes": 24}, Simulated(80, seed=1000 * seed, failing=0.0005))
        low, high = result["band_rps"] or (0, None)
        inside += low <= truth <= (high or math.inf)
        limited_by.append(result["limited_by"])
    assert inside >= 4
    assert limited_by.count("p99") >= 4


def test_a_server_that_fails_requests_at_every_rate_meets_the_slo_at_none() -> None:
    for seed in range(3):
        result = found({"max_probes": 24}, Simulated(80, seed=1000 * seed, failing=0.05))
        assert (result["verdict"], result["limited_by"]) == ("none holds", "errors")


def searcher_of(folder: Path, take: Any, **settings: float) -> search.Searcher:
    load = shape.Load.model_validate({"mode": "open", "rate": 1, "duration_s": 20, "warmup_s": 1})
    chosen = sections.Search.model_validate(settings)
    return search.Searcher(chosen, 80, load, "short", 1, folder, take, lambda _: None, lambda _: None, 0.0)


def test_a_rate_whose_answers_are_alike_is_measured_for_as_long_as_they_need(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    lasted: list[float] = []

    def take(work: workload.Workload, _: Path) -> Measurement:
        load = work.load
        lasted.append(load.duration_s)
        # Blocks of twenty responses. All responses of one block in fifty are slow.
        blocks = np.where(random.random(int(load.duration_s * (load.rate or 1)) // 20) < 0.02, 50.0, 5.0)
        rows = table(*(row(1e3 / (load.rate or 1) * i, ms) for i, ms in enumerate(np.repeat(blocks, 20))))
        part = summary.RunRecords(rows, 0, int(load.duration_s * SECOND), 1, len(rows))
        return Measurement(plan.Run("a", 0), 0.0, part, {}, {}, tmp_path / "a", {}, 1)

    searcher = searcher_of(tmp_path / "runs" / "a", take, max_probe_s=30)
    first = searcher.measure(100, "sweep", [])
    assert lasted == [8]
    assert (first.variance_inflation or 0) > 5
    searcher.measure(100, "sweep", [first])
    assert lasted[1] == pytest.approx(
        min(30, (search.ENOUGH_SAMPLES * (first.variance_inflation or 0) - first.n) / 100)
    )
    assert lasted[1] > 8
    searcher.measure(100, "confirm", [])
    assert lasted[2] >= 20


def pooled_search(folder: Path) -> Measurement:
    """Search a simulated server of about 100 requests/s, whose best rate needs more than one measurement."""
    seeds = itertools.count(5000)

    def take(work: workload.Workload, place: Path) -> Measurement:
        load = work.load
        rate = load.rate or 95
        arrivals, ends = waits(rate, load.duration_s, seed := next(seeds))
        rows = table(*(row(at * 1e3, (end - at) * 1e3) for at, end in zip(arrivals, ends, strict=True)))
        part = summary.RunRecords(rows, 0, int(load.duration_s * SECOND), 1, len(rows))
        (place / "requests-0.bin").write_bytes(rows.tobytes())
        # Other processes used the cores next to the first probe only.
        used = {"other_cores": 1.5 if seed == 5001 else 0.0}
        return Measurement(plan.Run("a", 0), 0.0, part, {"place": str(place)}, used, place, {}, 1)

    return searcher_of(folder / "runs" / "a-1", take, probe_s=8, max_probe_s=30, max_probes=24).run()


def test_a_receipt_describes_all_measurements_of_the_confirmed_probe(tmp_path: Path) -> None:
    """Before, it had the last one only: its p99 and its SLO differed from those of the finding."""
    measured = pooled_search(tmp_path)
    assert measured.search is not None
    best = [probe for probe in measured.search["probes"] if probe["rate"] == measured.search["max_goodput_rps"]][-1]
    assert best["runs"] == len(measured.all_records) > 1
    assert best is not measured.search["probes"][0] and measured.resources["other_cores"] == 1.5
    judged = judgment.judge_outcome(Outcome(BenchTarget("a"), [measured]), 2, 0.1).summary
    p99 = judged["latency_ms"]["p99"]
    assert (p99["value"], [p99["low"], p99["high"]]) == (best["p99_ms"], list(best["p99_interval_ms"]))
    assert judged["latency_ms"]["n"] == best["n"]
    assert slo.judge(judged["latency_ms"], 80, 0, 0).met is best["holds"] is True
    assert slo.judge(judged["latency_ms"], 80, 0, 0).reason == best["reason"]


def probe(rate: float, achieved: float, p50: float, limited_by: str | None = None) -> Probe:
    latency = (p50, (p50, p50), 2 * p50, (p50, 3 * p50))
    return Probe("sweep", rate, 0, 8, int(8 * rate), 1, achieved, 1, *latency, {}, 0, 1, not limited_by, limited_by, "")


def failing(made: Probe, limited_by: str = "p99") -> Probe:
    """The probe, as if a stall had changed its result."""
    changes = {"meets_slo": False, "limited_by": limited_by, "interval_contains_slo": False, "reason": "a stall"}
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def disturbed(
    seconds: float, stalls: Callable[[str, float, int], bool], limited_by: str = "p99"
) -> tuple[dict[str, Any], list[float]]:
    """Search a simulated server whose probe (stage, rate, number of stalls so far) a stall may spoil.

    Return the result and the rates that stalled.
    """
    server, stalled = Simulated(80, seconds=seconds), list[float]()

    def take(rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        made = server(rate, stage, earlier)
        if not stalls(stage, rate, len(stalled)):
            return made
        stalled.append(rate)
        return failing(made, limited_by)

    return goodput.find(sections.Search.model_validate({}), 80, 100.0, take), stalled


def test_the_failing_rate_must_fail_twice() -> None:
    result, stalled = disturbed(180, lambda _, rate, earlier: rate == 60 and not earlier)
    assert stalled
    assert result["max_goodput_rps"] > 60
    first = result["first_failing_rps"]
    assert len([probe for probe in result["probes"] if probe["rate"] == first]) >= 2


def test_one_failure_below_rates_that_hold_does_not_decide() -> None:
    result, _ = disturbed(180, lambda _, rate, __: rate == 20)
    assert result["verdict"] == "found"
    assert result["max_goodput_rps"] > 60
    assert result["first_failing_rps"] > result["max_goodput_rps"]
    assert result["failed_below"] == [20]
    assert any("also failed at 20 requests/s" in one for one in search_findings.sentences("x", result))


def test_a_rate_that_held_and_fails_once_is_probed_a_third_time() -> None:
    result, failed = disturbed(60, lambda stage, _, earlier: stage == "confirm" and not earlier)
    assert [p["rate"] for p in result["probes"] if p["stage"] == "confirm"][:2] == failed * 2
    if result["max_goodput_rps"] != failed[0]:
        # The third had no luck either: then what lies between it and the next lower one is searched, not skipped.
        assert result["max_goodput_rps"] > failed[0] / 1.2


def test_a_rate_that_held_once_and_failed_twice_gets_no_further_chance() -> None:
    confirmed: list[float] = []

    def unlucky(rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        if stage == "confirm":
            confirmed.append(rate)
        fails = rate > 60 or (stage == "confirm" and confirmed.count(rate) <= 2 and rate == confirmed[0])
        return dataclasses.replace(probe(rate, rate, 5, "p99" if fails else None), stage=stage, n=1000)

    result = goodput.find(sections.Search.model_validate({"max_rate": 115}), 80, 100.0, unlucky)
    assert confirmed.count(confirmed[0]) == 2
    assert result["verdict"] == "found"
    assert result["max_goodput_rps"] < confirmed[0]


def test_too_few_answers_are_said_to_be_too_few() -> None:
    result = found({}, Simulated(80, seconds=0.5))
    assert result["verdict"] == "n too small"
    assert result["max_goodput_rps"] is None
    assert "was confirmed, not enough samples" in search_findings.sentences("x", result)[0]
    problem = search_findings.inconclusive([{"configuration": "x", "search": result}])
    assert problem is not None
    assert problem.exit_code == 4
    settled = {"configuration": "y", "search": {**result, "verdict": "found"}}
    assert search_findings.inconclusive([{"configuration": "x", "search": result}, settled]) is None
    assert search_findings.inconclusive([{"configuration": "x", "search": None}]) is None


def test_a_rate_at_which_requests_were_dropped_does_not_hold() -> None:
    rows = [row(10 * i, 5) for i in range(995)]
    dropped = [row(9950 + 10 * i, 0, error=records.DROPPED) for i in range(5)]
    whole, lacking = (
        summary.summarize([summary.RunRecords(table(*all_), 0, 10 * SECOND, 1, len(all_))])
        for all_ in (rows, [*rows, *dropped])
    )
    judged = probes.judge(whole, 80, 20.0, 0)
    assert (judged.meets_slo, judged.limited_by) == (True, None)
    assert lacking["answered"] >= 0.98 * lacking["offered"]
    assert probes.judge(lacking, 80, 20.0, 0) == probes.RateVerdict(
        False, "fell behind", "5 of 1000 requests were dropped, because too many were waiting"
    )


def test_a_search_that_found_its_server_behind_at_every_rate_is_an_answer_and_no_invalid_run(tmp_path: Path) -> None:
    part = summary.RunRecords(table(*(row(20 * i, 500 + 20 * i) for i in range(500))), 0, 10 * SECOND, 1, 500)
    answer = {"verdict": "none holds", "max_goodput_rps": None}

    def judged(found: dict[str, Any] | None, **resources: float) -> validity.Validity:
        made = Measurement(
            plan.Run("a", 0), 0.0, part, {"steady": True}, resources, tmp_path, {"name": "x"}, 1, search=found
        )
        return judge_outcome(Outcome(BenchTarget("a"), [made]), 2, 0.1).validity

    behind = "of 500 offered requests were completed in time"
    assert behind in judged(None).reasons[0]
    assert judged(answer).valid
    assert behind in judged(answer).cautions[0]
    # A saturated load generator shows nothing about the server.
    assert "bottleneck" in judged(answer, client_cpu_percent=99.0).reasons[0]


def test_a_failing_rate_that_was_probed_once_is_said_to_be() -> None:
    short = found({"start_rate": 40, "max_probes": 3, "max_rate": 300}, Simulated(80, refuses_from=50), ceiling=None)
    assert short["first_failing_rps"] == 52
    assert short["first_failing_times"] == 1
    assert any("failed at 52 requests/s in one probe only" in one for one in search_findings.sentences("x", short))
    long = found({}, Simulated(80, refuses_from=50))
    assert long["first_failing_times"] >= 2
    assert not any("one probe only" in sentence for sentence in search_findings.sentences("x", long))


def test_an_slo_that_no_rate_holds_is_said_to_be_held_by_none() -> None:
    server = Simulated(5)
    result = found({}, server)
    assert (result["verdict"], result["limited_by"]) == ("none holds", "p99")
    assert min(rate for _, rate in server.asked) == 2.5
    assert "no rate within the SLO (p99 5 ms) was confirmed" in search_findings.sentences("x", result)[0]


def test_the_generators_limit_is_not_blamed_on_the_server() -> None:
    result, _ = disturbed(30, lambda _, rate, __: rate >= 45, "generator")
    assert (result["verdict"], result["limited_by"]) == ("at least", "generator")
    assert "at least" in search_findings.sentences("x", result)[0]


def test_probes_stay_within_their_number_and_their_rate() -> None:
    server = Simulated(80)
    result = found({"max_probes": 5, "max_rate": 50}, server)
    assert len(result["probes"]) <= 5 + goodput.CONFIRMATIONS + 1
    assert max(rate for _, rate in server.asked) <= 50
    assert [rate for _, rate in server.asked][:2] == [20, 40]
    started = Simulated(80)
    found({"start_rate": 10, "max_probes": 4}, started, ceiling=None)
    assert list(dict.fromkeys(rate for _, rate in started.asked))[:3] == [10, 13, 16.9]


class Timed(Simulated):
    """A simulated server on a virtual clock. A probe takes its duration and an overhead."""

    AROUND = 5.0

    def __init__(self, budget_s: float, **more: Any) -> None:
        super().__init__(80, **more)
        self.budget_s, self.spent = budget_s, 0.0

    def __call__(self, rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        self.spent += self.seconds + self.AROUND
        return super().__call__(rate, stage, earlier)

    def search(self, **settings: Any) -> dict[str, Any]:
        budget = goodput.Budget(
            self.budget_s, lambda: self.budget_s - self.spent, lambda _: self.seconds + self.AROUND, short=True
        )
        chosen = sections.Search.model_validate(settings)
        return goodput.find(chosen, self.slo_ms, 100.0, self, budget) | {
            "budget": {"seconds": self.budget_s, "spent_s": self.spent}
        }


@pytest.mark.parametrize(("budget_s", "widest"), [(400, 2.5), (900, 1.5)])
def test_searches_end_within_their_budget_and_their_band_contains_the_limit(budget_s: float, widest: float) -> None:
    truth, inside, confirmed, widths = true_goodput(80), 0, 0, []
    for seed in range(10):
        server = Timed(budget_s, seconds=60, seed=1000 * seed)
        result = server.search(max_probes=40)
        assert server.spent <= budget_s
        low, high = result["band_rps"]
        inside += low <= truth <= (high or math.inf)
        confirmed += result["verdict"] in ("found", "at least")
        widths.append((high or math.inf) / low)
    assert inside >= 9
    assert np.median(widths) < widest
    # At least half of the searches confirm a rate within the short time.
    assert confirmed >= 5


def test_a_noisy_server_is_measured_for_as_long_as_its_interval_needs() -> None:
    """One measurement of a rate leaves most intervals around the SLO. Going to lower rates then wastes the budget."""
    noise = 0.25
    truth, inside, confirmed = true_goodput(80, noise), 0, []
    for seed in range(10):
        server = Timed(300, seconds=8, seed=1000 * seed, noise=noise)
        result = server.search()
        assert server.spent <= 300
        low, high = result["band_rps"]
        inside += low <= 1.05 * truth <= 1.05 * (high or math.inf)
        confirmed += [result["max_goodput_rps"]] if result["max_goodput_rps"] else []
    assert inside >= 9
    assert len(confirmed) >= 8
    assert np.median(confirmed) > 0.6 * truth


def test_a_budget_without_time_to_confirm_reports_what_is_known() -> None:
    server = Timed(100, seconds=60)
    result = server.search()
    assert server.spent <= 100
    assert (result["verdict"], result["max_goodput_rps"], result["expired"]) == ("not confirmed", None, True)
    assert result["band_rps"] == [30, None]
    said = search_findings.sentences("mine", result)
    assert "the budget left no time to confirm" in said[0] and "30" in said[0]
    assert any("ended with its budget (100 s" in one for one in said)


def test_a_search_that_ran_out_of_time_does_not_say_that_no_rate_meets_the_slo() -> None:
    left = [100.0]

    def undecided(rate: float, stage: str, earlier: Sequence[Probe]) -> Probe:
        left[0] -= 20
        reason = "p99 75.0 ms (60.0 - 90.0) is not shown to be within 80 ms: its interval contains it"
        made = probe(rate, rate, 50.0, "p99")
        return dataclasses.replace(made, stage=stage, reason=reason, interval_contains_slo=True)

    budget = goodput.Budget(100.0, lambda: left[0], lambda _: 20.0, short=True)
    result = goodput.find(sections.Search(), 80, 100.0, undecided, budget)
    assert left[0] >= 0
    assert (result["verdict"], result["expired"]) == ("not confirmed", True)
    said = search_findings.sentences("mine", result | {"budget": {"seconds": 100.0, "spent_s": 100 - left[0]}})
    assert "no time to confirm" in said[0]


def test_a_search_says_what_its_time_buys() -> None:
    settings, load = plan.read_plan("search").search, plan.read_plan("search").load
    assert settings is not None
    whole = search.forecast(settings, load)
    assert whole.resolution == settings.resolution
    assert search.forecast(settings, load, whole.seconds + 1) == whole
    bought = [search.forecast(settings, load, share * whole.seconds).resolution for share in (0.3, 0.4, 0.6)]
    assert bought == sorted(bought, reverse=True) and bought[0] > settings.resolution
    small = search.forecast(settings, load, 30)
    assert not small.enough
    assert search.forecast(settings, load, small.seconds).enough


@pytest.mark.parametrize(("text", "seconds"), [("300", 300), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_a_budget_is_given_in_seconds_minutes_or_hours(text: str, seconds: float) -> None:
    assert bench_options.parse_seconds(text) == seconds
    for wrong in ("", "0", "-5", "5d", "m", "1e3"):
        with pytest.raises(UsageError, match="is not a time"):
            bench_options.parse_seconds(wrong)


def searched(url: str, folder: Path, settings: str) -> tuple[dict[str, Any], list[str]]:
    """Return the search and the findings of `inferctl bench`, and check that receipt and records describe it."""
    (folder / "mine.yaml").write_text(
        "name: mine\nconfigurations: [{name: a, precision: fp32}]\ncorpus: short\nquality: null\n"
        f"load: {{mode: open, rate: 1, duration_s: 4, warmup_s: 1}}\nsearch: {{{settings}}}\n"
    )
    done = inferctl("bench", "--plan", "mine.yaml", "--url", f"mine={url}", "--json", cwd=folder, timeout=None)
    if done.returncode == 4 and "the machine is too unsteady" in done.stderr:
        pytest.skip("the search found this machine too unsteady for a result")
    assert done.returncode in (0, 4), done.stderr
    document = json.loads(done.stdout)
    result: dict[str, Any] = document["rows"][0]["search"]
    assert (done.returncode == 0) == (result["max_goodput_rps"] is not None), done.stderr
    sealed = receipt.load(Path(document["rows"][0]["receipt"])).data
    assert sealed["search"] == result
    rate = sealed["plan"]["load"]["rate"]
    assert result["max_goodput_rps"] in (rate, None)
    stages = ("confirm",) if result["max_goodput_rps"] else ("sweep", "bisect", "confirm", "bound")
    last = [probe for probe in result["probes"] if probe["stage"] in stages and probe["rate"] == rate][-1]
    assert sealed["summary"]["latency_ms"]["p99"]["value"] == last["p99_ms"] == document["rows"][0]["p99_ms"]
    for made in result["probes"]:
        assert all((Path(document["output"]) / name).is_file() for name in made["records"])
        assert f"{made['stage']} {made['rate']:g} requests/s: " in done.stderr
    return result, document["findings"]


@pytest.mark.slow
def test_a_search_of_a_server_is_in_its_receipt(answering: Callable[..., str], tmp_path: Path) -> None:
    url = answering("--median-ms", "4")
    settings = "slo_p99_ms: 10000, probe_s: 2, max_probe_s: 2, max_probes: 3, start_rate: 60, max_rate: 66"
    result, said = searched(url, tmp_path, settings)
    assert [probe["rate"] for probe in result["probes"]][:2] == [60, 66]
    # Without enough independent samples, as on a busy machine, no rate is confirmed.
    assert result["verdict"] in ("at least", "not confirmed", "n too small"), result
    assert any(one.startswith("mine") for one in said)


@pytest.mark.slow_measurement
@pytest.mark.timeout(900)  # it measures longer on an unsteady machine
def test_a_search_stops_below_the_rate_of_a_server_with_a_queue(answering: Callable[..., str], tmp_path: Path) -> None:
    """One slot of 4 ms and a queue of 100: the server rejects requests above 250 requests/s.

    SLO and queue are so long that a busy machine does not exceed them below that rate.
    """
    url = answering("--median-ms", "4", "--sigma", "0.1", "--slots", "1", "--queue", "100")
    settings = "slo_p99_ms: 600, resolution: 0.3, probe_s: 4, max_probe_s: 6, max_probes: 7, start_rate: 120"
    result, said = searched(url, tmp_path, settings)
    if result["verdict"] != "found" and any("effective sample size" in probe["reason"] for probe in result["probes"]):
        pytest.skip("the latencies of this machine are too autocorrelated for a result")
    assert result["verdict"] == "found", result
    assert 40 < result["max_goodput_rps"] < 250
    assert result["first_failing_rps"] > result["max_goodput_rps"]
    assert any(one.startswith("mine meets the SLO (p99 600 ms) up to ") for one in said)
