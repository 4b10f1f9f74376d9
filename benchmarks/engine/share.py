"""Print which share of this machine's matrix rate the engine reaches, before and after a change, for several models.

    python benchmarks/engine/share.py [--before TREE] [--models minilm,bge-base,...] [--rounds 4] [--json FILE]

`TREE` is another checkout of this repository, such as one that `git worktree add` made. Each model runs in processes of
both trees, interleaved A B B A, in bf16. A figure is the floating-point operations of all texts without padding, divided
by the time of the fastest round and by the matrix rate; "by CPU" divides by the CPU seconds of all threads instead, which
other work on the machine affects less, and which leaves out that threads wait. Batches have as many texts as the engine accepts. Above 8 TFLOP,
fewer texts stand for 512, since they are many batches too. `inferctl bench --profile` shows where the rest is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE.parent / "peers"), str(HERE.parent / "gpu_check")]
COUNTS, LENGTHS = (1, 8, 64, 512), (16, 64, 256)
MOST_FLOPS = 8e12


def bge_base(folder: Path) -> Path:
    import models

    return models.make(folder, "bert", **{**models.SHAPES["bge-base"], "vocab_size": 30522, "initializer_range": 0.02})


def decoder(folder: Path) -> Path:
    import engine

    engine.write_decoder(folder)
    return folder


def splade(folder: Path) -> Path:
    import outputs

    return outputs.splade(folder)


def reranker(folder: Path) -> Path:
    import rerank

    folder.mkdir()
    rerank.make_model(folder)
    return folder


MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "minilm": ("embed", lambda _: ROOT / "models" / "all-MiniLM-L6-v2"),
    "bge-base": ("embed", bge_base),
    "qwen3-0.6b": ("embed", decoder),
    "splade": ("embed", splade),
    "reranker": ("rerank", reranker),
}


def child(model: str, task: str) -> None:
    """Load an engine, print what it says of the limit, then the seconds and CPU seconds of a round of COUNT TOKENS."""
    import contender
    import numpy as np

    info, run = contender.load_engine("bf16", model, task)
    document = info.to_json()
    print(json.dumps({key: document.get(key) for key in ("flops", "matrix_rate", "device")}), flush=True)
    rng = np.random.default_rng(7)
    for line in sys.stdin:
        count, tokens = map(int, line.split())
        rows = [rng.integers(1000, 8000, tokens).astype(np.int32) for _ in range(count)]
        marks = [tokens // 4] * count if task == "rerank" else None
        started = time.perf_counter(), time.process_time()
        run(rows, marks)
        print(time.perf_counter() - started[0], time.process_time() - started[1], flush=True)


def start(tree: Path, model: Path, task: str) -> tuple[Any, dict[str, Any]]:
    """Return a process that runs the engine of a tree, and what it says of the limit."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(model), task]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout
    return process, json.loads(process.stdout.readline())


def seconds(process: Any, count: int, tokens: int) -> list[float]:
    process.stdin.write(f"{count} {tokens}\n")
    process.stdin.flush()
    return [float(each) for each in process.stdout.readline().split()]


def measure(trees: list[Path], model: Path, task: str, rounds: int) -> dict[str, Any]:
    """Return the shares of each tree, in percent, and their ratio, by texts and tokens."""
    running: list[tuple[Any, dict[str, Any]]] = []
    try:
        running.extend(start(tree, model, task) for tree in trees)
        flops, rate = running[-1][1]["flops"], running[-1][1]["matrix_rate"]["flops_per_s"]
        cores = running[-1][1]["device"]["threads"] or 1
        found: dict[str, Any] = {"flops": flops, "matrix_rate": rate, "points": {}}
        for tokens in LENGTHS:
            each = flops["per_text"] + flops["per_token"] * tokens + flops["per_token2"] * tokens**2
            for count in COUNTS:
                texts = max(1, min(count, int(MOST_FLOPS / each)))
                times: list[list[list[float]]] = [[] for _ in trees]
                for number in range(rounds if texts * each > 1e12 else 3 * rounds):
                    for index in range(len(trees)) if number % 2 else reversed(range(len(trees))):
                        times[index].append(seconds(running[index][0], texts, tokens))
                fastest = [[min(column) for column in zip(*row, strict=True)] for row in times]
                shares = [[100 * texts * each / rate / s for s in (wall, cpu / cores)] for wall, cpu in fastest]
                found["points"][f"{count} x {tokens}"] = {"shares": shares, "texts": texts, "seconds": times}
                figures = ", ".join(f"{wall:5.1f}% ({by_cpu:5.1f}% by CPU)" for wall, by_cpu in shares)
                print(f"{count:4} texts of {tokens:3} tokens: {figures}", flush=True)
    finally:
        for process, _ in running:
            process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the tree to compare this one with")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    trees = [*([options.before.resolve()] if options.before else []), ROOT]
    figures = {}
    for name in options.models.split(","):
        task, make = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {' and '.join(map(str, trees))}", flush=True)
            figures[name] = measure(trees, make(Path(folder) / "model"), task, options.rounds)
            print(f"of {figures[name]['matrix_rate'] / 1e12:.2f} TFLOP/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
