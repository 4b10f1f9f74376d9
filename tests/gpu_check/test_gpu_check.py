"""`make gpu-check` itself: the real script on CPUs, and faults that it must find."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check"
FAULTS = Path(__file__).with_name("faults")


def run(output: Path, *options: str, fault: str = "") -> tuple[int, str, dict[str, Any]]:
    """Run the check with the stand-in. Return its exit code, what it printed, and its JSON."""
    environment = {**os.environ, "PYTHONPATH": str(FAULTS), "GPU_CHECK_TEST_FAULT": fault}
    command = [sys.executable, str(SCRIPT), "--stand-in", "--short", "--output", str(output), *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, ran.stdout, json.loads((output / "gpu-check-stand-in.json").read_text())


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "steps", "found"),
    [
        ("padded", "2", "attention of cross-encoder in bf16"),
        ("wrong", "2", "logits of cross-encoder in bf16"),
        ("wrong", "2", "vectors of qwen3 in bf16"),
        ("growing", "3", "memory of minilm, packed"),
        ("slow", "3", "tail of minilm, packed"),
        ("dead", "4", "a GPU by its UUID"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, fault: str, steps: str, found: str) -> None:
    code, printed, document = run(tmp_path, "--steps", steps, "--minutes", "10", fault=fault)
    assert code == 1
    assert found in failed(document), printed
    assert f"failed   {found}" in printed


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


def test_a_machine_without_git_has_no_commit(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT)!r}); import runpy; "
    code += f"print(runpy.run_path({str(SCRIPT / '__main__.py')!r}, run_name='x')['_commit']())"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": str(tmp_path)}
    )
    assert ran.stdout == "None\n"


def test_a_step_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(SCRIPT)!r}); import results; results.run(lambda *_: time.sleep(60))"
    )
    settings = json.dumps({"file": str(tmp_path / "step.json"), "end": time.time() + 60})
    command = [sys.executable, "-c", code, settings]
    # A parent that starts the step as `__main__.py` does, waits until it runs, and is killed.
    parent = "import os, subprocess, sys, time; p = subprocess.Popen(sys.argv[2:], start_new_session=True); "
    parent += (
        "print(p.pid, flush=True)\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\nos.kill(os.getpid(), 9)"
    )
    started = [sys.executable, "-c", parent, str(tmp_path / "step.json"), *command]
    ran = subprocess.run(started, capture_output=True, text=True, check=False, timeout=60)
    step, end = int(ran.stdout), time.monotonic() + 10
    while Path(f"/proc/{step}").exists() and "Z" not in Path(f"/proc/{step}/stat").read_text().split(")")[-1][:3]:
        assert time.monotonic() < end, "the step still runs"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stacks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check_stacks", SCRIPT / "stacks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nvidia-ml-py>=12.560", "nvidia-ml-py"),
        ("Prometheus_Client>=0.21", "prometheus-client"),
        ("psycopg[binary]>=3.2", "psycopg"),
        ("pyyaml", "pyyaml"),
    ],
)
def test_names_of_requirements(stacks: ModuleType, text: str, name: str) -> None:
    assert stacks.name_of(text) == name


def test_the_wheels_are_those_of_pyproject_without_torch(stacks: ModuleType) -> None:
    names = {stacks.name_of(each) for each in stacks.requirements()}
    assert {"pydantic", "typer", "uvicorn", "transformers", "locust", "nvidia-ml-py"} <= names
    assert not {"torch", "bitsandbytes"} & names


def test_a_stack_without_an_index_says_what_is_missing(stacks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(stacks.CannotInstallError, match="No matching distribution found for nothing-of-this-name"):
        stacks._pip("download", "--no-index", "--find-links", str(tmp_path / "wheels"), "nothing-of-this-name")
