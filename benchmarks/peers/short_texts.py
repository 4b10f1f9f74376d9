"""Compare the engines of two checkouts of this project with batches of short texts: 8 to 16 tokens, in-process.

    python benchmarks/peers/short_texts.py ../older . [--rounds 8] [--texts 256] [--threads 1] [--json FILE]

A dense model is all-MiniLM-L6-v2, a sparse one has the shape of distilbert-base, the vocabulary of BERT and random
weights, where half of a vector is not zero. The logits of `few` are shifted, so that it has as few as SPLADE. Each
checkout has its own process, and they take turns (A B B A). Trust the ratios, which are medians of those of one round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import outputs
import peers


def child(folder: str, sparse: bool, texts: int, threads: int) -> None:
    """Run a batch for each line of stdin, and print its seconds and CPU seconds."""
    import torch

    from inferctl.reading.outputs import Form
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    engine = EncoderEngine(EngineConfig(model=folder, precision="bf16", device="cpu"))
    engine.load()
    torch.set_num_threads(threads)
    rng = np.random.default_rng(3)
    lengths = rng.integers(8, 17, texts).astype(np.int32)
    marks = np.full(texts, int(Form.SPARSE), np.int32) if sparse else None
    batch = Batch(1, rng.integers(1000, 20000, int(lengths.sum())).astype(np.int32), lengths, marks)
    engine.run(batch)
    print("ready", flush=True)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        engine.run(batch)
        print(json.dumps([time.perf_counter() - started, time.process_time() - cpu]), flush=True)


def few(folder: Path) -> Path:
    """Write the sparse model with logits of which one in a hundred is above zero."""
    from safetensors.torch import load_file, save_file

    (file,) = outputs.splade(folder).rglob("model.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("vocab_projector.bias"))
    save_file(weights | {name: weights[name] - 1.3}, file, {"format": "pt"})
    return folder / "saved"


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=8)
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as place:
        models = {"dense": peers.MODEL, "sparse, few": few(Path(place, "few")), "sparse": outputs.splade(Path(place))}
        for name, model in models.items():
            running: list[Any] = []
            for checkout in options.checkouts:
                command = [sys.executable, __file__, "--child", str(model), name, str(options.texts)]
                environment = peers.environment() | {"PYTHONPATH": str(checkout.resolve())}
                pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                running.append(subprocess.Popen([*command, str(options.threads)], env=environment, **pipes))
            try:
                for process in running:
                    assert process.stdout.readline() == "ready\n"
                seconds: dict[int, list[Any]] = {0: [], 1: []}
                for number in peers.order([0, 1], options.rounds):
                    running[number].stdin.write("\n")
                    running[number].stdin.flush()
                    seconds[number].append(json.loads(running[number].stdout.readline()))
            finally:
                for process in running:
                    process.kill()
            before, after = (np.array(seconds[number]) for number in (0, 1))
            ratios = [float(np.median(before[:, kind] / after[:, kind])) for kind in (0, 1)]
            rows.append((name, 1000 * np.median(before[:, 1]), 1000 * np.median(after[:, 1]), *ratios))
            figures[name] = seconds
    peers.table(("model", "before CPU ms", "after CPU ms", "faster x", "by CPU seconds x"), rows)
    peers.write(options.json, {"texts": options.texts, "threads": options.threads, "seconds": figures})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3] != "dense", int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
