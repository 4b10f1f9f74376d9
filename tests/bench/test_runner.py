"""Whole benches: real Locust, real child processes, the answering server in the place of `inferctl serve`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_samples import ANSWERING, FIELDS

from inferctl.bench import environment, plan, quality, receipt, records, result, runner
from inferctl.errors import InvalidRunError

SHORT = {"mode": "closed", "users": 2, "duration_s": 1, "warmup_s": 0, "timeout_s": 5}


def bench(
    folder: Path,
    *names: str,
    repeats: int = 1,
    options: Sequence[str] = (),
    check_quality: bool = False,
    model: Path | None = None,
) -> runner.Bench:
    wanted = plan.Plan.model_validate(
        {
            "name": "test",
            "configurations": [{"name": name, "precision": name} for name in names],
            "load": SHORT,
            "corpus": "short",
            "repeats": repeats,
            "quality": {"corpus": "short", "texts": 40} if check_quality else None,
        }
    )

    def command(precision: str, announce: Path) -> list[str]:
        return [
            sys.executable,
            str(ANSWERING),
            "--announce",
            str(announce),
            "--precision",
            precision,
            "--median-ms",
            "5",
            *options,
        ]

    return runner.Bench(wanted, [runner.Subject(name, name) for name in names], command, model, folder)


def ran(
    work: runner.Bench,
    notify: runner.Notify = lambda progress: None,
    kept: Callable[[runner.Outcome], object] = lambda outcome: None,
) -> list[runner.Outcome]:
    outcomes = runner.outcomes(work)
    runner.run(work, outcomes, notify, kept)
    return outcomes


def processes_in(folder: Path) -> list[int]:
    """Processes whose working folder is below `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def context_of(work: runner.Bench) -> result.Context:
    return result.Context(work.plan, environment.detect(), "test", [], None, work.output)


def document(work: runner.Bench, outcomes: list[runner.Outcome]) -> dict[str, Any]:
    context = context_of(work)
    return result.document(context, outcomes, result.receipts(context, outcomes), work.output / "report.html")


def test_runs_alternate_and_are_pooled_into_one_receipt_a_configuration(tmp_path: Path) -> None:
    seen: list[str] = []

    def notify(progress: runner.Progress) -> None:
        if progress.number and (not seen or seen[-1] != f"{progress.name} {progress.number}"):
            seen.append(f"{progress.name} {progress.number}")

    work = bench(tmp_path, "fp32", "bf16", repeats=2)
    document(work, ran(work, notify))
    assert seen == ["fp32 1", "bf16 2", "bf16 3", "fp32 4"]
    sealed = receipt.load(tmp_path / "receipts" / "bf16.json").data
    assert sealed["summary"]["runs"] == 2
    assert sealed["summary"]["latency_ms"]["n"] == sum(run["summary"]["latency_ms"]["n"] for run in sealed["runs"])
    for run in sealed["runs"]:
        rows = records.read(tmp_path / run["records"][0]["path"])
        assert int((rows["phase"] == records.MEASURED).sum()) == run["summary"]["requests"]
    assert sealed["workload"]["sha256"] == receipt.load(tmp_path / "receipts" / "fp32.json").data["workload"]["sha256"]
    assert list(rows.dtype.names or ()) == [name for name, _ in FIELDS]


def test_a_configuration_that_cannot_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    work = bench(tmp_path, "int8", "bf16", options=("--refuse", "int8"))
    found = document(work, ran(work))
    rows = {row["configuration"]: row for row in found["rows"]}
    assert rows["int8"]["outcome"] == "not run"
    assert rows["int8"]["reason"] == "int8 cannot run on this device"
    assert rows["bf16"]["outcome"] == "measured"


def test_a_server_that_dies_in_mid_run_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", options=("--die-after", "20"))
    (outcome,) = ran(work)
    assert outcome.failure == "the server ended with exit code 9 during the run: out of memory"
    assert processes_in(tmp_path) == []


def test_nothing_is_left_running_after_an_interrupt(tmp_path: Path) -> None:
    def interrupt(progress: runner.Progress) -> None:
        if progress.live and progress.live.phase == "measure":
            assert len(processes_in(tmp_path)) >= 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(bench(tmp_path, "fp32"), interrupt)
    assert processes_in(tmp_path) == []


def test_quality_is_not_checked_without_the_weights(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", check_quality=True)
    (outcome,) = ran(work)
    assert outcome.quality == quality.unchecked("no local model folder was given to compare with")


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "inferctl", "bench", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def test_the_command_measures_a_running_server_and_prints_one_document(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    url = answering("--median-ms", "5")
    done = command("--url", f"mine={url}", "--plan", "quick", "--duration", "1", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["configuration"], row["outcome"], row["valid"]) == ("mine", "measured", True)
    assert row["quality"] == {"checked": False, "reason": "no local model folder was given to compare with"}
    assert receipt.load(Path(row["receipt"])).data["hardware"]["key"] == "cpu"
    assert Path(found["report"]).is_file()
    assert json.loads((Path(found["output"]) / "result.json").read_text()) == found
    assert "receipts:" in done.stderr


def test_a_run_of_failures_ends_with_5_and_still_leaves_receipts(answering: Callable[..., str], tmp_path: Path) -> None:
    url = answering("--median-ms", "5", "--fail-after", "1")
    done = command("--url", f"mine={url}", "--plan", "quick", "--duration", "1", folder=tmp_path)
    assert done.returncode == InvalidRunError.exit_code
    assert "error: the run is invalid" in done.stderr
    assert "INVALID mine:" in done.stdout
    (written,) = tmp_path.glob("bench-results/*/receipts/mine.json")
    assert not receipt.load(written).valid


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["--url", "nonsense"], 2, "--url 'nonsense' is not NAME=URL", "t4=http://10.0.0.7:8080"),
        (["--url", "a=http://127.0.0.1:9"], 3, "nothing answers at http://127.0.0.1:9", "start the server first"),
        (["--url", "a=http://127.0.0.1:9", "--plan", "quik"], 2, "'quik'", "did you mean quick"),
        (["--url", "a=http://x", "--url", "a=http://y"], 2, "the name 'a' is used twice", "its own name"),
        (["--model", "nowhere", "--plan", "quick"], 2, "there is no model folder nowhere", "check the path"),
        (["--url", "a=http://127.0.0.1:9", "--users", "0"], 2, "load.users cannot be 0", "--help"),
    ],
)
def test_mistakes_end_before_anything_is_started(
    tmp_path: Path, arguments: list[str], code: int, message: str, hint: str
) -> None:
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert hint in done.stderr.split("hint: ")[1]
    assert done.stdout == ""
    assert not (tmp_path / "bench-results").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_interrupted_leaves_no_process(
    answering: Callable[..., str], tmp_path: Path, sent: signal.Signals
) -> None:
    url = answering("--median-ms", "5")
    line = [sys.executable, "-m", "inferctl", "bench", "--url", f"mine={url}", "--plan", "quick", "--duration", "60"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for told in process.stderr:
        if "warm-up" in told or "measure" in told:
            break
    time.sleep(1)
    process.send_signal(sent)
    assert process.wait(20) == 130
    process.stderr.close()
    assert processes_in(tmp_path / "bench-results") == []


@pytest.mark.slow
def test_the_real_server_is_measured_and_its_vectors_are_close_to_fp32(minilm: Path, tmp_path: Path) -> None:
    line = ["--model", str(minilm), "--plan", "quick", "-p", "bf16", "--duration", "4", "--json"]
    done = command(*line, folder=tmp_path)
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert row["outcome"] == "measured", row["reason"]
    assert done.returncode == (0 if row["valid"] else 5)
    assert row["precision"]["effective"] == "bf16"
    assert row["cosine_mean"] > 0.999
    assert row["recall_at_10"] > 0.95
    assert row["tokens_per_s"] > row["requests_per_s"]
    assert row["server_peak_bytes"] > 50e6


def test_a_running_server_is_measured_without_the_specs_weights_but_not_past_a_broken_spec(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    url = answering("--median-ms", "5")
    spec = tmp_path / "inferctl.yaml"
    spec.write_text("name: m\nmodel: {source: org/absent}\nhardware: [cpu, t4]\n")
    done = command("--url", f"mine={url}", "--plan", "quick", "--duration", "1", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["configuration"], row["outcome"]) for row in rows] == [
        ("mine", "measured"),
        ("t4", "not measured here"),
    ]
    spec.write_text("nam: m\n")
    assert command("--url", f"mine={url}", folder=tmp_path).returncode == 2


def test_a_folder_that_cannot_be_made_is_named(answering: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = command("--url", f"mine={answering()}", "--output", "taken", folder=tmp_path)
    assert done.returncode == 3
    assert "taken" in done.stderr
    assert "--output" in done.stderr
