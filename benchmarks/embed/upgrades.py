"""Measure how much an upgrade of the engine moves vectors: precision, attention, instructions, version of torch.

    python benchmarks/embed/upgrades.py MODEL OTHER_PYTHON [FILE.json]

Each row computes the corpus `mixed` in a process of its own, and compares the vectors with those of another row.
OTHER_PYTHON is that of an environment with another version of torch. benchmarks/results/space-upgrades.json is of
all-MiniLM-L6-v2, torch 2.13.0+cpu and 2.10.0+cu128 (which computed on the CPU), and a CPU with AVX-512 and avx512_bf16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

# MKL multiplies matrices of fp32, oneDNN those of bf16, ATen does the rest. MKL reads its variable on Intel only.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# The row: with which one it is compared, precision, attention, environment, whether another torch computes it.
ROWS: dict[str, tuple[str, str, str, dict[str, str], bool]] = {
    "fp32": ("fp32", "fp32", "packed", {}, False),
    "fp32 again": ("fp32", "fp32", "packed", {}, False),
    "fp32, padded": ("fp32", "fp32", "padded", {}, False),
    "fp32, AVX2": ("fp32", "fp32", "packed", AVX2, False),
    "fp32, other torch": ("fp32", "fp32", "packed", {}, True),
    "bf16": ("fp32", "bf16", "packed", {}, False),
    "bf16, padded": ("bf16", "bf16", "padded", {}, False),
    "bf16, AVX2": ("bf16", "bf16", "packed", AVX2, False),
    "bf16, other torch": ("bf16", "bf16", "packed", {}, True),
    "int8": ("fp32", "int8", "packed", {}, False),
}


def compute(model: str, precision: str, attention: str, file: str) -> None:
    """Write the vectors of the texts, and print what computed them as JSON."""
    import torch

    from inferctl.bench.plan import workload
    from inferctl.embed.local import batches
    from inferctl.reading import task_config
    from inferctl.serve.engine_process.engine_protocol import Batch, EngineConfig
    from inferctl.serve.engines.encoder import EncoderEngine
    from inferctl.serve.text.tokenizer_pool import TokenizerPool

    config = EngineConfig(model=model, precision=precision, device="cpu", batch_threads=1)
    engine = EncoderEngine(config)
    info = engine.load()
    if info.attention != attention:
        info = replace(info, attention=attention)
        engine = EncoderEngine(replace(config, previous_info=info.to_json()))
        engine.load()
    pool = TokenizerPool(Path(model), task_config.read("embed", Path(model)), threads=1)
    rows = pool.encode_now(list(dict.fromkeys(workload.read_corpus("mixed")[0])), truncate=True)
    pool.close()
    vectors = np.zeros((len(rows), info.dimensions), np.float32)
    for members in batches({number: len(row) for number, row in enumerate(rows)}, info.batch_tokens):
        lengths = np.array([len(rows[number]) for number in members], np.int32)
        vectors[members] = engine.run(Batch(1, np.concatenate([rows[number] for number in members]), lengths)).rows
    np.save(file, vectors)
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(json.dumps({"attention": info.attention, "instructions": capability, **info.versions}))


def main(model: str, other_python: str, result: str = "") -> None:
    from inferctl.bench.judge.space_change import Vectors, measure

    rows, computed = [], {}
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for name, (base, precision, attention, changes, other) in ROWS.items():
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            command = [other_python if other else sys.executable, __file__, model, precision, attention, file.name]
            done = subprocess.run(command, env=variables | changes, stdout=subprocess.PIPE, check=True)
            computed[name] = Vectors(*[np.load(file.name)] * 2)
        change = measure(computed[base], computed[name])
        assert change
        assert change.mixed
        largest = float(np.abs(computed[name].documents - computed[base].documents).max())
        rows.append({"name": name, "base": base, **json.loads(done.stdout), "largest_difference": largest})
        rows[-1] |= asdict(change)
        kept = f"{change.mixed.value:.2%} ({change.mixed.low:.2%} to {change.mixed.high:.2%})"
        print(f"{name:<18} {base}  {largest:8.2g}  {1 - (change.cosine_min or 0):8.2g}  {kept}  {change.verdict}")
    if result:
        Path(result).write_text(
            json.dumps({"model": Path(model).name, "texts": "mixed", "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    (compute if len(sys.argv) == 5 else main)(*sys.argv[1:])
