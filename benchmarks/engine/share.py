"""Print which share of this machine's matrix rate the engine reaches for several models, before and after a change.

    python benchmarks/engine/share.py [--before TREE] [--models minilm,bge-base,...] [--rounds 2] [--json FILE]

`TREE` is another checkout of this repository, such as one that `git worktree add` made. The profile of each engine
(`inferctl bench --profile`) runs in bf16 in both trees, interleaved A B B A. A share is that of the fastest round, of
the highest matrix rate: each process measures its own, and they differ by a seventh.
"by CPU" divides by the CPU seconds of the engine's threads instead of the time of all cores: other work on the machine
affects it less, and it leaves out that threads wait. The ratio is the median over the pairs of rounds, by CPU. For one
core: `taskset -c 1`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE.parent / "peers"), str(HERE.parent / "gpu_check")]
import peers  # noqa: E402

GRID = [(count, tokens) for tokens in (16, 64, 256) for count in (1, 8, 64, 512)]


# Their tasks. All but the first have random weights.
MODELS = {"minilm": "embed", "bge-base": "embed", "qwen3-0.6b": "embed", "splade": "embed", "reranker": "rerank"}


def make(name: str, folder: Path) -> Path:
    """Write a model of `MODELS`, and return its folder."""
    import outputs
    import rerank

    import models

    if name == "minilm":
        return ROOT / "models" / "all-MiniLM-L6-v2"
    if name == "splade":
        return outputs.splade(folder)
    if name != "reranker":
        decoder = name.startswith("qwen3")
        vocabulary = {} if decoder else {"vocab_size": 30522}
        shape = {**models.SHAPES[name], **vocabulary, "initializer_range": 0.02}
        return models.make(folder, "qwen3" if decoder else "bert", **shape)
    folder.mkdir()
    rerank.make_model(folder)
    return folder


def run(tree: Path, *command: str, given: str = "") -> Any:
    """Return the JSON that a Python process of a tree prints."""
    environment = {**peers.environment(), "PYTHONPATH": str(tree)}
    command = sys.executable, "-P", *command
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, cwd=tree, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed in {tree}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def profile(tree: Path, model: Path, task: str) -> dict[str, Any]:
    """Return the profile of a tree's engine."""
    lines = (ROOT / "benchmarks" / "corpora" / "paragraphs.jsonl").read_text().splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines)[:100_000]
    wanted = {"engine": {"task": task, "precision": "bf16"}, "words": words, "grid": GRID, "texts": []}
    found: dict[str, Any] = run(tree, "-m", "inferctl.serve.engines.profile", str(model), given=json.dumps(wanted))
    return found


def shares(found: dict[str, Any], at: int, limit: float) -> tuple[float, float]:
    """Return the shares of a point by time and by CPU, in percent, of another matrix rate than the process measured."""
    point, factor = found["points"][at], found["matrix_rate"]["flops_per_s"] / limit
    return factor * point["matrix_share_percent"], factor * point["cpu_share_percent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the tree to compare this one with")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trees = [*([options.before.resolve()] if options.before else []), ROOT]
    figures: dict[str, list[list[Any]]] = {}
    for name in options.models.split(","):
        figures[name] = [[] for _ in trees]
        with tempfile.TemporaryDirectory() as folder:
            model = make(name, Path(folder) / "model")
            for index in peers.order(range(len(trees)), options.rounds):
                figures[name][index].append(profile(trees[index], model, MODELS[name]))
        limit = max(found["matrix_rate"]["flops_per_s"] for of_tree in figures[name] for found in of_tree)
        print(f"{name}, of {limit / 1e12:.2f} TFLOP/s")
        for at, (count, tokens) in enumerate(GRID):
            points = [[shares(found, at, limit) for found in of_tree] for of_tree in figures[name]]
            best = [map(max, zip(*of_tree, strict=True)) for of_tree in points]
            text = " -> ".join(f"{wall:5.1f}% ({by_cpu:5.1f}% by CPU)" for wall, by_cpu in best)
            ratios = [after[1] / before[1] for before, after in zip(points[0], points[-1], strict=True)]
            print(f"{count:4} texts of {tokens:3}: {text}" + f", {statistics.median(ratios):.2f}x" * (len(trees) > 1))
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
