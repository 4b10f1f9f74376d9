"""`make gpu-check` itself: the real script on CPUs, and faults that it must find."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import python

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks" / "gpu_check"
FAULTS = Path(__file__).with_name("faults")


def run(output: Path, *options: str, fault: str = "") -> tuple[int, str, dict[str, Any]]:
    """Run the check with the stand-in. Return its exit code, what it printed, and its JSON."""
    environment = {**os.environ, "PYTHONPATH": str(FAULTS), "GPU_CHECK_TEST_FAULT": fault}
    ran = python(SCRIPT, "--stand-in", "--short", "--output", output, *options, env=environment, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, ran.stdout, json.loads((output / "gpu-check-stand-in.json").read_text())


def run_code(folder: Path, code: str) -> list[dict[str, Any]]:
    """Run `code` in a process with the modules of the check and a `step`, and return what the step recorded."""
    start = "import sys, time; from pathlib import Path; import results\n"
    start += "step = results.Step(Path(sys.argv[1]), time.time() + 90)\n"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{SCRIPT}:{ROOT}"}
    file = folder / "step.json"
    python("-c", start + code, file, env=environment, cwd=folder, timeout=90, code=0)
    found: list[dict[str, Any]] = json.loads(file.read_text())["checks"]
    return found


def failed(document: dict[str, Any]) -> list[str]:
    return [c["name"] for step in document["steps"] for c in step["checks"] if c["outcome"] == "failed"]


@pytest.mark.slow
def test_every_step_runs_on_a_stand_in_and_says_so(tmp_path: Path) -> None:
    code, printed, document = run(tmp_path, "--steps", "1,2,3,4", "--minutes", "20")
    assert (code, failed(document)) == (0, []), printed
    assert [step["step"] for step in document["steps"]] == [1, 2, 3, 4]
    outcomes = [[check["outcome"] for check in step["checks"]] for step in document["steps"]]
    assert all("passed" in found for found in outcomes)
    assert document["stand_in"]
    assert all(line.startswith(("[stand-in", "  ")) for line in printed.splitlines() if "step " in line and ":" in line)
    assert "no figure and no check is of a GPU" in printed
    assert f"torch: {version('torch')} (machine). The images ship" in printed
    checks = [check for step in document["steps"] for check in step["checks"]]
    names = {check["name"]: check["detail"] for check in checks}
    assert {f"attention of {head} in bf16" for head in ("SPLADE", "soft cap", "static embeddings")} <= names.keys()
    assert names["kernels of minilm, packed"].startswith("flash")


PARTS = """
import runpy
kept = runpy.run_path({main!r}, run_name="x")["_kept"]
def work(step, part, good):
    step.check(part + " ran" + str(time.time()), good)
def run(name, earlier, good):
    entry = {{"step": 2, "gpu": name}}
    step = results.Step(Path("running.json"), time.time() + 90, entry | {{"checks": kept(earlier, entry)}})
    for part in ("a", "b"):
        step.part(part, 0, work, part, good or part == "a")
    return json.loads(Path("running.json").read_text())
first = run("x", [], False)
for name in ("x", "y"):
    for before, after in zip(first["checks"], run(name, [first], True)["checks"]):
        step.check(name + " " + before["part"], before["name"] == after["name"])
"""


def test_a_resumed_step_skips_the_parts_that_passed_on_the_same_gpu(tmp_path: Path) -> None:
    found = run_code(tmp_path, "import json\n" + PARTS.format(main=str(SCRIPT / "__main__.py")))
    assert [check["name"] for check in found if check["outcome"] == "passed"] == ["x a"]


def nightly(fault: str, step: str, found: list[str]) -> Any:
    return pytest.param(fault, step, found, marks=pytest.mark.slow_measurement)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "found"),
    [
        ("wrong", "2", ["logits of cross-encoder in bf16", "vectors of qwen3 in bf16"]),
        nightly("padded", "2", ["attention of cross-encoder in bf16"]),
        nightly("growing", "3", ["memory of minilm, packed"]),
        nightly("math", "3", ["kernels of minilm, packed", "kernels of minilm, padded"]),
        nightly("slow", "3", ["tail of minilm, packed"]),
        nightly("dead", "4", ["a GPU by its UUID"]),
    ],
)
def test_a_fault_is_found(tmp_path: Path, fault: str, step: str, found: list[str]) -> None:
    code, printed, document = run(tmp_path, "--steps", step, "--minutes", "10", fault=fault)
    assert code == 1
    for check in found:
        assert check in failed(document), printed
        assert f"failed   {check}" in printed


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_and_a_later_run_adds_to_the_results(tmp_path: Path) -> None:
    code, printed, document = run(tmp_path, "--steps", "1,6", "--minutes", "1", fault="hanging")
    assert code == 1
    assert "was ended after" in printed
    assert [step["step"] for step in document["steps"]] == [1, 6]
    assert failed(document) == ["the step itself"]
    assert {step["gpu"] for step in document["steps"]} == {"stand-in"}
    assert (tmp_path / "gpu-check-machine-1.log").is_file()
    code, _, document = run(tmp_path, "--steps", "6", "--minutes", "1")
    assert [step["step"] for step in document["steps"]] == [1, 6, 6]


@pytest.mark.parametrize(
    ("number", "numbers", "later", "left", "limit"),
    [
        (2, [1, 2, 3, 4, 5, 6], 0, 260, 50),
        (2, [1, 2, 3, 4, 5, 6], 1, 400, 50),  # the other stack gets its part of the time
        (4, [1, 2, 3, 4], 0, 100, 100),
        (1, [1, 2, 3, 4], 0, 140, 17.5),
        (1, [1, 2, 3, 4], 0, 14, None),  # a step of seconds would only fail
        (1, [1, 2, 3, 4], 0, -1, None),
    ],
)
def test_the_time_of_a_step(
    number: int, numbers: list[int], later: int, left: float, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT)
    of = runpy.run_path(str(SCRIPT / "__main__.py"), run_name="x")["_limit"]
    assert of(number, [1, 2, 3, 4, 5, 6], numbers, later, left) == (limit and pytest.approx(limit))


def test_a_step_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"  # of a server of a benchmark, which has a session of its own
    code = f"import subprocess, sys, time; sys.path.insert(0, {str(SCRIPT)!r}); import results\ndef work(*_):\n"
    code += "    server = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    code += f"    open({str(pid)!r}, 'w').write(str(server.pid)); time.sleep(60)\nresults.run(work)"
    (tmp_path / "step.json").write_text("{}")
    settings = json.dumps({"file": str(tmp_path / "step.json"), "end": time.time() + 60})
    command = [sys.executable, "-c", code, settings]
    # A parent that starts the step as `__main__.py` does, waits until it runs, and is killed.
    parent = "import os, subprocess, sys, time; p = subprocess.Popen(sys.argv[2:], start_new_session=True); "
    parent += (
        "print(p.pid, flush=True)\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\nos.kill(os.getpid(), 9)"
    )
    ran = python("-c", parent, pid, *command, timeout=60)
    assert ended(int(ran.stdout)), "the step still runs"
    assert ended(int(pid.read_text())), "its server still runs"


# Ignores SIGINT, as a process in the background of a script does, and has a server in a session of its own.
BENCH = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
server = subprocess.Popen(["sleep", "60"], start_new_session=True)
open("pid", "w").write(str(server.pid))
try:
    signal.signal(signal.SIGTERM, {handler})
    time.sleep(60)
finally:
    server.kill()
    print("measured so far", flush=True)
"""


