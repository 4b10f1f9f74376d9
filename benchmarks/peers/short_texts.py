"""Compare the forward pass of two checkouts of this project: 256 texts of 8 to 16 tokens on one core, bf16, in-process.

    python benchmarks/peers/short_texts.py ../older . [--rounds 8] [--json FILE]

The dense model is all-MiniLM-L6-v2. The sparse one has the shape of distilbert-base, the vocabulary of BERT and random
weights, with a bias that leaves few of its weights above zero, as in SPLADE. The checkouts take turns (A B B A), each
in its own process. The ratios are medians of those of one round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import peers


def child(folder: Path, sparse: bool) -> None:
    """Compute a batch for each line of stdin, and print its seconds and CPU seconds."""
    import torch

    from inferctl.reading import task_config
    from inferctl.serve.engines import device, forward

    torch.set_num_threads(1)
    where, _, traits = device.detect("cpu")
    precision, dtype = device.choose("bf16", traits)
    run: Any = forward.Forward(folder, task_config.read("embed", folder), where, dtype, precision, 16384)
    run.pack()
    rng = np.random.default_rng(3)
    ids = [rng.integers(1000, 20000, length).astype(np.int32) for length in rng.integers(8, 17, 256)]
    texts = getattr(forward, "Sequences")(ids, [2] * len(ids) if sparse else None)  # noqa: B009
    rows = run(texts)
    print(sum(len(row) for row in rows) // len(ids), flush=True)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        run(texts)
        print(json.dumps([time.perf_counter() - started, time.process_time() - cpu]), flush=True)


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.set_defaults(rounds=8)
    parser.add_argument("checkouts", nargs=2, type=Path)
    options = parser.parse_args()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as place:
        import outputs
        from safetensors.torch import load_file, save_file

        sparse = outputs.splade(Path(place))
        (file,) = sparse.rglob("model.safetensors")
        stored = load_file(file)
        stored["vocab_projector.bias"] -= 1.6
        save_file(stored, file, {"format": "pt"})
        for name, model in {"dense": peers.MODEL, "sparse": sparse}.items():
            command = [sys.executable, __file__, "--child", str(model), name]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            running: list[Any] = [
                subprocess.Popen(command, env=peers.environment() | {"PYTHONPATH": str(checkout.resolve())}, **pipes)
                for checkout in options.checkouts
            ]
            try:
                widths = [int(process.stdout.readline()) for process in running]
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
            rows.append((name, widths, 1000 * np.median(before[:, 1]), 1000 * np.median(after[:, 1]), *ratios))
            figures[name] = seconds
    peers.table(("model", "numbers per text", "before CPU ms", "after CPU ms", "faster x", "by CPU time x"), rows)
    peers.write(options.json, {"seconds": figures})


if __name__ == "__main__":
    child(Path(sys.argv[2]), sys.argv[3] == "sparse") if sys.argv[1:2] == ["--child"] else main()
