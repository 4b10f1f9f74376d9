"""Step 5: figures. Benchmarks of precisions, sentence-transformers beside the engine, energy, and generation."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import card
import results
import servers
from results import STAND_IN, Step

import models
from inferctl.bench.load import process_usage

TEXTS = 200 if STAND_IN else 8000
TOKENS = 32 if STAND_IN else 256  # of each generated answer
END_S = 25.0  # a benchmark that is ended waits for its server, and writes what it measured


def work(step: Step, settings: dict[str, Any]) -> None:
    folder, given = Path(settings["work"]), Path(settings["models"])
    shape = dict(models.SMALL) if STAND_IN else models.SHAPES["minilm"]
    model = given / "all-MiniLM-L6-v2"
    if STAND_IN or not (model / "model.safetensors").is_file():
        model = models.make(folder / "shape-minilm", "bert", **{"initializer_range": 0.02, **shape})
    cross = models.make(folder / "cross-minilm", "bert", task="rerank", **{"initializer_range": 0.02, **shape})
    if importlib.util.find_spec("sentence_transformers") is None:
        step.skip("sentence-transformers", "it is not installed")
    else:
        step.part("sentence-transformers", 40, _apart, "sentence-transformers", _library, model)
        step.part("vectors of sentence-transformers", 40, _vectors, folder, model)
    step.part("precisions of embeddings", 100, _bench, Path(settings["output"]), model, "embeddings")
    step.part("precisions of reranking", 100, _bench, Path(settings["output"]), cross, "reranking")
    step.part("API processes", 30, _api_processes, folder, model)
    step.part("generation", 150, _generation, folder, given / "SmolLM2-135M-Instruct")


def _apart(step: Step, name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Run a part in a process of its own, which leaves the GPU at its end.

    A benchmark is invalid if another process is on its GPU, and torch leaves the GPU only with its process.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        step.checks = pool.submit(_part, step, name, work, *arguments).result()


def _part(step: Step, name: str, work: Callable[..., None], *arguments: Any) -> list[dict[str, Any]]:
    step.part(name, 0, work, *arguments)
    return step.checks


def _library(step: Step, model: Path) -> None:
    """Compare the engine with sentence-transformers in texts/s, in the order A B B A, from texts to vectors."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # for both; one thread may be slower than a GPU
    import numpy as np
    import torch

    from inferctl.reading import task_config
    from inferctl.serve import reference
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine
    from inferctl.serve.text.tokenizer_pool import TokenizerPool

    cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # before the engine turns it off in its process
    peer = reference.library(model, "embed", device="cpu" if STAND_IN else "cuda", dtype="bfloat16")
    engine = EncoderEngine(EngineConfig(model=str(model), precision="bf16", device="cuda"))
    limit = engine.load().batch_tokens
    pool = TokenizerPool(model, task_config.read("embed", model, None), threads=1)
    texts = models.texts(TEXTS)

    def own() -> Any:
        ids = pool.encode_now(texts, truncate=True)
        rows, first, tokens = [], 0, 0
        for index, row in enumerate([*ids, None]):
            if row is None or tokens + len(row) > limit:
                part = ids[first:index]
                lengths = np.array([len(each) for each in part], dtype=np.int32)
                rows.append(engine.run(Batch(1, np.concatenate(part), lengths)).rows)
                first, tokens = index, 0
            tokens += 0 if row is None else len(row)
        return np.concatenate(rows)

    def theirs() -> Any:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        rows = peer(texts, batch_size=128, convert_to_numpy=True, show_progress_bar=False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        return rows

    contenders: dict[str, Callable[[], Any]] = {"inferctl": own, "sentence-transformers": theirs}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    energy: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():  # warm-up
        run()
    for name in (*contenders, *reversed(contenders)):
        before, started = card.joules(), card.clock()
        contenders[name]()
        rates[name].append(TEXTS / (card.clock() - started))
        after = card.joules()
        if before is not None and after is not None:
            energy[name].append((after - before) / TEXTS)
    told = ", ".join(f"{name} {min(values):.0f} to {max(values):.0f}" for name, values in rates.items())
    step.figure("texts/s in bf16, tokenization included", told, rates=rates, joules_per_text=energy)
    pool.close()


def _vectors(step: Step, folder: Path, model: Path) -> None:
    """Compare the vectors of a server with those of sentence-transformers on the CPU, from raw text."""
    for precision in ("bf16",) if STAND_IN else ("fp32", "bf16"):
        command = [sys.executable, "-m", "inferctl", "verify", "--model", str(model), "--precision", precision]
        command += ["--against", "sentence-transformers", "--json"]
        code, stdout, stderr = _ended(command, folder, max(60.0, step.left() - 45))
        found = json.loads(stdout)["library"] if code == 0 else {}
        told = f"cosine {found['cosine_min']:.6f}" if found else " ".join(stderr.split())[-400:]
        step.check(f"vectors in {precision} as sentence-transformers", code == 0, told, found=found)


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
    """Measure requests/s with several API processes, if this version has an option for them."""
    asked = subprocess.run(
        [sys.executable, "-m", "inferctl", "serve", "--help"], capture_output=True, text=True, check=True
    )
    option = re.search(r"--(?:api-)?processes\b", asked.stdout)
    counts = (1, 2, 4, 8, 12) if option else (1,)
    bodies = [[text] for text in models.texts(400)]
    for count in counts:
        more = (option[0], str(count)) if option else ()
        arguments = ("--model", str(model), "--device", "cuda:0", "--precision", "bf16", *more)
        with servers.serving(folder, f"api-{count}", *arguments) as server:
            rates = []
            for _ in range(2):
                started = time.monotonic()
                statuses = server.embed_many(bodies, 64)
                rates.append(statuses.count(200) / (time.monotonic() - started))
            step.check(
                f"requests, API processes: {count}", set(statuses) == {200}, f"{statuses.count(200)} of {len(statuses)}"
            )
            step.figure(
                f"requests/s, API processes: {count}", f"{max(rates):.0f}, from 64 threads of one client", rates=rates
            )
    if not option:
        step.skip("2 to 12 API processes", "`inferctl serve` has no option for them")


def _generation(step: Step, folder: Path, model: Path) -> None:
    """Measure vLLM with the edge and without: start, tokens/s, and the time after its engine was killed."""
    if importlib.util.find_spec("vllm") is None:
        step.skip("generation", "vLLM is not installed")
        return
    if not (model / "model.safetensors").is_file():
        step.skip("generation", f"{model} does not exist")
        return
    device = ("--device", "cpu", "--kv-cache", "1GiB") if STAND_IN else ("--device", "cuda:0")
    arguments = ("--model", str(model), "--max-context-tokens", "2048", *device)
    with servers.serving(folder, "generation", *arguments, seconds=240) as server:
        step.figure("ready with the edge", f"{server.seconds:.0f} s", seconds=server.seconds)
        _tokens(step, "with the edge", server)
        victims = [pid for pid in process_usage.tree(server.process.pid) if _named(pid, b"EngineCore")]
        if victims and step.left() > 60:
            started = time.monotonic()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            servers.until(lambda: not server.ready(), 30)
            back = servers.until(server.ready, 240)
            step.check("a killed engine is replaced", back, f"ready again after {time.monotonic() - started:.0f} s")
        else:
            step.skip("killed engine", "too little time is left" if victims else "its process was not found")
    step.part("generation without the edge", 60, _without_edge, folder, model)


def _without_edge(step: Step, folder: Path, model: Path) -> None:
    """Measure vLLM's own server with the same context."""
    if STAND_IN:
        step.skip("generation without the edge", "vLLM's build for CPUs needs what only inferctl gives it")
        return
    port, log = 18571, folder / "vllm.log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
    command += ["--max-model-len", "2048", "--served-model-name", model.name, "--host", "127.0.0.1"]
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    server = servers.Server(f"http://127.0.0.1:{port}", process, log, 0)
    try:
        ready = servers.until(lambda: process.poll() is not None or server.get("/health") == "", 240)
        if not ready or process.poll() is not None:
            raise RuntimeError(f"vLLM was not ready: {servers.tail(log)}")
        step.figure("ready without the edge", f"{time.monotonic() - started:.0f} s")
        _tokens(step, "without the edge", server)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _tokens(step: Step, name: str, server: servers.Server, clients: int = 4 if STAND_IN else 64) -> None:
    """Record tokens/s of `clients` requests that are sent at the same time."""
    url, model = server.url, json.loads(server.get("/v1/models"))["data"][0]["id"]
    servers.post(f"{url}/v1/completions", {"model": model, "prompt": "warm", "max_tokens": 1})
    body = {"model": model, "prompt": "The history of", "max_tokens": TOKENS, "ignore_eos": True}
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda _: servers.post(f"{url}/v1/completions", body, 300), range(clients)))
    rate = sum(answer["usage"]["completion_tokens"] for status, answer in answers if status == 200)
    rate /= time.monotonic() - started
    good = [status for status, _ in answers if status == 200]
    bad = next((f"; {status}: {str(answer)[:200]}" for status, answer in answers if status != 200), "")
    step.check(f"completions {name}", len(good) == clients, f"{len(good)} of {clients}{bad}")
    step.figure(f"tokens/s {name}", f"{rate:.0f}, {clients} requests at a time", tokens_per_s=rate)


def _named(pid: int, word: bytes) -> bool:
    return word in Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()


if __name__ == "__main__":
    results.run(work)
