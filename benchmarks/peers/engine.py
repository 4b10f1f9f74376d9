"""Compare the engine, in-process, with sentence-transformers and OpenVINO: texts/s and the cosine to fp32.

    python benchmarks/peers/engine.py [--texts 256] [--rounds 6] [--json FILE]

All contenders tokenize and embed the same texts of log-normal length (mean 55 tokens). Each runs in its own process,
interleaved A B C C B A. CPU seconds are shown in addition, because other work on the machine affects them least.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers

CONTENDERS = (
    "inferctl bf16",
    "inferctl int8",
    "sentence-transformers bf16",
    "openvino bf16",
    "openvino int8",
)


@dataclass
class Contender:
    """A running process. `wall` and `cpu` are seconds for all texts, one entry per round."""

    name: str
    process: subprocess.Popen[str]
    vectors: Any
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        wall, cpu = json.loads(self.process.stdout.readline())
        self.wall.append(wall)
        self.cpu.append(cpu)


def start(name: str, file: Path, model: Path = peers.MODEL) -> Contender:
    library = name.rpartition(" ")[0]
    interpreter = sys.executable if library == "inferctl" else str(peers.python(library))
    environment = peers.environment()
    log = peers.LOGS / f"{name.replace(' ', '-')}-alone.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [interpreter, str(peers.HERE / "contender.py"), name, str(model), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment,
        )
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit(f"error: {name} did not start\nhint: see {log}")
    return Contender(name, process, np.array(json.loads(line)))


def main() -> None:
    parser = peers.options(__doc__ or "")
    parser.add_argument("--texts", type=int, default=256)
    parser.set_defaults(rounds=6)
    options = parser.parse_args()
    texts = peers.texts(options.texts)
    completed = subprocess.run(
        [sys.executable, "-m", "inferctl.serve.reference", str(peers.MODEL)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    reference = np.array([peers.decode(row) for row in json.loads(completed.stdout)["embeddings"]])
    running: list[Contender] = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"texts": texts, "calibration": peers.texts(128, seed=8)}, file)
        file.flush()
        try:
            running.extend(start(name, Path(file.name)) for name in CONTENDERS)
            for contender in peers.order(running, options.rounds):
                contender.measure()
        finally:
            for contender in running:
                contender.process.kill()
    baseline, rows, figures = running[0], [], {}
    for contender in running:
        cosines = (contender.vectors * reference).sum(1) / np.linalg.norm(contender.vectors, axis=1)
        rate = len(texts) / peers.median(contender.wall)
        faster = peers.median(contender.wall) / peers.median(baseline.wall)
        cpu = peers.median(contender.cpu) / peers.median(baseline.cpu)
        rows.append((contender.name, rate, faster, cpu, float(cosines.min()), float(cosines.mean())))
        figures[contender.name] = {
            "texts_per_second": rate,
            "inferctl_bf16_is": faster,
            "inferctl_bf16_is_by_cpu_seconds": cpu,
            "cosine_min": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "wall": contender.wall,
            "cpu": contender.cpu,
        }
    peers.table(("engine", "texts/s", "inferctl bf16 is x", "by CPU seconds x", "cosine min", "mean"), rows)
    peers.write(options.json, {"texts": len(texts), "engines": figures})


if __name__ == "__main__":
    main()
