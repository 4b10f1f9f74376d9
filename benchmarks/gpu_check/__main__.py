"""Check everything on a GPU that tests elsewhere cannot: `make gpu-check`, or

    python benchmarks/gpu_check [--steps 1,2,3] [--minutes 20] [--stack locked,newest]
                                [--wheels FOLDER] [--output FOLDER] [--resume]

1 machine, 2 correctness, 3 shapes, 4 faults, 5 figures, 6 image. Each step is a process with a time limit, and none
stops the next. OUTPUT/gpu-check.json gets the result of each step when it ends; a later run adds to it, and with
--resume skips what passed. The exit code is 0 if all chosen steps passed. --stand-in runs all of it on CPUs, with
results of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Step -> its module and its share of the time. A step that ends early leaves its time to the next ones.
STEPS = {
    1: ("machine", 1),
    2: ("correctness", 5),
    3: ("shapes", 4),
    4: ("faults", 4),
    5: ("figures", 8),
    6: ("image", 5),
}
REPEATED = (1, 2, 3, 4)  # with every stack; the others only with the first
_LEAST_S = 15.0  # less time is not enough to import torch
_END_S = 20.0  # for the servers of a step, after its time limit


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` ends the step, which has a session of its own
    if options.stand_in:
        os.environ["GPU_CHECK_STAND_IN"] = "1"
    if options.short:
        os.environ["GPU_CHECK_SHORT"] = "1"
    import results  # reads these variables
    import stacks

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / ("gpu-check-stand-in.json" if options.stand_in else "gpu-check.json")
    document: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"steps": []}
    document |= {"stand_in": options.stand_in, "commit": _commit()}
    end = time.time() + 60 * options.minutes
    done: list[dict[str, Any]] = []

    gpu = "stand-in" if options.stand_in else _gpu()
    # Of each step, because later runs add to the file.
    same: dict[str, Any] = {"gpu": gpu, "commit": document["commit"]}

    def record(entry: dict[str, Any]) -> None:
        entry |= {**same, **entry}
        done.append(entry)
        document["steps"].append(entry)
        results.write(file, document)
        print(summary(entry, options.stand_in), flush=True)

    running = options.output / "gpu-check-running.json"
    if running.is_file():  # of a run that was killed
        entry = json.loads(running.read_text())
        entry["checks"].append({"name": results.WHOLE, "outcome": "failed", "detail": "the check was killed"})
        document["steps"].append(entry)
        running.unlink()
    first, tested = None, dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        for stack, python, torch in _stacks(options, Path(work), end, record):
            first, tested[stack] = first or stack, torch
            numbers = [number for number in options.steps if stack == first or number in REPEATED]
            later = len(options.stack) - options.stack.index(stack) - 1 if stack in options.stack else 0
            for number in numbers:
                limit = _limit(number, options.steps, numbers, later, end - time.time())
                if limit:
                    entry = {"step": number, "stack": stack, "title": STEPS[number][0], "torch": torch, **same}
                    entry["checks"] = _kept(document["steps"], entry) if options.resume else []
                    record(_step(entry, python, Path(work), options, limit))
                else:
                    record(_no_time(number, stack))
    failed = [f"{entry['step']} ({entry['stack']})" for entry in done if not entry["passed"]]
    ran = ", ".join(f"{entry['step']} {entry['title']}" for entry in done if entry["step"])
    print(f"\n{file}: steps {ran or 'none'}")
    print(f"failed: {', '.join(failed)}" if failed or not ran else "all chosen steps passed")
    if tested:
        print(_about_torch(tested, stacks.shipped_torch()))
    if options.stand_in:
        print("This was the stand-in: no figure and no check is of a GPU.")
    sys.exit(1 if failed or not ran else 0)


def _kept(steps: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the checks of the parts of a step that passed in earlier runs: the same code, GPU and torch."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for earlier in steps:
        if all(earlier.get(key) == value for key, value in entry.items()):
            latest: dict[str, list[dict[str, Any]]] = {}
            for check in earlier["checks"]:
                if "part" in check:
                    latest.setdefault(check["part"], []).append(check)
            parts |= latest
    passed = [checks for checks in parts.values() if all(c["outcome"] in ("passed", "figure") for c in checks)]
    return [check for checks in passed for check in checks]


def _about_torch(tested: dict[str, str], shipped: str) -> str:
    """Say which torch was tested (by stack), and whether it is the one that the images ship."""
    told = f"torch: {', '.join(f'{version} ({stack})' for stack, version in tested.items())}."
    if shipped in (version.partition("+")[0] for version in tested.values()):
        return f"{told} The images ship {shipped}."
    return f"{told} The images ship {shipped}, which was NOT tested."


def _limit(number: int, steps: list[int], numbers: list[int], later: int, left: float) -> float | None:
    """Return the seconds of a step when `left` seconds are left; None if they are too few for any result.

    `steps` were chosen, `numbers` run with this stack, and `later` stacks follow.
    """
    repeated = later * sum(STEPS[n][1] for n in steps if n in REPEATED)
    share = STEPS[number][1] / (sum(STEPS[n][1] for n in numbers if n >= number) + repeated)
    # Importing torch for the first time can take longer than the share of a short step.
    return max(share * left, min(60.0, left / 8)) if left >= _LEAST_S else None


def _no_time(number: int, stack: str) -> dict[str, Any]:
    check = {"name": "the step itself", "outcome": "failed", "detail": "no time was left: use a larger --minutes"}
    title = STEPS[number][0]
    return {"step": number, "stack": stack, "title": title, "passed": False, "seconds": 0.0, "checks": [check]}


def _stacks(
    options: argparse.Namespace, work: Path, end: float, record: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[str, Path, str]]:
    """Yield the stacks with their Python and their torch. If none can be installed, the machine's own."""
    import stacks

    found = False
    for stack in (*options.stack, "machine"):
        if stack == "machine" and found:
            continue
        try:
            stacks.INSTALL_S = min(stacks.INSTALL_S, max(1.0, end - time.time()))
            python = stacks.python_of(stack, work, options.wheels)
            torch = stacks.check(python)
        except stacks.CannotInstallError as error:
            outcome = "failed" if stack == "machine" else "skipped"
            checks = [{"name": f"stack {stack}", "outcome": outcome, "detail": f"it cannot be installed: {error}"}]
            passed = outcome == "skipped"
            record({"step": 0, "stack": stack, "title": "install", "passed": passed, "seconds": 0.0, "checks": checks})
            if stack == "machine":
                return
            continue
        found = True
        yield stack, python, torch


