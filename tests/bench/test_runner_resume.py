"""Resume an interrupted benchmark: real SIGKILLs and real child processes."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answering import vector
from bench_samples import ANSWERING, SHORT, bench

from inferctl import cli
from inferctl.bench.load import records
from inferctl.bench.measure import environment, quality, resume, runner
from inferctl.bench.measure.bench import Bench, Progress
from inferctl.bench.measure.outcome import Outcome
from inferctl.bench.plan import sections
from inferctl.core.errors import InferctlError, NotReadyError, UsageError
from inferctl.models import model as models
from inferctl.receipts import receipt


def resumed(work: Bench) -> tuple[int, list[Outcome]]:
    outcomes = runner.outcomes(work)
    done = resume.restore(work.output, work.order, outcomes)
    runner.run(work, outcomes, lambda progress: None, lambda outcome: None)
    return done, outcomes


def bench_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "inferctl", "bench", *arguments]


PLAN = f"""name: mine
configurations: [{{name: a, precision: fp32}}]
load: {json.dumps(SHORT)}
corpus: short
quality: null
repeats: 2
"""


@pytest.fixture
def killed(answering: Callable[..., str], tmp_path: Path) -> Path:
    """The folder of a benchmark of two servers and two repeats, killed by SIGKILL during its third run."""
    (tmp_path / "mine.yaml").write_text(PLAN)
    url = answering("--median-ms", "5")
    line = bench_command("--plan", "mine.yaml", "--url", f"one={url}", "--url", f"two={url}")
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for told in process.stderr:
        if "[3/4] two · measure" in told:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    (folder,) = (tmp_path / "bench-results").iterdir()
    return folder


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Try to resume, and return the error."""
    assert cli.run(["bench", "--resume", str(folder)]) == 2
    return capsys.readouterr().err


