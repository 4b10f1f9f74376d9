"""Step 5: figures. Benchmarks of precisions with their energy, sentence-transformers, and API processes."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import results
import servers
from results import STAND_IN, Step

import models
from inferctl.bench.load import process_usage

PEERS = Path(__file__).resolve().parents[1] / "peers"
TEXTS = 200 if STAND_IN else 8000
CLIENTS = 1 if STAND_IN else 4  # processes that send requests
END_S = 25.0  # a benchmark that is ended waits for its server, and writes what it measured


def work(step: Step, settings: dict[str, Any]) -> None:
    folder = Path(settings["work"])
    shape = dict(models.SMALL) if STAND_IN else models.SHAPES["minilm"]
    model = Path(settings["models"]) / "all-MiniLM-L6-v2"
    if STAND_IN or not (model / "model.safetensors").is_file():
        model = models.make(folder / "shape-minilm", "bert", **{"initializer_range": 0.02, **shape})
    cross = models.make(folder / "cross-minilm", "bert", task="rerank", **{"initializer_range": 0.02, **shape})
    if importlib.util.find_spec("sentence_transformers") is None:
        step.skip("sentence-transformers", "it is not installed")
    else:
        step.part("sentence-transformers", 40, _library, folder, model)
    step.part("precisions of embeddings", 100, _bench, Path(settings["output"]), model, "embeddings")
    step.part("precisions of reranking", 100, _bench, Path(settings["output"]), cross, "reranking")
    step.part("API processes", 60, _api_processes, folder, model)


def _library(step: Step, folder: Path, model: Path) -> None:
    """Compare texts/s with sentence-transformers in the order A B B A: a process for each, from texts to vectors."""
    file = folder / "texts.json"
    file.write_text(json.dumps({"texts": models.texts(TEXTS)}))
    # With threads of tokenizers for both: one thread may be slower than a GPU.
    more = {"CONTENDER_DEVICE": "cpu" if STAND_IN else "cuda", "TOKENIZERS_PARALLELISM": "true"}
    with ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        for name in ("inferctl", "sentence-transformers"):
            command = [sys.executable, str(PEERS / "contender.py"), f"{name} bf16", str(model), str(file)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            running[name] = stack.enter_context(subprocess.Popen(command, env={**os.environ, **more}, **pipes))
            stack.callback(running[name].kill)
        rates: dict[str, list[float]] = {name: [] for name in running}
        for process in running.values():
            process.stdout.readline()  # type: ignore[union-attr]  # the model is loaded
            process.stdout.readline()  # type: ignore[union-attr]  # its vectors, after a warm-up
        for name in (*running, *reversed(running)):
            process = running[name]
            print(file=process.stdin, flush=True)
            rates[name].append(TEXTS / json.loads(process.stdout.readline())[0])  # type: ignore[union-attr]
    told = ", ".join(f"{name} {min(values):.0f} to {max(values):.0f}" for name, values in rates.items())
    step.figure("texts/s in bf16, tokenization included", told, rates=rates)


def _bench(step: Step, folder: Path, model: Path, name: str) -> None:
    """Run the plan `precision` once, with short runs, and record its rows."""
    if importlib.util.find_spec("locust") is None:
        step.skip(f"precisions of {name}", "Locust is not installed")
        return
    precisions = ["bf16"] if STAND_IN else ["fp32", "fp16", "bf16"]
    if not STAND_IN and importlib.util.find_spec("bitsandbytes"):
        precisions.append("int8")
    options = ["--plan", "precision", "--repeats", "1", "--duration", "2" if STAND_IN else "6"]
    options += ["--users", "4" if STAND_IN else "128", "--corpus", "short" if STAND_IN else "mixed", "--json"]
    options += [word for each in precisions for word in ("-p", each)]
    output = folder / f"gpu-check-{name}{'-stand-in' if STAND_IN else ''}"  # with receipts and report
    command = [sys.executable, "-m", "inferctl", "bench", "--model", str(model), "--output", str(output), *options]
    code, stdout, stderr = _ended(command, folder, max(60.0, step.left() - 45))
    if not stdout.strip():
        step.check(f"precisions of {name}", False, f"exit code {code}: {' '.join(stderr.split())[-400:]}")
        return
    # One file: few files return from some machines without a network.
    output = Path(shutil.make_archive(str(output), "gztar", output.parent, output.name))
    shutil.rmtree(output.with_suffix("").with_suffix(""))
    rows = json.loads(stdout)["rows"]
    good, told = _judged(rows, len(precisions))
    step.check(f"precisions of {name}", good, f"{told}, exit code {code}", output=str(output))
    for row in rows:
        step.figure(f"{name}, {row['configuration']}", _figures(row), row=row)


def _ended(command: list[str], folder: Path, seconds: float) -> tuple[int, str, str]:
    """Run a benchmark, and return its exit code, stdout and stderr. It is ended after `seconds`, with its server, which
    would use the GPU beside the next part.
    """
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    try:
        stdout, stderr = ran.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        family = {*process_usage.tree(ran.pid)}
        ran.terminate()  # not SIGINT, which is ignored if the check was started in the background of a script
        try:
            stdout, stderr = ran.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            for pid in family | {*process_usage.tree(ran.pid)}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            stdout, stderr = ran.communicate()
    return ran.returncode, stdout, stderr


def _judged(rows: list[dict[str, Any]], wanted: int) -> tuple[bool, str]:
    """Return whether all `wanted` rows are measured and valid, and how many are, as text."""
    measured = [row for row in rows if row["outcome"] == "measured"]
    reasons = {reason for row in measured if not row["valid"] for reason in row["reasons"]}
    told = f"{len(measured)} of {wanted} measured" + (f", invalid: {'; '.join(sorted(reasons))}" if reasons else "")
    return len(measured) == wanted and not reasons, told


def _figures(row: dict[str, Any]) -> str:
    """Return the figures of a row of a benchmark, as text."""
    names = (
        "requests_per_s",
        "p50_ms",
        "p99_ms",
        "cosine_mean",
        "score_difference",
        "watts",
        "joules_per_1000_requests",
    )
    return ", ".join(f"{name} {row[name]:.5g}" for name in names if row.get(name) is not None) or row["outcome"]


def _api_processes(step: Step, folder: Path, model: Path) -> None:
    """Measure requests/s with several API processes, by load generators with processes of their own."""
    for count in (1, 2) if STAND_IN else (1, 4, 12):
        arguments = ("--model", str(model), "--device", "cuda:0", "--precision", "bf16", "--api-processes", str(count))
        clients = ProcessPoolExecutor(CLIENTS, multiprocessing.get_context("spawn"))
        with servers.serving(folder, f"api-{count}", *arguments) as server, clients:
            found = list(clients.map(_load, [server.url] * CLIENTS))
        name = f"API processes: {count}"
        rate, failures = sum(each for each, _, _ in found), sum(each for _, each, _ in found)
        busiest = max(each for _, _, each in found)
        step.check(f"requests, {name}", rate > 0 and not failures, f"{failures} failed")
        told = f"the busiest of {CLIENTS} load generators used {100 * busiest:.0f}% of a core, at most 80%"
        # With the stand-in, both share the cores.
        step.check(f"the client is not the limit, {name}", STAND_IN or busiest <= 0.8, told)
        step.figure(f"requests/s, {name}", f"{rate:.0f}", rate=rate)


def _load(url: str) -> tuple[float, int, float]:
    """Return requests/s, failed requests, and the cores that this process used, for requests of one text."""
    sys.path.insert(0, str(PEERS))
    import load

    ready = load.requests(url, "/v1/embeddings", [{"input": text} for text in models.texts(400)])
    started, before = time.perf_counter(), time.process_time()
    outcome = load.run_closed(url, ready, 32, 1 if STAND_IN else 4, warm=1)
    used = (time.process_time() - before) / (time.perf_counter() - started)
    return outcome.rate, outcome.failures, used


if __name__ == "__main__":
    results.run(work)