def _step(entry: dict[str, Any], python: Path, work: Path, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a step in a process of its own, and return its result. `entry`: what is known of it before."""
    import results

    title, started = entry["title"], time.time()
    folder = work / entry["stack"]
    folder.mkdir(exist_ok=True)
    # Beside the results, so that they remain if this process is killed.
    checks, log = (options.output.absolute() / f"gpu-check-running.{kind}" for kind in ("json", "log"))
    results.write(checks, entry)
    settings = {
        "file": str(checks),
        "end": started + limit,
        "work": str(folder),
        "models": str(options.models.absolute()),
        "output": str(options.output.absolute()),
    }
    paths = [str(HERE / "hooks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    if options.stand_in:  # threads that spin while they wait would take the cores from each other
        environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [str(python), str(HERE / f"{title}.py"), json.dumps(settings)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    try:
        code = process.wait(limit)
        ended = (
            "completed"
            if code == 0
            else f"ended with {code}: {' '.join(log.read_text(errors='replace').split())[-300:]}"
        )
    except subprocess.TimeoutExpired:
        ended = f"was ended after {limit:.0f} s"
    finally:
        _end(process)
    found = json.loads(checks.read_text())["checks"]
    checks.unlink()
    if ended != "completed" or not found:
        found.append({"name": results.WHOLE, "outcome": "failed", "detail": ended})
    passed = all(check["outcome"] != "failed" for check in found)
    if not passed:
        logs = [file for file in sorted(folder.glob("*.log")) if file.stat().st_mtime >= started]  # of its servers
        parts = [f"{file.name}\n{file.read_text(errors='replace')[-100_000:]}" for file in (log, *logs)]
        log.with_name(f"gpu-check-{entry['stack']}-{entry['step']}.log").write_text("\n".join(parts), encoding="utf-8")
    log.unlink()
    return {
        **entry,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "passed": passed,
        "checks": found,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a step: first gently, so that servers end their engines."""
    for number, seconds in ((signal.SIGTERM, _END_S), (signal.SIGKILL, 5.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def summary(entry: dict[str, Any], stand_in: bool) -> str:
    """Return the result of a step as text."""
    import results

    mark = "[stand-in, no GPU] " if stand_in else ""
    outcomes = [check["outcome"] for check in entry["checks"]]
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in ("passed", "failed", "skipped") if word in outcomes)
    verdict = "passed" if entry["passed"] else "FAILED"
    head = (
        f"{mark}step {entry['step']} {entry['title']} ({entry['stack']}): {verdict}, {counts}, {entry['seconds']:.0f} s"
    )
    return "\n".join([head, *(results.line(check) for check in entry["checks"] if check["outcome"] != "passed")])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="which steps run [default: all]")
    parser.add_argument("--minutes", type=float, default=20, help="time of all steps together [default: 20]")
    parser.add_argument(
        "--stack", default="", help="machine, locked, newest [default: locked,newest; machine with --wheels]"
    )
    parser.add_argument(
        "--wheels", type=Path, help="install what the machine lacks from this folder, without a network"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder of downloaded models, if any")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON is written"
    )
    parser.add_argument("--resume", action="store_true", help="skip what passed in OUTPUT, with the same code and GPU")
    parser.add_argument("--stand-in", action="store_true", help="run on CPUs, to check the check")
    parser.add_argument("--short", action="store_true", help="run a few cases of each step, to check the check")
    options = parser.parse_args()
    options.steps = sorted({int(number) for number in options.steps.split(",")})
    if set(options.steps) - set(STEPS):
        parser.error(f"steps are {min(STEPS)} to {max(STEPS)}")
    default = "machine" if options.wheels or options.stand_in else "locked,newest"
    options.stack = (options.stack or default).split(",")
    if set(options.stack) - {"machine", "locked", "newest"}:
        parser.error("stacks are machine, locked and newest")
    return options


def _commit() -> str | None:
    return os.environ.get("GPU_CHECK_COMMIT") or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def _gpu() -> str | None:
    """Return the name and the driver of each GPU."""
    return _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it fails or is not installed."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (ran.stdout.strip() or None) if ran.returncode == 0 else None


if __name__ == "__main__":
    main()
