"""Complete benchmarks: real Locust and real child processes, with the answering server instead of `inferctl serve`."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_samples import FIELDS, SHORT, SHORT_PLAN, bench, collected, ran

from inferctl import cli
from inferctl.bench.judge import comparable
from inferctl.bench.load import child_server, process_usage, records, target
from inferctl.bench.measure import quality, runner
from inferctl.bench.measure.bench import Bench, Progress
from inferctl.bench.measure.outcome import BenchTarget
from inferctl.bench.plan import sections, workload
from inferctl.bench.report import html, terminal
from inferctl.bench.report.receipts import write_all
from inferctl.bench.report.rows import MeasuredRow
from inferctl.cli import bench_setup
from inferctl.core.errors import InferctlError, InvalidRunError
from inferctl.receipts import receipt
from tests.processes import inferctl

CHECKED = {"corpus": "short", "texts": 40}


def processes_in(folder: Path) -> list[int]:
    """Return the processes whose working folder is below `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
    return found


def test_runs_alternate_and_each_repeat_has_a_schedule_that_all_configurations_share(tmp_path: Path) -> None:
    seen: list[str] = []

    def notify(progress: Progress) -> None:
        if progress.number and (not seen or seen[-1] != f"{progress.name} {progress.number}"):
            seen.append(f"{progress.name} {progress.number}")

    load = {"mode": "open", "rate": 40, "duration_s": 1, "warmup_s": 0}
    work = bench(tmp_path, "fp32", "bf16", repeats=2, load=load)
    outcomes = ran(work, notify)
    write_all(work, outcomes)
    assert seen == ["fp32 1", "bf16 2", "bf16 3", "fp32 4"]
    fp32, bf16 = (receipt.load(tmp_path / "receipts" / f"{name}.json") for name in ("fp32", "bf16"))
    sent = [
        [run["workload"] for run in sorted(one.data["runs"], key=lambda run: run["repeat"])] for one in (fp32, bf16)
    ]
    assert sent[0] == sent[1]
    assert fp32.data["workload"]["sha256"] == bf16.data["workload"]["sha256"]
    assert len({one["sha256"] for one in sent[0]}) == len({one["seed"] for one in sent[0]}) == 2
    assert sent[0][0]["seed"] == work.plan.seed
    times = []
    for run in fp32.data["runs"]:
        rows = records.read(tmp_path / run["records"][0]["path"])
        assert list(rows.dtype.names or ()) == [name for name, _ in FIELDS]
        assert int((rows["phase"] == records.MEASURED).sum()) == run["summary"]["requests"]
        times.append((rows["intended_ns"] - rows["intended_ns"].min()).tolist())
    assert times[0] != times[1]
    # The runs are pooled into one receipt.
    summary = fp32.data["summary"]
    assert summary["runs"] == 2
    assert summary["latency_ms"]["n"] == sum(run["summary"]["latency_ms"]["n"] for run in fp32.data["runs"])
    pair = comparable.ReceiptPair(fp32, bf16)
    # A run of one second can be invalid on a busy machine.
    assert [reason for reason in comparable.invalid_because(pair, ["precision"]) if "differ" in reason] == []
    assert pair.interleaved
    serials = [run.serial for outcome in outcomes for run in outcome.measurements]
    assert len(set(serials)) == 4
    assert all(serial % 2 == 0 and 100_000 <= serial < 1_000_000 for serial in serials)
    for run in outcomes[0].measurements:
        assert json.loads((run.folder / "load.json").read_text())["serial"] == run.serial


def test_requests_that_a_server_rejects_are_counted_and_invalidate_a_closed_loop(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", options=("--slots", "1", "--queue", "1"), load=SHORT | {"users": 24})
    result_ = collected(work, ran(work))
    found = result_.as_dict()
    (row,) = found["rows"]
    assert not row["valid"]
    assert f"rejected {row['rejected']} of {row['requests']} requests" in row["reasons"][0]
    assert row["failed"] == 0
    assert row["rejected_percent"] == pytest.approx(100 * row["rejected"] / row["requests"], abs=1e-3)
    sealed = receipt.load(Path(row["receipt"])).data
    assert sealed["summary"]["rejected"] == row["rejected"] == sealed["summary"]["errors"]["HTTP status"]
    assert any("rejected" in caveat["text"] for caveat in found["caveats"])
    assert f"{row['rejected']} rejected, 0 failed" in html.render(result_, [receipt.load(Path(row["receipt"]))])


def test_a_configuration_that_cannot_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    work = bench(tmp_path, "int8", "bf16", options=("--refuse", "int8"))
    rows = {row.configuration: (row.outcome, row.reason) for row in collected(work, ran(work)).rows}
    assert rows == {"int8": ("not run", "int8 cannot run on this device"), "bf16": ("measured", None)}


def test_a_server_that_dies_in_mid_run_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", options=("--die-after", "20"))
    (outcome,) = ran(work)
    assert outcome.failure == "the server ended with exit code 9 during the run: out of memory"
    assert processes_in(tmp_path) == []


def test_an_engine_that_cannot_be_profiled_keeps_its_results(tmp_path: Path) -> None:
    said: list[str | None] = []
    work = replace(bench(tmp_path, "fp32", load=SHORT, model=tmp_path / "absent"), profile=True)
    (outcome,) = ran(work, lambda progress: said.append(progress.done))
    assert (outcome.failure, outcome.profile, len(outcome.measurements)) == (None, None, 1)
    assert any("no profile" in line for line in said if line)


@pytest.mark.parametrize(
    ("task", "broken", "reason"),
    [
        ("embed", "nan", "NaN or infinity"),
        ("embed", "zeros", "vectors of zeros"),
        ("embed", "shape", "of 31 dimensions; the reference has 32"),
        ("embed", "ragged", "of 31 dimensions; the reference has 32"),
        ("embed", "error", "returned 500"),
        ("rerank", "nan", "NaN or infinity"),
        ("rerank", "missing", "results for"),
        ("rerank", "unsorted", "are not sorted by score"),
        ("classify", "nan", "NaN"),
        ("classify", "missing", "scores of 2 labels"),
    ],
)
def test_a_server_with_broken_results_fails_on_quality(
    answering: Callable[..., str], weights: Callable[[str], tuple[Path, str]], task: str, broken: str, reason: str
) -> None:
    folder, digest = weights(task)
    served = target.connect(answering("--task", task, "--sha256", digest, "--broken", broken))
    found = quality.QualityChecker(sections.Quality(corpus="short", texts=40), folder)(served, lambda passed: None)
    assert (found.checked, found.passes) == (True, False)
    assert reason in (found.reason or "")


def test_the_results_of_a_server_with_broken_vectors_can_be_shown(
    tmp_path: Path, weights: Callable[[str], tuple[Path, str]]
) -> None:
    folder, digest = weights("embed")
    work = bench(tmp_path, "int8", options=("--sha256", digest, "--broken", "nan"), quality=CHECKED, model=folder)
    result_ = collected(work, ran(work))
    found = result_.as_dict()
    (row,) = found["rows"]
    assert (row["quality"]["checked"], row["quality"]["passes"]) == (True, False)
    assert found["finding"] == "No configuration passes the quality check, so none is recommended."
    assert f"int8 fails the quality check: {row['quality']['reason']}; it is not recommended." in found["findings"]
    (measured,) = result_.rows
    assert isinstance(measured, MeasuredRow)
    assert terminal.cells(measured)[-2:] == ["broken", "broken"]
    assert "<td>broken</td>" in html.render(result_, [receipt.load(Path(row["receipt"]))])


def test_the_same_weights_are_compared_once_for_each_input_limit(
    tmp_path: Path, weights: Callable[[str], tuple[Path, str]]
) -> None:
    folder, digest = weights("embed")
    work = bench(tmp_path, "fp32", options=("--sha256", digest), quality=CHECKED, model=folder)
    (outcome,) = ran(work)
    assert outcome.quality.passes
    assert outcome.quality.corpus_sha256 == workload.read_corpus("short")[1]
    asked: list[int | None] = []
    real = quality.reference

    def counted(model: Path, texts: list[str], longest: int | None, *rest: Any) -> object:
        asked.append(longest)
        return real(model, texts, longest, *rest)

    quality.reference = counted  # type: ignore[assignment]  # put back by the fixture
    checker = quality.QualityChecker(work.plan.quality, folder)
    for limit in (256, 512, 256):
        info = {"model": {"sha256": digest}, "limits": {"max_input_tokens": limit}}
        checker(target.ServerConnection("http://127.0.0.1:9", "m", info), lambda passed: None)
    assert asked == [256, 512]


def test_other_weights_are_not_compared(weights: Callable[[str], tuple[Path, str]]) -> None:
    checker = quality.QualityChecker(sections.Quality(corpus="short", texts=40), weights("embed")[0])
    served = target.ServerConnection("http://127.0.0.1:9", "m", {"model": {"sha256": "ab" * 32}})
    assert checker(served, lambda passed: None) == quality.unchecked(
        "the server's weights (abababababab…) are not those of the local folder: pass its model with `--model`"
    )


@pytest.mark.slow
def test_the_reference_cuts_inputs_where_the_server_does(minilm: Path) -> None:
    text = "one two three four five six seven eight nine ten"
    # With [CLS] and [SEP], the first six words are 8 tokens.
    heads = [" ".join(text.split()[:words]) for words in (5, 6)]
    whole, five, six = quality.reference(minilm, [text, *heads], 8, lambda passed: None).values
    assert np.allclose(whole, six, atol=1e-5)
    assert not np.allclose(five, six, atol=1e-3)
    with pytest.raises(InferctlError, match="invalid int value"):
        quality.reference(minilm, [text], 8.5, lambda passed: None)  # type: ignore[arg-type]


def test_what_was_measured_is_kept_after_each_run(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", "bf16", repeats=2)

    def stop(progress: Progress) -> None:
        if progress.number == 4 and progress.live:
            raise RuntimeError("a bug")

    outcomes = runner.outcomes(work)
    with pytest.raises(RuntimeError):
        runner.run(work, outcomes, stop, lambda outcome: write_all(work, [outcome]))
    assert processes_in(tmp_path) == []
    kept = {name: receipt.load(tmp_path / "receipts" / f"{name}.json").data for name in ("fp32", "bf16")}
    assert {name: data["summary"]["runs"] for name, data in kept.items()} == {"fp32": 1, "bf16": 2}
    assert kept["fp32"]["validity"]["cautions"][0] == (
        "interrupted after 1 of 2 runs: run the benchmark again for the others"
    )
    assert not any("interrupted" in caution for caution in kept["bf16"]["validity"]["cautions"])


def test_a_server_on_this_machine_is_not_counted_as_another_process(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    # Processes are sampled every 0.5 s, and late on a busy machine: two samples must lie in the measurement.
    work = bench(tmp_path, "fp32", load=SHORT | {"duration_s": 4})
    work = Bench(work.plan, [BenchTarget("here", url=answering("--median-ms", "1"))], None, None, tmp_path)
    found = collected(work, ran(work))
    path = Path(found.rows[0].receipt or "")
    data = receipt.load(path).data
    assert data["resources"]["server_cores"] > 0
    assert data["resources"]["server_peak_bytes"] > 1e6
    assert data["configuration"]["this_machine"]
    assert any("share the cores of this machine" in note.text for note in html.limitations(found, [receipt.load(path)]))


def test_a_local_server_whose_process_is_not_known_is_not_blamed_on_others(
    answering: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_usage, "listener", lambda port: None)
    work = bench(tmp_path, "fp32")
    work = Bench(work.plan, [BenchTarget("here", url=answering("--median-ms", "1"))], None, None, tmp_path)
    (outcome,) = ran(work)
    assert "other_cores" not in outcome.measurements[0].resources
    assert "client_cpu_percent" in outcome.measurements[0].resources


ONE = "--url a=http://127.0.0.1:9"


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return inferctl("bench", *arguments, cwd=folder, timeout=None)


def test_a_run_of_failures_ends_with_5_and_still_leaves_receipts(answering: Callable[..., str], tmp_path: Path) -> None:
    url = answering("--median-ms", "5", "--fail-after", "1")
    done = command("--url", f"mine={url}", "--plan", SHORT_PLAN, folder=tmp_path)
    assert done.returncode == InvalidRunError.exit_code
    assert "error: the run is invalid" in done.stderr
    assert "INVALID mine:" in done.stdout
    (written,) = tmp_path.glob("bench-results/*/receipts/mine.json")
    assert not receipt.load(written).valid


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("--url a=http://x --url a=http://y", "two servers or configurations have the name 'a'", "a name of its own"),
        ("--model nowhere --plan quick", "model folder nowhere not found", "check the path"),
        (f"--url {'a' * 41}=http://127.0.0.1:9", "has 41 characters", "a shorter name"),
        (f"{ONE} --users 0", "load.users cannot be 0", "--help"),
        (f"{ONE} --search", "a search requires an SLO", "--slo 100"),
        (f"{ONE} --corpus shrt", "corpus 'shrt' not found", "did you mean short"),
        (f"{ONE} --batch-tokens 4096", "cannot change the running servers", "--precision"),
        (f"{ONE} --search --slo 9 --repeats 2", "remove repeats", "--help"),
        (f"{ONE} --search --slo 9 --budget 20", "too short for a search", ""),
        (f"{ONE} --budget 5m", "`--budget` requires a search", ""),
        (f"{ONE} --rate 9 --budget 5m", "`--budget` requires a search", ""),
        ("--header X-Team:search", "apply only to the servers of `--url`", "--url NAME=URL"),
    ],
)
def test_mistakes_end_before_anything_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["bench", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert hint in err.split("hint: ")[1]
    assert out == ""
    assert not (tmp_path / "bench-results").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_interrupted_keeps_what_it_has_and_leaves_no_process(
    answering: Callable[..., str], tmp_path: Path, sent: signal.Signals
) -> None:
    url = answering("--median-ms", "5")
    line = [sys.executable, "-m", "inferctl", "bench", "--url", f"first={url}", "--url", f"second={url}"]
    line += ["--plan", SHORT_PLAN, "--duration", "2"]
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line_of_progress in process.stderr:
        if "[2/2]" in line_of_progress:
            break
    process.send_signal(sent)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert processes_in(tmp_path / "bench-results") == []
    (folder,) = (tmp_path / "bench-results").iterdir()
    assert [file.name for file in (folder / "receipts").iterdir()] == ["first.json"]
    assert receipt.load(folder / "receipts" / "first.json").data["summary"]["runs"] == 1
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert [(row["configuration"], row["outcome"], row["reason"]) for row in rows] == [
        ("first", "measured", None),
        ("second", "not run", "interrupted after 0 of 1 run"),
    ]
    assert (folder / "report.html").is_file()
    assert "second" in shown


def test_a_second_interrupt_while_a_server_stops_still_ends_its_whole_group() -> None:
    class Impatient(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    with Impatient([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(KeyboardInterrupt):
                child_server.stop(process)
            assert process.poll() == -signal.SIGKILL
        finally:
            process.kill()


def test_two_benches_in_the_same_second_have_two_folders(tmp_path: Path) -> None:
    places = [bench_setup.create_folder(tmp_path, "quick") for _ in range(3)]
    assert len(set(places)) == 3
    assert all(place.is_dir() for place in places)


def test_users_of_an_open_loop_are_said_to_change_nothing(answering: Callable[..., str], tmp_path: Path) -> None:
    line = ["--url", f"mine={answering('--median-ms', '2')}", "--plan", SHORT_PLAN]
    done = command(*line, "--rate", "50", "--users", "4", folder=tmp_path)
    assert "`--users 4` has no effect: this load is an open loop with 50 requests/s" in done.stderr
    assert "late and 0 dropped of" in " ".join(done.stdout.split())


def test_a_running_server_is_measured_without_the_specs_weights_but_not_past_a_broken_spec(
    answering: Callable[..., str], tmp_path: Path
) -> None:
    url = answering("--median-ms", "5")
    spec = tmp_path / "inferctl.yaml"
    spec.write_text("name: m\nmodel: {source: org/absent}\nhardware: [cpu, t4]\n")
    done = command("--url", f"mine={url}", "--plan", SHORT_PLAN, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["configuration"], row["outcome"]) for row in rows] == [
        ("mine", "measured"),
        ("t4", "not measured here"),
    ]
    unchecked = {"checked": False, "reason": "no local model folder to compare with: pass `--model DIR`"}
    assert rows[0]["quality"] == unchecked
    assert "receipts:" in done.stderr
    spec.write_text("nam: m\n")
    assert command("--url", f"mine={url}", folder=tmp_path).returncode == 2


def test_a_folder_that_cannot_be_made_is_named(
    answering: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert cli.run(["bench", "--url", f"mine={answering()}", "--output", "taken"]) == 3
    told = capsys.readouterr().err
    assert "taken" in told and "--output" in told


def test_a_report_that_cannot_be_written_does_not_hide_the_results(
    answering: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the report exists when the benchmark starts, and is a file when the report is written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "reports"
    folder.mkdir()

    def lose() -> None:
        while not (tmp_path / "bench-results").exists():
            time.sleep(0.01)
        folder.rmdir()
        folder.touch()

    losing = threading.Thread(target=lose, daemon=True)
    losing.start()
    command = ["bench", "--url", f"a={answering('--median-ms', '2')}", "--plan", SHORT_PLAN]
    code = cli.run([*command, "--report", "reports/r.html"])
    losing.join(10)
    out, err = capsys.readouterr()
    assert code == 3, err
    assert "reports/r.html cannot be written: " in err
    assert "requests/s" in out or "req/s" in out
    assert list(tmp_path.glob("bench-results/*/result.json"))
