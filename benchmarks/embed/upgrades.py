"""Measure how much an upgrade of the engine moves vectors: precision, attention, instructions, version of torch.

    python benchmarks/embed/upgrades.py MODEL [--texts NAME] [--other-python PATH] [--json FILE]

Each row computes the same texts in a process of its own, and compares them with packed attention in fp32 of this
environment. `--other-python`: of an environment with another version of torch. benchmarks/results/space-upgrades.json
is of all-MiniLM-L6-v2 with the corpus `mixed`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

# oneDNN multiplies matrices of bf16 and int8, MKL those of fp32, ATen does the rest. MKL reads its variable on Intel.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# Name of the row: precision, attention, environment.
ROWS: dict[str, tuple[str, str, dict[str, str]]] = {
    "fp32": ("fp32", "packed", {}),
    "fp32, again": ("fp32", "packed", {}),
    "fp32, padded attention": ("fp32", "padded", {}),
    "fp32, without AVX-512": ("fp32", "packed", AVX2),
    "bf16": ("bf16", "packed", {}),
    "bf16, padded attention": ("bf16", "padded", {}),
    "int8": ("int8", "packed", {}),
}


def compute(model: Path, texts: str, precision: str, attention: str, file: Path) -> None:
    """Write the vectors of the texts, and print what computed them as JSON."""
    import torch

    from inferctl.bench.plan import workload
    from inferctl.embed.local import batches
    from inferctl.reading import task_config
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine
    from inferctl.serve.text.tokenizer_pool import TokenizerPool

    config = EngineConfig(model=str(model), precision=precision, device="cpu", batch_threads=1, allow_inaccurate=True)
    engine = EncoderEngine(config)
    info = engine.load()
    if info.attention != attention:
        info = replace(info, attention=attention)
        engine = EncoderEngine(replace(config, previous_info=info.to_json()))
        engine.load()
    pool = TokenizerPool(model, task_config.read("embed", model), threads=1)
    rows = pool.encode_now(list(dict.fromkeys(workload.read_corpus(texts)[0])), truncate=True)
    pool.close()
    vectors = np.zeros((len(rows), info.dimensions), np.float32)
    for members in batches({number: len(row) for number, row in enumerate(rows)}, info.batch_tokens):
        lengths = np.array([len(rows[number]) for number in members], np.int32)
        vectors[members] = engine.run(Batch(1, np.concatenate([rows[number] for number in members]), lengths)).rows
    np.save(file, vectors)
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(
        json.dumps(
            {
                "instructions": capability,
                "attention": info.attention,
                "precision": info.precision.effective,
                **info.versions,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", default="mixed")
    parser.add_argument("--other-python", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compute", nargs=3, metavar=("PRECISION", "ATTENTION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        compute(options.model, options.texts, *options.compute[:2], Path(options.compute[2]))
        return
    from inferctl.bench.judge import space_change

    rows: list[dict[str, Any]] = []
    runs = [(name, sys.executable, *row) for name, row in ROWS.items()]
    if options.other_python:
        runs += [(f"{name}, other torch", str(options.other_python), name, "packed", {}) for name in ("fp32", "bf16")]
    base: space_change.Vectors | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name, python, precision, attention, variables in runs:
            file = Path(folder) / "vectors.npy"
            given = [options.model, "--texts", options.texts, "--compute", precision, attention, file]
            environment = os.environ | variables | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
            command = [python, __file__, *map(str, given)]
            printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            vectors = np.load(file)
            found = space_change.Vectors(vectors, vectors)
            base = base or found
            change = space_change.measure(base, found)
            assert change, "the corpus has fewer than 12 texts"
            difference = float(np.abs(found.documents - base.documents).max())
            rows.append({"name": name, **json.loads(printed), "largest_difference": difference, **asdict(change)})
            mixed = change.mixed
            assert mixed
            print(
                f"{name:<24} torch {rows[-1]['torch']:<14} difference {difference:8.2g}  1 - cosine "
                f"{1 - (change.cosine_min or 0):8.2g}  kept {mixed.value:.2%} ({mixed.low:.2%} to {mixed.high:.2%})  "
                f"{change.verdict}",
                flush=True,
            )
    if options.json:
        document = {"model": options.model.name, "texts": options.texts}
        options.json.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
