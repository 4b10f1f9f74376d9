"""`inferctl compare`: what it rejects, what it judges to be worse, and how it reports it."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from compare_samples import receipts_of, run_values

from inferctl import cli
from inferctl.bench.judge import comparable, compare, compare_result, quality_drop, run_metrics
from inferctl.bench.report import comparison, junit
from inferctl.core.errors import InvalidRunError, UsageError
from inferctl.receipts import receipt

STEADY = [1.0, 1.01, 0.99, 1.005, 0.995]


def compared(old: receipt.Receipt, new: receipt.Receipt, **options: Any) -> compare_result.CompareResult:
    return compare.compare([comparable.ReceiptPair(old, new)], [], compare.CompareOptions(**options))


def verdict(old: receipt.Receipt, new: receipt.Receipt, **options: Any) -> dict[str, Any]:
    """The JSON document of the comparison."""
    return compared(old, new, **options).as_dict()


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in result["configurations"][0]["metrics"]}


def changed(one: receipt.Receipt, change: Callable[[dict[str, Any]], object]) -> receipt.Receipt:
    """The receipt with a change, sealed again."""
    data = json.loads(json.dumps(one.data))
    change(data)
    return receipt.write(one.path, data)


@pytest.mark.parametrize(
    ("old_ms", "new_ms", "outcome", "code"),
    [
        *((20, 22, "regression", 1), (20, 20, "no regression", 0), (20, 16, "improvement", 0)),
        *((fast, 1.11 * fast, "regression", 1) for fast in (0.5, 3.0)),
    ],
)
def test_a_steady_change_is_found(tmp_path: Path, old_ms: float, new_ms: float, outcome: str, code: int) -> None:
    result = verdict(*receipts_of(tmp_path, run_values(old_ms, STEADY), run_values(new_ms, STEADY[::-1])))
    assert (result["outcome"], result["exit_code"]) == (outcome, code)
    for name in ("p50", "requests_per_s"):
        assert rows(result)[name]["outcome"] == outcome
    p50, change = rows(result)["p50"], new_ms / old_ms - 1
    assert p50["change"] == pytest.approx(change, abs=0.002)
    assert p50["interval"][0] < change < p50["interval"][1]
    assert rows(result)["memory"]["outcome"] == "no regression"


def test_a_difference_that_noise_can_explain_wants_more_repeats(tmp_path: Path) -> None:
    noisy = [1.0, 1.2, 0.85, 1.1, 0.9]
    result = compared(*receipts_of(tmp_path, run_values(20, STEADY), run_values(22, noisy)))
    assert (result.outcome, result.exit_code) == ("not enough evidence", 4)
    assert result.repeats_needed
    assert 5 < result.repeats_needed <= 100
    hint = f"measure both again with `--repeats {result.repeats_needed}`"
    assert compare_result.advice(result) == hint
    assert comparison.sentence(result).startswith("Not enough evidence: ")
    assert "--repeats" not in comparison.sentence(result)
    assert f"hint: {hint}" in comparison.plain(result)


def test_a_change_is_no_regression_under_the_floor_or_the_threshold_however_sure_it_is(tmp_path: Path) -> None:
    exact = [1.0, 1.0001, 0.9999, 1.0, 1.0]
    old, new = receipts_of(tmp_path, run_values(2, exact), run_values(2.16, exact))
    assert rows(verdict(old, new, floor_ms=0.2))["p50"]["outcome"] == "no regression"
    assert rows(verdict(old, new, floor_ms=0.1))["p50"]["outcome"] == "regression"
    wide = dict.fromkeys(run_metrics.METRICS, 0.09)
    assert verdict(old, new, floor_ms=0.1, thresholds=wide)["outcome"] == "no regression"


@pytest.mark.parametrize(("new_mib", "outcome"), [(105, "no regression"), (125, "regression")])
def test_a_small_server_that_grows_by_a_quarter_is_found(tmp_path: Path, new_mib: float, outcome: str) -> None:
    values = run_values(20, STEADY, memory=100), run_values(20, STEADY, memory=new_mib)
    assert rows(verdict(*receipts_of(tmp_path, *values)))["memory"]["outcome"] == outcome


NONE, FOUR = [0, 0, 0, 0, 0], [4.1, 3.9, 4.0, 4.2, 3.8]


def rejecting(one: receipt.Receipt, shares: list[float]) -> receipt.Receipt:
    """The receipt, in which each run rejected this share of its requests (percent)."""
    runs = [{**run, "summary": {**run["summary"], "rejected_percent": share}}
            for run, share in zip(one.data["runs"], shares, strict=True)]  # fmt: skip
    return changed(one, lambda data: data.update(runs=runs))


@pytest.mark.parametrize(
    ("old_shares", "new_shares", "outcome"),
    [
        (NONE, NONE, None),
        (NONE, FOUR, "regression"),
        (FOUR, NONE, "improvement"),
        ([0, 0.01, 0, 0, 0], [0, 0, 0.02, 0, 0], "no regression"),
        (NONE, [0, 9, 0, 0, 0], "not enough evidence"),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_the_share_of_rejected_requests_is_judged(
    tmp_path: Path, old_shares: list[float], new_shares: list[float], outcome: str | None, apart: bool
) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY), apart=apart)
    result = compared(rejecting(old, old_shares), rejecting(new, new_shares))
    assert rows(result.as_dict()).get("rejected", {}).get("outcome") == outcome
    if outcome == "regression":
        assert result.exit_code == 1
        assert "rejected +4.00 percentage points" in comparison.sentence(result)


def test_interleaved_repeats_are_compared_pair_by_pair(tmp_path: Path) -> None:
    """The machine becomes three times slower. This affects both sides of interleaved runs equally."""
    drift = [1.0, 1.3, 1.7, 2.3, 3.0]
    values = run_values(20, drift), run_values(22.4, drift)
    together = verdict(*receipts_of(tmp_path / "a", *values))
    apart = verdict(*receipts_of(tmp_path / "b", *values, apart=True))
    assert together["outcome"] == "regression"
    assert apart["outcome"] == "not enough evidence"
    assert any("measured separately" in note for note in apart["configurations"][0]["notes"])


def started(*minutes: float, seconds: float = 30) -> list[dict[str, Any]]:
    """Runs of a receipt that began at these minutes after midnight."""
    midnight = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    return [
        {
            "repeat": repeat,
            "started": (midnight + datetime.timedelta(minutes=minute)).isoformat(timespec="milliseconds"),
            "summary": {"seconds": seconds},
        }
        for repeat, minute in enumerate(minutes)
    ]


DAY = 24 * 60


@pytest.mark.parametrize(
    ("old", "new", "together"),
    [
        ((0, 3, 4), (1, 2, 5), True),
        ((0,), (1,), False),  # one repeat cannot alternate
        ((0,), (DAY,), False),
        ((0, 1, 2), (DAY, DAY + 1, DAY + 2), False),
        ((0, 3, DAY + 4), (1, 2, DAY + 5), True),
        ((0, 1, 2), (0.1, 1.1, 2.1), False),  # two benches at the same time
        ((0, 3, 4, 6), (1, 2, 5), True),
    ],
)
def test_repeats_count_as_pairs_only_where_their_runs_followed_one_another(
    old: tuple[float, ...], new: tuple[float, ...], together: bool
) -> None:
    assert comparable.runs_interleaved(started(*old), started(*new)) == together


@pytest.mark.parametrize(
    ("repeats", "responses", "options"),
    [(5, 200, "--duration 5"), (1, 200, "--duration 5 --repeats 5"), (2, 1000, "--repeats 5")],
)
def test_without_enough_evidence_the_hint_has_what_it_takes(
    tmp_path: Path, repeats: int, responses: int, options: str
) -> None:
    """A p99 needs 368 responses per run, and a verdict five repeats."""
    values = run_values(20, STEADY[:repeats], n=responses)
    result = compared(*receipts_of(tmp_path, values, values))
    assert compare_result.advice(result) == f"measure both again with `{options}`"
    assert result.outcome == "not enough evidence"
    assert ("200 of 368 responses" in rows(result.as_dict())["p99"]["reason"]) == (responses < 368)


def test_more_figures_judged_together_have_wider_intervals(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(21, STEADY[::-1]))
    alone, together = verdict(old, new, metrics=["p50"]), verdict(old, new)
    assert (alone["family"], together["family"]) == (1, 5)
    assert rows(alone)["p50"]["interval"][0] > rows(together)["p50"]["interval"][0]


@pytest.mark.parametrize(
    ("changes", "reason", "hint"),
    [
        ({"hardware": {"name": "Another CPU"}}, "hardware differs", "--allow hardware"),
        ({"precision": {"effective": "fp32"}}, "effective precisions differ: bf16 and fp32", "--allow precision"),
        ({"precision": {"effective": "fp32"}, "hardware": {"name": "B"}}, "", "--allow precision --allow hardware"),
        ({"precision": {"effective": "fp32"}, "load": {"users": 9}}, "", "measure both again in one benchmark"),
        ({"environment": {"cores": 64}}, "2 and 64 cores", "--allow hardware"),
        ({"configuration": {"this_machine": False}}, "ran on the load generator's machine", "--allow hardware"),
        ({"workload": {"sha256": "00" * 32}}, "schedules differ", ""),
        ({"load": {"users": 9}}, "loads differ: users 4 and 9", ""),
        ({"plan": {"neighbours": 2}}, "loads differ: neighbours 0 and 2", ""),
        ({"load": {"task": "rerank"}}, "loads differ: task embed and rerank", ""),
        ({"load": {"capacity_percent": 50, "rate": 10}}, "loads differ", ""),
        ({"load": {"capacity_percent": None, "capacity_s": 5}}, None, ""),  # counts only with a share of it
        ({"search": {"probes": []}}, "each search ends at its own rate", ""),
        ({"validity": {"valid": False, "reasons": ["too hot"]}}, "new receipt is invalid: too hot", ""),
    ],
)
def test_what_cannot_be_compared_is_rejected(
    tmp_path: Path, changes: dict[str, dict[str, Any]], reason: str | None, hint: str
) -> None:
    def change(data: dict[str, Any]) -> None:
        for key, values in changes.items():
            (data["plan"]["load"] if key == "load" else data.setdefault(key, {})).update(values)

    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    result = compared(old, changed(new, change))
    assert (result.outcome, result.exit_code) == (("no regression", 0) if reason is None else ("invalid", 5))
    assert reason is None or reason in result.as_dict()["configurations"][0]["reasons"][0]
    problem = compare_result.problem(result)
    assert hint in (problem.hint or "" if problem else "")
    assert hint or "--allow" not in (problem.hint or "" if problem else "")
    errors = ElementTree.fromstring(junit.render(result))[0].findall("testcase/error")
    assert [error.attrib["type"] for error in errors] == ([] if reason is None else ["invalid"])


@pytest.mark.parametrize(
    ("old_sent", "new_sent", "reason"),
    [
        ("abc", "abc", None),
        ("abc", "abd", "the schedules of repeat 3 differ"),
        ("aaa", None, None),  # an older receipt has one schedule for all repeats, and says it once
        ("abc", None, "the schedules of repeat 2, 3 differ"),
    ],
)
def test_repeats_are_compared_with_the_repeat_that_had_the_same_schedule(
    tmp_path: Path, old_sent: str, new_sent: str | None, reason: str | None
) -> None:
    def sent(digests: str | None) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            data["workload"]["sha256"] = "a"
            for run, digest in zip(data["runs"], digests or "", strict=False):
                run["workload"] = {"seed": 1, "sha256": digest}

        return change

    old, new = receipts_of(tmp_path, run_values(20, STEADY[:3]), run_values(20, STEADY[:3]))
    result = verdict(changed(old, sent(old_sent)), changed(new, sent(new_sent)))
    reasons = result["configurations"][0]["reasons"]
    assert (reason is None and not reasons) or reason in reasons[0]


def test_other_precisions_and_hardware_are_compared_when_that_is_said_and_noted(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(10, STEADY))
    new = changed(new, lambda data: data["precision"].update(effective="fp32"))
    new = changed(new, lambda data: data["hardware"].update(name="Another CPU"))
    assert verdict(old, new, allow=["precision"])["outcome"] == "invalid"
    result = verdict(old, new, allow=["precision", "hardware"])
    assert result["outcome"] == "improvement"
    assert [note for note in result["configurations"][0]["notes"] if "allowed" in note] == [
        "different precisions, as allowed: bf16 and fp32",
        "as allowed: the hardware differs: Test CPU cpu and Another CPU cpu",
    ]


def test_the_warnings_of_both_receipts_are_notes_of_the_comparison(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    assert verdict(old, new)["configurations"][0]["notes"] == []
    old = changed(old, lambda data: data["validity"].update(cautions=["a warning", "another one"]))
    new = changed(new, lambda data: data["validity"].update(cautions=["a third one"]))
    result = compared(old, new)
    notes = ["old: a warning", "old: another one", "new: a third one"]
    assert result.as_dict()["configurations"][0]["notes"] == notes
    assert all(note in comparison.plain(result) for note in notes)


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        # A recall of 0.987 may lose as much as it lacks, a cosine of 0.9991 too: an error that doubles is allowed.
        ({"recall_at_10": 0.973}, "regression", "dropped by 0.014, the limit is 0.013"),
        ({"recall_at_10": 0.974}, "no regression", ""),
        ({"p1": 0.97}, "regression", "below the plan's limit of 0.98"),
        ({"p1": 0.9981}, "regression", "dropped by 0.001, the limit is 0.0009"),
        ({"p1": 0.9983}, "no regression", ""),
        ({"passes": False, "checked": True}, "regression", None),
        ({"checked": False}, "not enough evidence", None),
        # Of other texts, the old figure says nothing; the name of their file does not matter.
        ({"recall_at_10": 0.95, "corpus_sha256": "bb"}, "no regression", None),
        ({"recall_at_10": 0.95, "corpus": "renamed.jsonl"}, "regression", None),
    ],
)
def test_quality_is_held_against_its_limits_exactly(
    tmp_path: Path, change: dict[str, Any], outcome: str, reason: str | None
) -> None:
    def of(data: dict[str, Any], change: dict[str, Any]) -> None:
        data["plan"]["quality"] = {"corpus": change.get("corpus", "texts.jsonl")}
        if "checked" in change:
            data["quality"] = {"reason": "not finite", **change}
        else:
            data["quality"] |= {"corpus_sha256": "aa", **change}
            data["quality"]["cosine"]["p1"] = change.get("p1", data["quality"]["cosine"]["p1"])

    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    result = verdict(changed(old, lambda data: of(data, {})), changed(new, lambda data: of(data, change)))
    assert result["outcome"] == outcome
    judged = [metric for name, metric in rows(result).items() if name in ("cosine_p1", "recall_at_10")]
    assert reason is None or reason in [metric["reason"] for metric in judged]
    assert all((metric["old"] is None) == ("corpus_sha256" in change) for metric in judged)


@pytest.mark.parametrize(
    ("old", "allow", "drop"),
    [
        (1.0, (), 0.0005),  # what near-ties lose is always allowed
        (0.9991, (), 0.0009),
        (0.98, (), 0.005),
        (1.0, ("precision",), 0.005),  # fp32 against bf16, as asked for
        (None, (), 0.005),
    ],
)
def test_the_distance_of_quality_from_1_may_double(old: float | None, allow: tuple[str, ...], drop: float) -> None:
    assert quality_drop.allowed_drop("cosine_p1", old, allow) == pytest.approx(drop)


def of_tokens(kl: float, share: float, half_width: float = 0.005) -> dict[str, Any]:
    return {
        "checked": True,
        "passes": True,
        "texts": 87,
        "positions": 4044,
        "kl": {"mean": kl, "p99": 10 * kl, "interval": [kl / 2, 2 * kl]},
        "agreement": {"share": share, "interval": [share - half_width, share + half_width]},
        "perplexity": {"served": 58.1, "fp32": 58.0},
        "limits": {"kl": 0.1, "top_1": 0.8},
    }


# Of the old receipt: of generation, of a reranker and of a classifier.
TOKENS = of_tokens(0.0004, 0.976)
RANKS: dict[str, Any] = {"checked": True, "texts": 96, "kendall": 0.987, "top_1": 1.0, "passes": True}
RANKS |= {"score_difference": {"mean": 0.0004, "max": 0.0021, "range": [-4.0, 4.0]}}
RANKS |= {"limits": {"kendall": 0.9, "score_difference": 0.1}}
LABELS: dict[str, Any] = {"checked": True, "texts": 96, "top_1": 0.99, "passes": True}
LABELS |= {"score_difference": {"mean": 0.001, "max": 0.02, "range": [0, 1]}}
LABELS |= {"limits": {"top_1": 0.8, "score_difference": 0.1}}


@pytest.mark.parametrize(
    ("old", "change", "worse"),
    [
        (TOKENS, of_tokens(0.0013, 0.966), {}),  # another implementation of bf16
        (TOKENS, of_tokens(0.0015, 0.976), {"kl": "rose by 0.0011, the limit is 0.001"}),
        (TOKENS, of_tokens(0.0004, 0.945), {"top_1": "dropped by 0.031, the limit is 0.024"}),
        (TOKENS, of_tokens(0.0004, 0.945, half_width=0.04), {}),  # within the noise of few positions
        (TOKENS, of_tokens(0.2, 0.976), {"kl": "above the plan's limit of 0.1"}),
        (TOKENS, of_tokens(0.0004, 0.79), {"top_1": "below the plan's limit of 0.8"}),
        (RANKS, {}, {}),
        (RANKS, {"kendall": 0.973}, {"kendall": "dropped by 0.014, the limit is 0.013"}),
        (RANKS | {"kendall": 0.95}, {"kendall": 0.929}, {"kendall": "dropped by 0.021, the limit is 0.02"}),
        (
            RANKS,
            {"score_difference": {"mean": 0.01, "max": 0.81, "range": [-4.0, 4.0]}},
            {"score_difference": "above the plan's limit of 0.8"},
        ),
        (LABELS, {}, {}),
        (LABELS, {"top_1": 0.95}, {"top_1": "dropped by 0.04, the limit is 0.01"}),
        (
            LABELS,
            {"score_difference": {"mean": 0.01, "max": 0.2, "range": [0, 1]}},
            {"score_difference": "above the plan's limit of 0.1"},
        ),
    ],
)
def test_outputs_of_other_tasks_that_are_further_from_fp32_are_a_regression(
    tmp_path: Path, old: dict[str, Any], change: dict[str, Any], worse: dict[str, str]
) -> None:
    before, after = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    before = changed(before, lambda data: data.update(quality=old))
    result = verdict(before, changed(after, lambda data: data.update(quality=old | change)))
    assert result["outcome"] == ("regression" if worse else "no regression")
    judged = rows(result)
    assert {name: row["reason"] for name, row in judged.items() if row["outcome"] == "regression"} == worse
    names = {"kl", "top_1", "kendall", "score_difference"} & judged.keys()
    assert len(names) == 2 and all(judged[name]["old"] is not None for name in names)


def test_memory_of_servers_that_stayed_up_is_one_figure_and_judged_by_its_limit(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY, memory=500), run_values(20, STEADY, memory=540))
    assert rows(verdict(old, new))["memory"]["interval"]
    for one in (old, new):
        changed(one, lambda data: data["configuration"].update(url="http://127.0.0.1:1"))
    old, new = (receipt.load(one.path) for one in (old, new))
    assert rows(verdict(old, new))["memory"].items() >= {"outcome": "no regression", "interval": None}.items()
    tight = {"memory": 0.07}
    assert rows(verdict(old, new, thresholds=tight))["memory"]["outcome"] == "regression"


def test_folders_are_matched_by_name_and_a_configuration_that_is_missing_in_new_is_invalid(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("bf16", "int8"):
        receipts_of(old, run_values(20, STEADY), run_values(20, STEADY), names=(name, "other"))
    (old / "receipts" / "other.json").unlink()
    receipts_of(new, run_values(20.1, STEADY), run_values(20, STEADY), names=("bf16", "fp16"))
    pairs, notes = comparable.pairs(old, new / "receipts")
    result = compare.compare(pairs, notes, compare.CompareOptions()).as_dict()
    assert [part["outcome"] for part in result["configurations"]] == ["no regression", "invalid"]
    assert result["exit_code"] == 5
    assert "int8 was not measured again" in result["configurations"][1]["reasons"][0]
    assert notes == ["fp16 is only in NEW and is not compared"]


def test_a_regression_is_more_severe_than_an_invalid_pair(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path / "a", run_values(20, STEADY), run_values(25, STEADY))
    gone, _ = receipts_of(tmp_path / "b", run_values(20, STEADY), run_values(20, STEADY))
    pairs = [comparable.ReceiptPair(old, new), comparable.ReceiptPair(gone, None)]
    result = compare.compare(pairs, [], compare.CompareOptions())
    assert (result.outcome, result.exit_code) == ("regression", 1)


def test_usage_errors_differ_from_invalid_receipts(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    for path in (old.path, old.path.parent):
        with pytest.raises(UsageError, match="same receipt"):
            compare.compare(*comparable.pairs(path, path), compare.CompareOptions())
    with pytest.raises(UsageError, match="does not exist"):
        comparable.pairs(old.path, tmp_path / "absent.json")
    with pytest.raises(UsageError, match="not two files or two folders"):
        comparable.pairs(old.path, tmp_path)
    new.path.write_text(new.path.read_text().replace("Test CPU", "Rest CPU"))
    with pytest.raises(InvalidRunError, match="altered"):
        comparable.pairs(old.path, new.path)


def shown(tmp_path: Path, *arguments: str) -> int:
    place = tmp_path / "receipts"
    return cli.run(["compare", str(place / "old.json"), str(place / "new.json"), *arguments])


def test_each_outcome_has_its_exit_code_and_each_format_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipts_of(tmp_path, run_values(20, STEADY), run_values(23, STEADY[::-1]))
    styles = {".md": "markdown", ".json": "json", ".xml": "junit", ".txt": "text"}
    files = [tmp_path / f"verdict{suffix}" for suffix in styles]
    assert shown(tmp_path, *(part for file in files for part in ("--output", str(file)))) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: regression: p50") and out.startswith("Regression: p50 +15.")
    assert max(len(line) for line in out.splitlines()) <= 80
    markdown, document, junit, text = (file.read_text() for file in files)
    assert [line.rstrip() for line in out.splitlines()] == text.splitlines()
    assert markdown.startswith("### Regression: p50 +15.")
    assert json.loads(document)["schema"] == "inferctl.compare/1"
    suite = ElementTree.fromstring(junit)[0]
    assert suite.attrib["failures"] == str(len(suite.findall("testcase/failure"))) == "4"
    for file in files:
        assert shown(tmp_path, "--format", styles[file.suffix]) == 1
        assert capsys.readouterr().out.split() == file.read_text().split()
    assert shown(tmp_path, "--threshold", "20") == 0
    assert shown(tmp_path, "--threshold", "20", "--threshold", "p50=5") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--threshold", "0"], ["--threshold", "p5=3"], ["--metric", "p95"], ["--allow", "schedule"], ["--format", "html"]],
)
def test_invalid_options_are_rejected(tmp_path: Path, arguments: list[str]) -> None:
    receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    assert shown(tmp_path, *arguments) == 2


def test_nothing_from_a_receipt_becomes_markup(tmp_path: Path) -> None:
    old, new = receipts_of(tmp_path, run_values(20, STEADY), run_values(20, STEADY))
    bad = "a|b <img src=x> [link](y)"
    new = changed(new, lambda data: data["validity"].update(valid=False, reasons=[bad]))
    page = comparison.markdown(compared(old, new))
    assert r"a\|b &lt;img src=x> \[link\](y)" in page


def test_comparing_needs_the_core_package_alone() -> None:
    """A CI step that only compares does not install numpy or the other packages that measuring needs."""
    code = (
        "import sys; from inferctl.bench.judge import comparable, compare; "
        "from inferctl.bench.report import comparison, junit\n"
        "sys.exit(bool({'numpy', 'locust', 'torch', 'plotly'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