@pytest.mark.parametrize(
    ("handler", "printed"), [("lambda *_: sys.exit(130)", "measured so far\n"), ("signal.SIG_IGN", "")]
)
def test_a_benchmark_ends_with_its_server(tmp_path: Path, handler: str, printed: str) -> None:
    (tmp_path / "bench.py").write_text(BENCH.format(handler=handler))
    code = "import figures; figures.END_S = 3\n"
    code += "result = figures._ended([sys.executable, 'bench.py'], Path(), 2)\nstep.figure('x', result[1])"
    assert run_code(tmp_path, code)[0]["detail"] == printed
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int) -> bool:
    """Return whether a process ends within ten seconds."""
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1][:3]:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def stacks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check_stacks", SCRIPT / "stacks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheels_are_those_of_pyproject_without_torch(stacks: ModuleType) -> None:
    names = {stacks.name_of(each) for each in stacks.requirements()}
    assert {"pydantic", "typer", "uvicorn", "transformers", "locust", "nvidia-ml-py", "nanotoken"} <= names
    assert not {"torch", "bitsandbytes"} & names


def test_what_travels_has_one_limit(stacks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    (tmp_path / "code.py").write_bytes(bytes(200_000))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("/wheels/")
    wheels.mkdir()
    for package, size in {"numpy": 300_000, "pydantic": 100_000}.items():
        (wheels / f"{package}-1-py3-none-any.whl").write_bytes(bytes(size))
    with zipfile.ZipFile(wheels / "bitsandbytes-1-py3-none-any.whl", "w") as archive:
        for library in ("cpu", "cuda118", "cuda130", "rocm70"):
            archive.writestr(f"libbitsandbytes_{library}.so", bytes(100_000))
    monkeypatch.setattr(stacks, "ROOT", tmp_path)
    monkeypatch.setattr(stacks, "_pip", lambda *_: '{"install": []}')
    monkeypatch.setattr(stacks, "requirements", lambda *_: ["bitsandbytes"])
    for limit, left in ((650_000, ["bitsandbytes", "numpy", "pydantic"]), (350_000, ["bitsandbytes", "pydantic"])):
        assert sorted(map(stacks._package, stacks.download(wheels, "3.12", limit, set()))) == left
    with zipfile.ZipFile(next(wheels.glob("bits*"))) as archive:
        assert archive.namelist() == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]
    with pytest.raises(stacks.CannotInstallError, match=r"checkout has 0\.2 MiB and the wheels 0\.1.* pydantic 0\.1"):
        stacks.download(wheels, "3.12", 250_000, set())


def test_a_python_that_lacks_packages_is_named_before_the_first_step(stacks: ModuleType, tmp_path: Path) -> None:
    assert stacks.check(Path(sys.executable)).startswith("2.")
    venv.create(tmp_path / "bare", with_pip=False)
    with pytest.raises(stacks.CannotInstallError, match=r"lacks typer.*torch.*starlette.*orjson.*make gpu-wheels"):
        stacks.check(tmp_path / "bare" / "bin" / "python")


def test_a_stack_without_an_index_says_what_is_missing(stacks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(stacks.CannotInstallError, match="No matching distribution found for nothing-of-this-name"):
        stacks._pip("download", "--no-index", "--find-links", str(tmp_path / "wheels"), "nothing-of-this-name")


def test_an_installation_that_hangs_is_ended(stacks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "INSTALL_S", 0.1)
    with pytest.raises(stacks.CannotInstallError, match="longer than 0 s"):
        stacks._run("sleep", "5")
