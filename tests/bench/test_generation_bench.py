"""Tests of `inferctl bench` against generation servers: plans, receipts, SLOs, search, compare."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import token_server
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from inferctl import cli
from inferctl.bench.judge import slo, summary, validity
from inferctl.bench.plan import plan, prompts, shape, tokens, workload
from inferctl.core.errors import UsageError
from inferctl.receipts import receipt
from tests.processes import inferctl

# In one worker, so that the server is measured once.
pytestmark = pytest.mark.xdist_group("generation_bench")
QUICK = ("--plan", "quick", "--users", "3", "--duration", "4", "--lengths", "24,6", "--repeats", "1")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with token_server.run_server("--first-ms", "15", "--gap-ms", "3") as running:
        yield running.url


def bench(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run `inferctl bench`; return the process and its result."""
    done = inferctl("bench", *options, "--json", "-o", folder / "out", cwd=folder, timeout=None)
    return done, json.loads(done.stdout) if done.stdout else {}


@pytest.fixture(scope="module")
def measured(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of a benchmark of one server, under two names."""
    folder = tmp_path_factory.mktemp("generation")
    urls = ("--url", f"a={server}", "--url", f"b={server}")
    done, result = bench(folder, *urls, *QUICK, "--slo-ttft", "60000", "--slo-itl", "60000", "--names", "uniform")
    assert done.returncode == 0, done.stderr
    return result


def test_a_result_has_the_figures_of_generation(measured: dict[str, Any]) -> None:
    row = measured["rows"][0]
    assert row["task"] == "generate"
    found = row["generation"]
    assert found["output_tokens_per_request"] == 6
    assert found["output_tokens_per_s"] > 0
    assert found["goodput"]["percent"] == 100
    assert found["itl_ms"]["n"] == 5 * found["ttft_ms"]["n"]
    assert row["slo"]["bounds_ms"] == {"ttft": 60_000, "itl": 60_000}
    assert any("output tokens/s" in text for text in measured["findings"])
    sealed = receipt.load(Path(row["receipt"]))
    assert (sealed.task, sealed.data["slo"]["ttft_ms"]) == ("generate", 60_000)
    (name,) = sealed.data["names"]
    assert {key: name[key] for key in sealed.data["summary"]} == sealed.data["summary"], "the only name has all figures"
    assert [Path(file["path"]).name for file in sealed.runs[0]["records"]] == ["requests-0.bin", "events-0.bin"]
    page = Path(measured["report"]).read_text()
    assert all(text in page for text in ("Time to first token by percentile", "Inter-token latency by percentile"))


def test_receipts_of_generation_are_compared_by_their_own_metrics(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (row["receipt"] for row in measured["rows"])
    assert cli.run(["compare", old, new, "--json"]) == 4
    names = [metric["name"] for metric in json.loads(capsys.readouterr().out)["configurations"][0]["metrics"]]
    assert names[:2] == ["ttft_p50", "ttft_p90"]
    assert "p50" not in names
    assert cli.run(["compare", old, new, "--metric", "p99"]) == 2
    assert "has no figure p99: its task is generate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_finds_the_rate_at_which_the_bounds_hold(server: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "name: s\nload: {mode: open, rate: 1, warmup_s: 1, duration_s: 4}\n"
        "search: {start_rate: 100, max_rate: 100, probe_s: 4, max_probe_s: 4, max_probes: 3}\n"
    )
    bounds = ("--slo-ttft", "20000", "--slo-itl", "20000", "--lengths", "16,2")
    done, result = bench(tmp_path, "--url", f"a={server}", "--plan", str(file), *bounds)
    search = result["rows"][0]["search"]
    assert search["bounds_ms"] == {"ttft": 20_000, "itl": 20_000}
    assert all(probe["p99_ms"] is None or probe["p99_ms"] < 100 for probe in search["probes"]), done.stderr
    assert "% of the bounds" in search["probes"][-1]["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--search",), "a search requires an SLO"),
        (("--search", "--slo-ttft", "500", "--budget", "1"), "the budget of 1 s is too short for a search"),
        (("--search", "--slo", "5", "--slo-itl", "5"), "either a p99 SLO or bounds"),
        (("--lengths", "azure"), "lengths 'azure' not found"),
        (("--lengths", "3000000,1"), "load.generation.input_tokens cannot be 3000000"),
    ],
)
def test_contradictory_options_are_errors(
    server: str, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.run(["bench", "--url", f"a={server}", "--plan", "quick", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_has_other_keys_for_generation_and_options_replace_them() -> None:
    quick = plan.read_plan("quick")
    own = quick.for_task("generate")
    assert [each.precision for each in own.configurations] == ["bf16"]
    assert own.load.generation is not None
    assert (own.load.users, own.load.auto_users, own.load.generation.input_tokens) == (4, False, 64)
    assert own.load.timeout_s > quick.load.timeout_s
    given = {"generation": {"input_tokens": 9, "output_tokens": 8}, "users": 2}
    changed = quick.with_overrides(["fp32"], **given).for_task("generate")  # type: ignore[arg-type]
    assert [each.precision for each in changed.configurations] == ["fp32"]
    assert changed.load.generation is not None
    assert (changed.load.users, changed.load.generation.input_tokens, changed.load.duration_s) == (2, 9, 40)
    assert quick.for_task("embed").load == quick.load
    bounded = quick.with_bounds(500, None).for_task("generate").load.generation
    assert bounded is not None
    assert (bounded.ttft_ms, bounded.input_tokens) == (500, 64)


@pytest.mark.parametrize("name", ["precision", "quick", "gate", "search", "spike"])
def test_every_plan_works_for_generation(name: str) -> None:
    load = plan.read_plan(name).for_task("generate").load
    assert (load.task, load.auto_users, load.mode) == ("generate", False, plan.read_plan(name).load.mode)
    assert workload.draw(load.model_copy(update={"rate": 2.0}), "mixed", 1).output_tokens


def test_a_plan_for_generation_is_rejected_for_embeddings() -> None:
    changed = plan.read_plan("quick").with_overrides(generation={"ttft_ms": 5})
    with pytest.raises(UsageError, match="is for generation"):
        changed.for_task("embed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokens.FileTokenizer:
    """Return a tokenizer like that of most generative models: bytes, merges within a word, single digits."""
    found = Tokenizer(models.BPE())
    digits, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(workload.read_corpus("mixed")[0], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    found.save(str(folder / "tokenizer.json"))
    loaded = tokens.of_model(folder)
    assert loaded
    return loaded


@pytest.mark.parametrize(
    "settings",
    [
        {"input_tokens": 100},
        {"input_tokens": 100, "common_prefix": 0.5},
        {"input_tokens": 24},
        {"lengths": "azure-llm-2023"},
    ],
    ids=["fixed", "common start", "short", "recorded lengths"],
)
def test_each_prompt_has_exactly_the_tokens_of_its_length(
    settings: dict[str, Any], tokenizer: tokens.FileTokenizer
) -> None:
    load = plan.Plan.model_validate({"name": "p", "load": {"generation": settings}}).for_task("generate").load
    drawn = workload.draw(load, "mixed", 3, tokenizer)
    serials = [f"{100_000 + 7 * number} {number * 37:06d}" for number in range(len(drawn.groups))]
    parts = [(f"{common} {serial}".strip(), rest) for (common, rest), serial in zip(drawn.groups, serials, strict=True)]
    longer = {length for length in drawn.input_tokens if length < 20}
    for counts in (
        tokenizer.of_texts([" ".join(part) for part in parts]),
        [sum(tokenizer.of_texts(part)) for part in parts],
    ):
        pairs = zip(counts, drawn.input_tokens, strict=True)
        assert all(found == wanted for found, wanted in pairs if wanted not in longer)
    assert (drawn.approximate is None) == (not longer)
    assert len({group[0] for group in drawn.groups}) == 1
    assert len({group[1] for group in drawn.groups}) > 200
    assert drawn.digest != workload.draw(load, "mixed", 4, tokenizer).digest


def test_lengths_without_an_exact_tokenizer_are_said_to_be_approximate(minilm: Path) -> None:
    load = plan.Plan.model_validate({"name": "p", "load": {"generation": {}}}).for_task("generate").load
    assert "no tokenizer counted their tokens" in str(workload.draw(load, "mixed", 3).approximate)
    # WordPiece merges digits.
    assert "in this tokenizer" in str(workload.draw(load, "mixed", 3, tokens.of_model(minilm)).approximate)


def test_a_server_counts_the_tokens_of_its_prompts(measured: dict[str, Any], tmp_path: Path) -> None:
    """The chat template of the server adds four tokens to each of the two messages."""
    row = measured["rows"][0]
    assert row["generation"]["input_tokens_per_request"] == 24 + 8
    assert not any("approximate" in caution for caution in row["cautions"])
    with token_server.run_server("--first-ms", "15", "--gap-ms", "3", "--no-tokenize") as running:
        done, result = bench(tmp_path, "--url", f"a={running.url}", *QUICK)
    assert "the lengths of the prompts are approximate: no tokenizer" in " ".join(result["rows"][0]["cautions"]), done


def test_lengths_come_from_a_distribution() -> None:
    rows = prompts.read_lengths("azure-llm-2023")
    assert len(rows) == 5000
    settings = {"generation": {"lengths": "azure-llm-2023", "max_request_tokens": 1000}}
    load = plan.Plan.model_validate({"name": "p", "load": settings}).for_task("generate").load
    drawn = workload.draw(load, "mixed", 3)
    pairs = list(zip(drawn.input_tokens, drawn.output_tokens, strict=True))
    assert len(set(pairs)) > 100
    assert set(pairs) <= {row for row in rows if sum(row) <= 1000}
    assert load.as_single_stage(users=3).generation == load.generation
    assert shape.Load.model_validate(load.model_dump(mode="json")) == load


def test_a_run_with_cached_prompts_is_invalid() -> None:
    found = {"cached_percent": 1.5, "counted_percent": 100.0, "finish": {"length": 10}, "tokens_per_event": 1.0}
    found["tokens_per_request"] = 24.0
    assert "1.5% of the prompts' tokens" in validity.judge_generation(found, 0.0, unique=True).reasons[0]
    assert validity.judge_generation(found, 0.1, unique=True).valid
    assert validity.judge_generation(found, 0.0, unique=False).valid
    early = validity.judge_generation({**found, "finish": {"length": 8, "stop": 2}}, 0.1, unique=True)
    assert "2 of 10 responses ended before the requested length" in early.cautions[0]
    unknown = validity.judge_generation({**found, "cached_percent": None}, 0.0, unique=True)
    assert unknown.valid
    assert "does not report cached tokens" in unknown.cautions[0]


def test_bounds_fail_if_more_than_one_percent_of_the_requests_exceed_them() -> None:
    few = {"value": None, "low": None, "high": None, "needed": 368, "dependence": None}
    found = {"requests": 100, "goodput": {"percent": 80.0, "bounds_percent": {"n": 100, "p99": few}}}
    assert slo.judge_bounds(found, 0.001).met is False
    found["goodput"] = {"percent": 100.0, "bounds_percent": {"n": 100, "p99": few}}
    assert slo.judge_bounds(found, 0.001).met is None


@pytest.mark.parametrize("count", [60, 200, 4000])
def test_bounds_that_99_percent_of_queued_requests_meet_are_rarely_said_to_fail(count: int) -> None:
    """One server with a queue at 70% load: requests beyond the bounds come in groups."""
    random = np.random.default_rng(5)

    def percent_of_bounds(requests: int) -> Any:
        service = random.lognormal(-0.005, 0.1, requests)
        steps = np.cumsum([0, *(service[:-1] - random.exponential(1 / 0.7, requests - 1))])
        return steps - np.minimum.accumulate(steps) + service

    bound = np.quantile(percent_of_bounds(1_000_000), 0.99)
    failed = 0
    for _ in range(200):
        shares = 100 * percent_of_bounds(count + 300)[300:] / bound
        ends = np.cumsum(np.full(count, 1_000_000, np.int64))
        fields = [(name, "<u8") for name in ("intended_ns", "sent_ns", "end_ns", "index", "output_tokens")]
        fields += [(name, "<u1") for name in ("phase", "error", "counted", "finish")] + [("status", "<u2")]
        rows = np.zeros(count, [*fields, ("tokens", "<u4"), ("cached_tokens", "<u4"), ("bytes", "<u4")])
        rows["intended_ns"], rows["end_ns"], rows["index"], rows["phase"] = ends, ends, np.arange(count), 1
        events = np.zeros(count, [("time_ns", "<u8"), ("index", "<u4"), ("tokens", "<u2"), ("phase", "<u1")])
        events["time_ns"], events["index"], events["phase"] = ends + (shares * 1e6).astype(int), rows["index"], 1
        events["tokens"] = 1
        run = summary.RunRecords(rows, 0, int(ends[-1]), 1, None, events, {"ttft": 100.0})
        goodput = summary.goodput([run], run.seconds)
        failed += slo.judge_bounds({"requests": count, "goodput": goodput}, 0.001).met is False
    assert failed <= 0.06 * 200