def refuse_what_changed(killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(PLAN.replace("repeats: 2", "repeats: 3"))
    assert "the plan file changed" in refused(killed, capsys)
    (tmp_path / "mine.yaml").write_text(PLAN)
    original = (killed / "bench.json").read_text()
    manifest = json.loads(original)
    manifest["identity"]["code"]["sha256"] = "0" * 64
    (killed / "bench.json").write_text(json.dumps(manifest))
    assert "was changed after the benchmark started" in refused(killed, capsys)
    manifest["seal"] = receipt.seal_of(manifest)
    (killed / "bench.json").write_text(json.dumps(manifest))
    told = refused(killed, capsys)
    assert "the code of inferctl changed (sha256: 000000000000… -> " in told
    assert "start a new bench" in told
    (killed / "bench.json").write_text(original)


def test_after_a_sigkill_no_run_is_lost_and_none_made_twice(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What changed meanwhile is named and refused."""
    complete = {file.parent.name: file.read_bytes() for file in killed.glob("runs/*/run.json")}
    assert set(complete) == {"one-1", "two-1"}
    monkeypatch.chdir(tmp_path)
    refuse_what_changed(killed, tmp_path, capsys)
    assert (killed / "runs" / "two-2").is_dir()
    done = subprocess.run(
        bench_command("--resume", str(killed), "--json"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    code, shown, told = done.returncode, done.stdout, done.stderr
    assert code == 0, told
    assert "2 of 4 runs are complete, 2 remain" in told
    measured = [line.split(" · ")[0] for line in told.splitlines() if "· measure ·" in line]
    assert measured == ["[3/4] two", "[4/4] one"]
    assert sorted(entry.name for entry in (killed / "runs").iterdir()) == ["one-1", "one-2", "two-1", "two-2"]
    for name, content in complete.items():
        assert (killed / "runs" / name / "run.json").read_bytes() == content
    for name in ("one", "two"):
        sealed = receipt.load(killed / "receipts" / f"{name}.json").data
        assert sorted(run["repeat"] for run in sealed["runs"]) == [0, 1]
        assert len({run["serial"] for run in sealed["runs"]}) == 2
        for run in sealed["runs"]:
            rows = records.read(killed / run["records"][0]["path"])
            assert int((rows["phase"] == records.MEASURED).sum()) == run["summary"]["requests"]
        assert sealed["summary"]["requests"] == sum(run["summary"]["requests"] for run in sealed["runs"])
    assert [row["outcome"] for row in json.loads(shown)["rows"]] == ["measured", "measured"]


def test_everything_that_figures_depend_on_is_compared(tmp_path: Path) -> None:
    work, machine = bench(tmp_path, "fp32"), environment.detect()

    def identity(**changes: Any) -> dict[str, Any]:
        given = {"model": "aa", "spec": "bb", "servers": {"x": ["cc", "bf16"]}, "plan": work.plan, **changes}
        given = {"checkpoints": {"int8": "ff"}, "machine": machine, **given}
        digests = (given["model"], given["checkpoints"], given["spec"])
        return resume.identity(given["plan"], work.targets, given["machine"], *digests, given["servers"], None)

    def other(**changes: Any) -> environment.Environment:
        return dataclasses.replace(machine, **changes)

    then = json.loads(json.dumps(identity()))
    resume.check_unchanged(then, identity(), tmp_path)
    for change, said in (
        ({"model": "dd"}, "the weights of the model changed (aa -> dd)"),
        ({"checkpoints": {"int8": "gg"}}, "a checkpoint changed (int8: ff -> gg)"),
        ({"spec": "ee"}, "the settings changed"),
        ({"servers": {"x": ["cc", "fp32"]}}, "the weights or the precision of a server changed"),
        ({"plan": work.plan.with_overrides(repeats=2)}, "the plan changed (repeats: 1 -> 2)"),
        ({"machine": other(versions={**machine.versions, "locust": "0.1"})}, "-> 0.1)"),
        ({"machine": other(variables={"OMP_NUM_THREADS": "1"})}, "software changed (OMP_NUM_THREADS: null -> 1)"),
        ({"machine": other(kernel="Linux 0.1")}, "-> Linux 0.1)"),
        ({"machine": other(gpus=(environment.Gpu("T4", "t4", 1, "570.1"),))}, 'driver: [] -> ["570.1"])'),
    ):
        with pytest.raises(UsageError) as caught:
            resume.check_unchanged(then, identity(**change), tmp_path)
        assert said in caught.value.message


def test_a_run_whose_records_are_not_whole_is_made_again(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", "bf16")
    _, first = resumed(work)
    done, again = resumed(work)
    assert done == 2
    assert [one.measurements[0].serial for one in again] == [one.measurements[0].serial for one in first]
    rows = [one[0].measurements[0].records.rows.tobytes() for one in (first, again)]
    assert rows[0] == rows[1]
    broken = tmp_path / "runs" / "bf16-1" / "requests-0.bin"
    broken.write_bytes(broken.read_bytes()[:-60])
    done, again = resumed(work)
    assert done == 1
    assert again[0].measurements[0].serial == first[0].measurements[0].serial
    assert again[1].measurements[0].serial != first[1].measurements[0].serial


def test_a_run_whose_quality_check_was_cut_short_is_kept_and_the_check_made_up(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32", repeats=2)
    work = dataclasses.replace(work, plan=work.plan.model_copy(update={"quality": sections.Quality.model_validate({})}))
    found = quality.unchecked("no local model folder to compare with: pass `--model DIR`")

    def interrupt(progress: Progress) -> None:
        if progress.phase == "checking quality":
            raise KeyboardInterrupt

    (first,) = runner.outcomes(work)
    with pytest.raises(KeyboardInterrupt):
        runner.run(work, [first], interrupt, lambda outcome: None)
    assert len(first.measurements) == 1
    log = tmp_path / "runs" / "fp32-1" / "quality" / "server.log"
    for complete in (1, 2):
        done, (again,) = resumed(work)
        assert done == complete
        assert again.quality == found
        assert [one.run.repeat for one in again.measurements] == [0, 1]
        assert again.measurements[0].serial == first.measurements[0].serial
        assert log.is_file() is (complete == 1)
        log.unlink(missing_ok=True)


def test_a_reference_that_could_not_be_computed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    digest = models.ModelFolder(weights).digest
    work = bench(tmp_path, "fp32", options=("--sha256", digest))
    checked = sections.Quality.model_validate({"corpus": "short", "texts": 40})
    work = dataclasses.replace(work, plan=work.plan.model_copy(update={"quality": checked}), model=weights)
    _, (first,) = resumed(work)  # there are no weights to compute from
    assert "the computation of the fp32 reference failed" in (first.quality.reason or "")
    assert json.loads((tmp_path / "runs" / "fp32-1" / "run.json").read_text())["quality"] is None

    def reference(_: Path, texts: list[str], *rest: Any) -> quality.Reference:
        return quality.Reference(texts, np.array([vector(text, 0) for text in texts], np.float32), digest)

    monkeypatch.setattr(quality, "reference", reference)
    for _ in range(2):
        done, (again,) = resumed(work)
        assert done == 1
        assert again.quality.passes
        assert again.measurements[0].serial == first.measurements[0].serial
        monkeypatch.setattr(quality, "reference", None)  # the check is complete and is not repeated


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    work = bench(tmp_path, "fp32")
    absent = Bench(work.plan, work.targets, lambda *_: ["false"], None, tmp_path)
    _, outcomes = resumed(absent)
    assert outcomes[0].failure
    _, outcomes = resumed(work)
    assert outcomes[0].failure is None
    assert len(outcomes[0].measurements) == 1


def test_only_one_bench_at_a_time_has_a_folder(tmp_path: Path) -> None:
    with resume.lock(tmp_path), pytest.raises(NotReadyError, match="another benchmark runs in"), resume.lock(tmp_path):
        pass
    with resume.lock(tmp_path):
        pass


def test_the_reference_that_a_killed_bench_was_computing_is_ended(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    work = bench(tmp_path, "fp32")
    ended: list[int] = []

    def waiting(passed: float) -> None:
        for _ in range(500):  # the command line of a process appears shortly after its start
            if found := resume.orphaned_processes(tmp_path):
                ended.extend(found)
                break
            time.sleep(0.01)
        resume.restore(tmp_path, work.order, runner.outcomes(work))

    # The killed process writes no message. Otherwise its message is that the model does not exist.
    with pytest.raises(InferctlError, match="computation of the fp32 reference failed: no message"):
        quality.reference(tmp_path / "model", ["a text"], None, waiting, tmp_path / "runs")
    assert len(ended) == 1


def test_servers_that_a_killed_bench_left_are_ended(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "fp32-1"
    place.mkdir(parents=True)
    announce = place / "announce.json"
    line = [sys.executable, str(ANSWERING), "--announce", str(announce)]
    server = subprocess.Popen(line, cwd=place, start_new_session=True)
    shell = subprocess.Popen(["sleep", "60"], cwd=place, start_new_session=True)
    try:
        while not announce.is_file():
            assert server.poll() is None
            time.sleep(0.02)
        assert resume.orphaned_processes(tmp_path) == [server.pid]
        work = bench(tmp_path, "fp32")
        assert resume.restore(tmp_path, work.order, runner.outcomes(work)) == 0
        assert server.wait(10) == -signal.SIGKILL
        assert shell.poll() is None
        assert not place.exists()
    finally:
        for process in (server, shell):
            process.kill()
            process.wait()
